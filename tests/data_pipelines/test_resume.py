"""Stopped, killed or out of disk anywhere, with every kind of stage: the same command then gives the same bytes."""

import argparse
import importlib.util
import resource
import shutil

import data_scale
import numpy as np
import pytest
from all_stages import config_of, quiet, snapshot

from data_pipelines import tasks
from slmjax import files


def test_stopped_after_every_so_many_tasks_it_gets_to_the_same_end(corpus_folder, finished_run, tmp_path, monkeypatch):
    finish, stops = tasks.finish, 0
    left = 0

    def stop(task, outputs, result, *, started):
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt  # outputs are there, the marker is not
        return finish(task, outputs, result, started=started)

    monkeypatch.setattr(tasks, "finish", stop)
    while stops < 50:
        left = 37
        try:
            quiet(config_of(corpus_folder, tmp_path / "out"))
            break
        except KeyboardInterrupt:
            stops += 1
    assert 4 < stops < 50
    assert snapshot(tmp_path / "out") == snapshot(finished_run)


def test_a_store_that_was_being_replaced_is_replaced(corpus_folder, finished_run, tmp_path, monkeypatch):
    """Removing the old one, the process is killed when half of its files are gone."""
    shutil.copytree(finished_run, tmp_path / "out")
    for marker in (tmp_path / "out/work/markers/stores").iterdir():
        marker.unlink()

    def killed(path, *_, **__):
        if (path / "metadata.json").exists():
            (path / "metadata.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            quiet(config_of(corpus_folder, tmp_path / "out"))
    quiet(config_of(corpus_folder, tmp_path / "out"))
    assert snapshot(tmp_path / "out") == snapshot(finished_run)
    assert not list((tmp_path / "out").glob(".*"))


def test_what_killed_workers_were_writing_does_not_outlive_the_run(corpus_folder, finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "out")
    for place in (".", "documents", "work/markers/read", "work/verdicts/exact_dedup", "quarantine"):
        (tmp_path / "out" / place / ".a.parquet.elsewhere.17.partial").write_text("half")
    (tmp_path / "out/.train.partial").mkdir()
    (tmp_path / "out/.train.partial/00000.tokens.bin").write_text("half")
    quiet(config_of(corpus_folder, tmp_path / "out"))
    assert snapshot(tmp_path / "out") == snapshot(finished_run)
    assert not (tmp_path / "out/.train.partial").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [
        "local",
        pytest.param(
            "ray",
            marks=pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
        ),
    ],
)
def test_killed_at_random_moments_it_gets_to_the_same_end(tmp_path, engine, capsys):
    """Raises SystemExit where a file differs, a process is left or an error is not the one expected."""
    rounds = 1 if engine == "ray" else 2  # Ray takes its time to start
    args = argparse.Namespace(engine=engine, rounds=rounds, kills=2, victims=["driver", "worker"], seed=1)
    data_scale.kill(args, tmp_path)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 * rounds + 3
    assert f"after each of {rounds} rounds all" in said[-1]


@pytest.mark.slow
def test_out_of_disk_anywhere_it_says_so_and_gets_to_the_same_end(corpus_folder, finished_run, tmp_path):
    """A limit on the size of files stands in for the disk, in workers too."""
    sizes = [len(content) for content in snapshot(finished_run).values()]
    config = config_of(corpus_folder, tmp_path / "out", num_workers=2)
    for share in (0.6, 0.9, 0.97, 0.995):
        limit = int(np.quantile(sizes, share))
        process = data_scale.start(config, tmp_path)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
        assert process.wait() == 1
        said = " ".join((tmp_path / "run.log").read_text().split())
        assert "cannot write " in said
        assert "File too large. What is finished stays; make room and run the same command again" in said
    data_scale.finish(config, tmp_path)
    assert snapshot(tmp_path / "out") == snapshot(finished_run)
