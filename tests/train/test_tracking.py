"""Metrics reach their readers once and whole."""

import io
import json
import math
import os
import sys

import jax
import pytest
from rich.console import Console

from slmjax.config import TrackingConfig, WandbConfig
from slmjax.train import tracking
from slmjax.train.tracking import ConsoleTracker, JsonlTracker, WandbTracker, make_tracker


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_jsonl_is_on_disk_at_once(tmp_path):
    tracker = JsonlTracker(tmp_path / "metrics.jsonl", resume_step=0)
    tracker.log(1, {"loss": 2.5, "learning_rate": 1e-3})
    tracker.log(2, {"loss": math.nan, "grad_norm": math.inf})
    assert read(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 2.5, "learning_rate": 1e-3},
        {"step": 2, "loss": None, "grad_norm": None},
    ]
    tracker.close()


def test_jsonl_resumes_without_duplicates_and_without_torn_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path, resume_step=0)
    for step in (10, 20, 20, 30, 40):
        tracker.log(step, {"loss": float(step)})
    tracker.close()
    with path.open("a") as file:
        file.write('{"step": 50, "lo')
    tracker = JsonlTracker(path, resume_step=20)
    tracker.log(30, {"loss": 3.0})
    tracker.close()
    assert [(line["step"], line["loss"]) for line in read(path)] == [(10, 10.0), (20, 20.0), (20, 20.0), (30, 3.0)]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_jsonl_survives_a_torn_line_of_a_kept_step_and_other_junk(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2}\n\x00\x00\xff\n[1]\n{"loss": 1}\n{"step": 2, "loss": 1.5')
    JsonlTracker(path, resume_step=5).close()
    assert read(path) == [{"step": 1, "loss": 2}]


TRAIN = {"loss": 3.21, "learning_rate": 3e-4, "tokens_per_second": 12345.6, "mfu": 0.4, "grad_norm": 1.0}


def test_console_without_a_terminal_prints_plain_lines():
    out = io.StringIO()
    tracker = ConsoleTracker(total_steps=100, resume_step=0, console=Console(file=out, soft_wrap=True, width=40))
    tracker.log(1, {"loss": 5.0, "learning_rate": 1e-5})
    tracker.log(11, TRAIN | {"total_skips": 2.0})
    tracker.log(11, {"valid/loss": 3.5, "valid/bits_per_byte": 1.25})
    tracker.close()
    lines = out.getvalue().splitlines()
    assert lines[0] == "step   1/100  loss 5.0000  lr 1.00e-05  eta -"
    assert lines[1].startswith(
        "step  11/100  loss 3.2100  lr 3.00e-04  12,346 tokens/s  mfu 40.0%  skipped 2  eta 0:00:0"
    )
    assert lines[2:] == ["step  11/100  valid/loss 3.5000  valid/bits_per_byte 1.2500"]


def test_eta_is_the_pace_since_the_first_logged_step(monkeypatch):
    out = io.StringIO()
    tracker = ConsoleTracker(total_steps=100, resume_step=40, console=Console(file=out, soft_wrap=True))
    for now, step in [(1000.0, 41), (1020.0, 51), (1118.0, 100)]:
        monkeypatch.setattr(tracking.time, "monotonic", lambda now=now: now)
        tracker.log(step, {"loss": 1.0})
    assert [line.rsplit("eta ")[1] for line in out.getvalue().splitlines()] == ["-", "0:01:38", "0:00:00"]


def test_console_on_a_terminal_shows_a_bar_and_keeps_evaluations():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, _environ={"TERM": "xterm"})
    tracker = ConsoleTracker(total_steps=100, resume_step=0, console=console)
    tracker.log(11, TRAIN)
    tracker.log(11, {"valid/loss": 3.5})
    tracker.close()
    shown = out.getvalue()
    assert "11/100" in shown
    assert "loss 3.2100" in shown
    assert "step  11/100  valid/loss 3.5000" in shown


def test_make_tracker_writes_the_file_and_nothing_on_other_processes(tmp_path, monkeypatch, capsys):
    config = TrackingConfig(console=True)
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would raise
    tracker = make_tracker(config, tmp_path / "run", total_steps=10, resume_step=0, config_json={})
    tracker.log(1, {"loss": 2.0})
    tracker.close()
    assert read(tmp_path / "run" / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    assert "loss 2.0000" in capsys.readouterr().err
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    tracker = make_tracker(config, tmp_path / "other", total_steps=10, resume_step=0, config_json={})
    tracker.log(1, {"loss": 2.0})
    tracker.close()
    assert not (tmp_path / "other").exists()


def test_wandb_offline_needs_no_account_and_keeps_its_id(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config = TrackingConfig(console=False, wandb=WandbConfig(project="test"))
    tracker = make_tracker(config, tmp_path, total_steps=10, resume_step=0, config_json={"model": {"width": 8}})
    tracker.log(1, {"loss": 2.0})
    tracker.log(1, {"valid/loss": 2.5})
    tracker.close()
    name = (tmp_path / "wandb_id").read_text()
    assert len(name) == 8
    assert list((tmp_path / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))


def test_wandb_online_without_a_key_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(RuntimeError, match=r"could not start in mode 'online'(.|\n)*WANDB_API_KEY(.|\n)*'offline'"):
        WandbTracker(WandbConfig(project="test", mode="online"), tmp_path, config_json={})
