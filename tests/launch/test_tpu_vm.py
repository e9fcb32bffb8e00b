"""The Cloud TPU script, printing what it would run."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "tpu_vm.sh"


def dry_run(*arguments, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TPU_")}
    return subprocess.run(
        [SCRIPT, "--dry-run", *arguments], env=clean | environment, capture_output=True, text=True, check=False
    )


def commands(*arguments, **environment):
    done = dry_run(*arguments, TPU_ZONE="zone-1", **environment)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines() if line.startswith(("gcloud", "git"))]


def test_create_asks_for_the_type_the_version_and_the_project():
    (command,) = commands("create", TPU_NAME="n", TPU_TYPE="v5p-8", TPU_VERSION="v", TPU_PROJECT="p", TPU_SPOT="1")
    assert command[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "create", "n"]
    options = " ".join(command[6:])
    assert options == "--accelerator-type v5p-8 --version v --spot --zone zone-1 --project p"


def test_install_copies_the_source_to_every_host():
    archive, copy, *_ = commands("install")
    assert archive[:2] == ["git", "archive"]
    assert copy[4:] == ["scp", archive[-2], "slmjax:slmjax.tar.gz", "--worker", "all", "--zone", "zone-1"]
    assert not Path(archive[-2]).exists()


def test_run_keeps_the_arguments_apart_on_the_host():
    (command,) = commands("run", "slmjax", "train", "a.gin", "--set", 'RunConfig.output_dir="/mnt/run 1"')
    assert command[4:9] == ["ssh", "slmjax", "--worker", "all", "--command"]
    on_host = shlex.split(command[9])
    assert "SLMJAX_DISTRIBUTED=auto" in on_host
    assert on_host[-5:] == ["slmjax", "train", "a.gin", "--set", 'RunConfig.output_dir="/mnt/run 1"']


@pytest.mark.parametrize(("arguments", "zone"), [(("create",), None), (("sing",), "z"), (("run",), "z"), ((), "z")])
def test_usage_is_printed_for_what_is_not_understood(arguments, zone):
    done = dry_run(*arguments, **({"TPU_ZONE": zone} if zone else {}))
    assert done.returncode != 0
    assert "usage: TPU_ZONE=ZONE" in done.stderr
    assert "gcloud" not in done.stdout
