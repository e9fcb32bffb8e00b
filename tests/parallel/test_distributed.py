import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slmjax.parallel import distributed

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("two_processes.py")
ALONE = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS" and not name.startswith("SLMJAX_")}


def run(command, **environment):
    environment = ALONE | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=120, capture_output=True, text=True)


def test_two_processes_equal_one(tmp_path):
    """Four devices as 1 x 4 and as 2 x 2: same rows, same losses up to the order of float32 sums across devices."""
    for processes in (1, 2):
        out = tmp_path / str(processes)
        out.mkdir()
        run(
            ["launch/local.sh", str(processes), sys.executable, str(PROGRAM), str(out)],
            JAX_NUM_CPU_DEVICES=str(4 // processes),
        )
    one = json.loads((tmp_path / "1" / "0.json").read_text())
    two = [json.loads((tmp_path / "2" / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert one["processes"] == 1
    assert one["rows"] == list(range(8))
    assert [result["processes"] for result in two] == [2, 2]
    assert [result["rows"] for result in two] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert one["shard_shapes"] == two[0]["shard_shapes"] == [[16, 4]]
    assert two[0]["losses"] == two[1]["losses"]
    assert one["losses"][2] < one["losses"][0]
    np.testing.assert_allclose(two[0]["losses"], one["losses"], rtol=1e-6)


@pytest.fixture
def started(monkeypatch):
    """Records the arguments of jax.distributed.initialize in place of connecting."""
    calls = []
    for name in (distributed.COORDINATOR, distributed.NUM_PROCESSES, distributed.PROCESS_ID, distributed.MODE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *arguments: calls.append(arguments))
    return calls


def test_without_variables_the_process_is_alone(started):
    distributed.initialise()
    assert started == []


def test_variables_name_the_run(started, monkeypatch):
    monkeypatch.setenv(distributed.COORDINATOR, "localhost:1234")
    monkeypatch.setenv(distributed.NUM_PROCESSES, "4")
    monkeypatch.setenv(distributed.PROCESS_ID, "3")
    distributed.initialise()
    assert started == [("localhost:1234", 4, 3)]


def test_auto_leaves_it_to_the_cluster(started, monkeypatch):
    monkeypatch.setenv(distributed.MODE, "auto")
    distributed.initialise()
    assert started == [()]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SLMJAX_PROCESS_ID": "0"}, "SLMJAX_PROCESS_ID set but not SLMJAX_COORDINATOR, SLMJAX_NUM_PROCESSES"),
        ({"SLMJAX_DISTRIBUTED": "yes"}, "SLMJAX_DISTRIBUTED must be \"auto\" or not set, got 'yes'"),
        (
            {"SLMJAX_COORDINATOR": "h:1", "SLMJAX_NUM_PROCESSES": "two", "SLMJAX_PROCESS_ID": "0"},
            "SLMJAX_NUM_PROCESSES must be a whole number, got 'two'",
        ),
        (
            {"SLMJAX_COORDINATOR": "h:1", "SLMJAX_NUM_PROCESSES": "2", "SLMJAX_PROCESS_ID": "2"},
            "SLMJAX_PROCESS_ID must lie in .*, got 2 of 2",
        ),
    ],
)
def test_a_wrong_environment_is_refused(started, monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        distributed.initialise()
    assert started == []
