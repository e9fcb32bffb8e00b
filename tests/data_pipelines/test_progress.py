"""Progress goes by bytes, on a terminal and without one; a pipeline that is stopped says how to go on."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from inspected_output import text_of
from rich.console import Console
from typer.testing import CliRunner

import data_pipelines.run
from data_pipelines import progress, stopping
from data_pipelines.progress import Reporter, Step
from data_pipelines.tasks import Done, Extent, Task
from slmjax import cli

ROOT = Path(__file__).parents[2]


def done(size, *, seconds: float | None = 1.0, documents=10, **result):
    return Done(outputs={}, result=result, seconds=seconds, extent=Extent(size, documents))


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


def test_the_remaining_time_goes_by_bytes_not_by_tasks(clock):
    step = Step("measure", 4, 100_000_000)
    clock.now += 2
    assert step.phases[-1].facts() == "  0%, 0/4 tasks, 0:02 so far"
    step.advance(done(80_000_000))
    assert step.phases[-1].facts() == " 80%, 1/4 tasks, 40.0 MB/s, 5 docs/s, 0:00 left"
    clock.now += 78
    step.advance(done(10_000_000))
    # 90 MB took 80 s, 10 MB are left; by tasks it would be as long again.
    assert step.phases[-1].facts() == " 90%, 2/4 tasks, 1.1 MB/s, 0 docs/s, 0:09 left"


def test_what_was_done_before_is_not_taken_for_speed(clock):
    step = Step("read", 4, 1000)
    clock.now += 1
    step.advance(done(900, seconds=None))
    assert step.phases[-1].seconds_left() is None
    assert not step.phases[-1].bytes
    clock.now += 9
    step.advance(done(50))
    assert step.phases[-1].seconds_left() == pytest.approx(10)  # 50 in 10 s, 50 to go
    assert not step.done_before


def test_tasks_of_unknown_size_are_counted(clock):
    step = Step("tokenizer", 4)
    clock.now += 6
    step.advance(done(0, documents=0))
    assert step.phases[-1].facts() == " 25%, 1/4 tasks, 0:18 left"
    step = Step("nothing", 0)
    assert step.phases[-1].share == 1.0


def test_phases_are_counted_by_themselves_and_together_once(clock):
    task = Task(root=Path(), step="s", name="t", fingerprint="")
    step = Step("near_dedup", 2, 500)
    step.phase("scatter", [task, task])
    for _ in range(2):
        clock.now += 1
        step.advance(done(250, documents=3))
    step.phase("meet", [task] * 3)
    assert step.phases[-1].facts().startswith("  0%, 0/3 tasks")
    step.advance(done(0, documents=0))
    step.phase("verdicts", [task, task])
    for _ in range(2):
        step.advance(done(250, documents=3))
    assert (step.most("bytes"), step.most("documents")) == (500, 6)  # the texts, once


@pytest.mark.parametrize(
    ("seconds", "spelled"), [(0.4, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599.9, "1:00:00"), (90061, "25:01:01")]
)
def test_times_are_spelled(seconds, spelled):
    assert progress._clock(seconds) == spelled


def test_without_a_terminal_there_are_lines(tmp_path):
    screen = io.StringIO()
    reporter = Reporter(Console(file=screen, width=80), tmp_path / "timings.json", line_every=0.02)
    with reporter.step("measure", 3, 3_000_000) as step:
        step.advance(done(1_000_000))
        time.sleep(0.15)
        step.note = "[bold]note[/bold]"
    lines = screen.getvalue().splitlines()
    assert len(lines) >= 3
    assert re.fullmatch(r"measure +33%, 1/3 tasks, [\d.,]+ MB/s, [\d,]+ docs/s, 0:0\d left", lines[0])
    assert re.fullmatch(r"measure +0\.\d s +[\d.,]+ MB/s +[\d,]+ docs/s  \[bold\]note\[/bold\]", lines[-1])


def test_on_a_terminal_there_is_a_bar_that_fits(tmp_path):
    for width in (80, 140):
        screen = io.StringIO()
        console = Console(file=screen, width=width, force_terminal=True, legacy_windows=False)
        with Reporter(console, tmp_path / "timings.json").step("decontamination", 3, 3_000_000) as step:
            step.phase("scatter", [Task(root=Path(), step="s", name="t", fingerprint="")] * 2)
            step.advance(done(1_000_000))
            time.sleep(0.5)
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
        drawn = [line for line in re.split(r"[\r\n]+", plain) if "━" in line and "1/2" in line]
        assert drawn
        assert all(len(line) <= width for line in drawn)
        assert any(re.search(r"decontamination: scatter [━╸╺]+ .*1/2 tasks.* left", line) for line in drawn)


def test_timings_name_the_steps_that_this_run_has_finished(tmp_path):
    path = tmp_path / "timings.json"
    path.write_text(json.dumps({"read": {"seconds": 7.0}, "measure": {"seconds": 5.0}}))
    reporter = Reporter(Console(file=io.StringIO()), path)
    with reporter.step("read", 1, 10) as step:
        assert json.loads(path.read_text()) == {}
        step.advance(done(10, seconds=None))
    assert json.loads(path.read_text()) == {"read": {"seconds": 7.0}}  # done before: the time that it took then
    with pytest.raises(KeyboardInterrupt), reporter.step("measure", 1, 10):
        raise KeyboardInterrupt
    assert list(json.loads(path.read_text())) == ["read"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_one_line_and_status_75(tmp_path, monkeypatch, number):
    monkeypatch.setattr(data_pipelines.run, "run", lambda config: os.kill(os.getpid(), number))
    (tmp_path / "c.gin").write_text(
        'PipelineConfig.output_dir = "out"\nPipelineConfig.sources = (@FilesSourceConfig(),)\n'
        'FilesSourceConfig.paths = ("x",)\nPipelineConfig.tokenizer = @ExistingTokenizerConfig()\n'
        'ExistingTokenizerConfig.path = "t"\n'
    )
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    stopped = CliRunner().invoke(cli.app, ["data", str(tmp_path / "c.gin")])
    assert stopped.exit_code == 75
    name = signal.Signals(number).name
    assert stopped.stderr == (
        f"slmjax: stopped by {name}: what is finished is kept; run the same command again to go on\n"
    )
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_ends_the_workers_and_a_second_one_the_process():
    program = (
        "import multiprocessing, os, signal, time\n"
        "from data_pipelines import stopping\n"
        "if __name__ == '__main__':\n"
        "    worker = multiprocessing.get_context('spawn').Process(target=time.sleep, args=(60,))\n"
        "    try:\n"
        "        with stopping.on_signals():\n"
        "            worker.start()\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "            time.sleep(60)\n"
        "    except stopping.Stopped as stopped:\n"
        "        worker.join(10)\n"
        "        print(worker.exitcode, stopped, flush=True)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.stdout.startswith(f"{-signal.SIGTERM} stopped by SIGTERM: ")
    assert issubclass(stopping.Stopped, KeyboardInterrupt)  # nothing that mends errors takes it for one


@pytest.mark.slow
def test_a_pipeline_with_workers_stops_at_once_and_goes_on(tmp_path):
    lines = (json.dumps({"id": str(i), "text": text_of(i, 2000)}) for i in range(300))
    (tmp_path / "good.jsonl").write_text("\n".join(lines))
    (tmp_path / "config.gin").write_text(
        f'PipelineConfig.output_dir = "{tmp_path}/out"\nPipelineConfig.num_workers = 2\n'
        "PipelineConfig.shard_bytes = 100_000\nPipelineConfig.sources = (@FilesSourceConfig(),)\n"
        f'FilesSourceConfig.paths = ("{tmp_path}/good.jsonl",)\nPipelineConfig.stages = (@NearDedupConfig(),)\n'
        "PipelineConfig.tokenizer = @TrainTokenizerConfig()\nTrainTokenizerConfig.vocab_size = 330\n"
    )
    command = [sys.executable, "-m", "slmjax", "data", str(tmp_path / "config.gin")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not list((tmp_path / "out/work/markers").rglob("*.json")) and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        _, said = process.communicate(timeout=60)
    assert process.returncode == 75
    assert time.monotonic() - started < 10
    assert said.count("\n") == 1
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0
