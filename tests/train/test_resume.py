"""A run that was stopped, in whatever way, and goes on is the run that never was, bit for bit on a CPU."""

import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import read_losses, train_here, write_tiny_run

from slmjax.train import loop

pytestmark = pytest.mark.usefixtures("compiled_once")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def uninterrupted(tiny):
    """The losses of a run that was never stopped."""
    train_here(tiny)
    return read_losses(tiny.parent / "run")


def in_dir(path):
    return f"RunConfig.output_dir = {str(path)!r}"


def checkpoints_in(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


class CrashError(Exception):
    pass


def crash():
    raise CrashError


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def interrupt(monkeypatch):
    """Makes the next run call `what` when it takes batch number `step`."""
    make_loader = loop.make_loader

    def interrupt(what, step):
        def make(*args, start_step, **kwargs):
            monkeypatch.setattr(loop, "make_loader", make_loader)
            for i, batch in enumerate(make_loader(*args, start_step=start_step, **kwargs), start_step):
                if i == step:
                    what()
                yield batch

        monkeypatch.setattr(loop, "make_loader", make)

    return interrupt


# The mixture changes at step 5; checkpoints are at 3, 6, 9 and 12; evaluations at 4, 8 and 12.
@pytest.mark.parametrize("step", [4, 11])
def test_resume_after_a_signal_is_never_having_stopped(tiny, uninterrupted, interrupt, tmp_path, step):
    interrupt(terminate, step)
    outcome = train_here(tiny, in_dir(tmp_path))
    assert (outcome.step, outcome.interrupted) == (step + 1, True)
    assert checkpoints_in(tmp_path)[-1] == str(step + 1) or step == 11
    assert train_here(tiny, in_dir(tmp_path)).step == 12
    assert read_losses(tmp_path) == uninterrupted


@pytest.mark.parametrize("steps", [(1,), (7, 8)])
def test_resume_after_a_crash_is_never_having_stopped(tiny, uninterrupted, interrupt, tmp_path, steps):
    for step in steps:
        interrupt(crash, step)
        with pytest.raises(CrashError):
            train_here(tiny, in_dir(tmp_path))
    assert train_here(tiny, in_dir(tmp_path)).step == 12
    assert read_losses(tmp_path) == uninterrupted


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip_a_byte, truncate])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_used(
    tiny, uninterrupted, interrupt, tmp_path, caplog, damage
):
    interrupt(terminate, 9)
    train_here(tiny, in_dir(tmp_path))
    assert checkpoints_in(tmp_path) == ["10", "9"]
    largest = max((tmp_path / "checkpoints" / "10" / "state").rglob("*"), key=lambda path: path.stat().st_size)
    damage(largest)
    with caplog.at_level(logging.INFO):
        assert train_here(tiny, in_dir(tmp_path)).step == 12
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert any("checkpoints/10 is damaged and is not used" in warning for warning in warnings)
    assert "resuming at step 9" in caplog.messages
    assert read_losses(tmp_path) == uninterrupted
    assert "10.bad" in checkpoints_in(tmp_path)


@pytest.mark.slow
def test_profile_of_steps_among_which_a_run_resumes(tiny, interrupt, tmp_path):
    profiled = (in_dir(tmp_path), "TrackingConfig.profile_steps = (4, 8)")
    for stop, traces in ((2, 0), (6, 1), (9, 2)):
        interrupt(terminate, stop)
        assert train_here(tiny, *profiled).interrupted
        assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == traces


def test_a_signal_is_noted_once_and_the_handlers_are_put_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with loop._StopSignal() as stop:
        assert not stop.requested(synchronise=True)
        signal.raise_signal(signal.SIGINT)
        assert stop.requested(synchronise=False)
        assert {signal.getsignal(number) for number in before} == {signal.SIG_DFL}
    assert {number: signal.getsignal(number) for number in before} == before


# From here on through the real command, in a process of its own.

LONG = ("RunConfig.steps = 60", "CheckpointConfig.every_steps = 7", "EvaluationConfig.every_steps = 20")


class Command:
    """`slmjax train CONFIG`, or another program with the same arguments, running."""

    def __init__(self, arguments, environment, err_path):
        self._err_path = err_path
        with open(err_path, "w") as err:
            self.process = subprocess.Popen(arguments, env=environment, cwd=ROOT, stdout=err, stderr=err)

    @property
    def err(self):
        """What it has written, to stdout and stderr."""
        return self._err_path.read_text()

    def finish(self):
        """Waits, and returns the exit status."""
        return self.process.wait(timeout=180)

    def wait_for(self, condition):
        """Returns as soon as `condition()` holds."""
        while not condition():
            assert self.process.poll() is None, self.err
            time.sleep(0.01)

    def wait_for_step(self, run_dir, step):
        """Returns as soon as step `step` is logged."""
        path = run_dir / "metrics.jsonl"
        self.wait_for(lambda: path.exists() and path.read_bytes().count(b'"loss"') >= step)


@pytest.fixture(scope="module")
def command(compilation_cache_dir, tmp_path_factory):
    """Starts a `Command`, with the compiled programs and the settings of this process, or with others."""
    directory, started = tmp_path_factory.mktemp("command"), []

    def command(config, *overrides, program=(sys.executable, "-m", "slmjax"), without=(), **environment):
        settings = {"JAX_COMPILATION_CACHE_DIR": str(compilation_cache_dir), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        inherited = {name: value for name, value in (os.environ | settings).items() if name not in without}
        arguments = [*program, "train", str(config)] + [word for each in overrides for word in ("--set", each)]
        started.append(Command(arguments, inherited | environment, directory / f"{len(started)}.err"))
        return started[-1]

    yield command
    for each in started:
        each.process.kill()
        each.process.wait()


@pytest.fixture(scope="module")
def long_uninterrupted(tiny, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("long")
    train_here(tiny, in_dir(run_dir), *LONG)
    return read_losses(run_dir)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_the_command_saves_on_a_signal_and_the_same_command_goes_on(
    tiny, long_uninterrupted, command, tmp_path, number
):
    stopped = command(tiny, in_dir(tmp_path), *LONG)
    stopped.wait_for_step(tmp_path, 10)
    stopped.process.send_signal(number)
    assert stopped.finish() == 75, stopped.err
    assert f"{number.name}: saving a checkpoint, then stopping" in stopped.err
    assert "Traceback" not in stopped.err
    saved = max(int(name) for name in checkpoints_in(tmp_path))
    assert 10 <= saved < 60
    assert max(step for step, _ in read_losses(tmp_path)) == saved
    assert command(tiny, in_dir(tmp_path), *LONG).finish() == 0
    assert read_losses(tmp_path) == long_uninterrupted


SLOW_SAVE = """
import time
from slmjax.cli import main
from slmjax.train.checkpoint import Checkpointer
Checkpointer.save = lambda *_: time.sleep(1000)
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_command_at_once(tiny, command, tmp_path, number):
    endless = ("RunConfig.steps = 1_000_000", "CheckpointConfig.every_steps = 1_000_000")
    stopped = command(tiny, in_dir(tmp_path), *endless, program=(sys.executable, "-c", SLOW_SAVE))
    stopped.wait_for_step(tmp_path, 3)
    stopped.process.send_signal(number)
    stopped.wait_for(lambda: "saving a checkpoint" in stopped.err)
    time.sleep(0.5)
    assert stopped.process.poll() is None
    stopped.process.send_signal(number)
    assert stopped.process.wait(timeout=10) == -number


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_is_never_having_stopped(tiny, long_uninterrupted, command, tmp_path):
    rng = random.Random(0)
    for step in (1, rng.randrange(5, 30), rng.randrange(30, 55)):
        killed = command(tiny, in_dir(tmp_path), *LONG)
        killed.wait_for_step(tmp_path, step)
        time.sleep(rng.random() * 0.2)
        killed.process.kill()
        killed.finish()
    assert command(tiny, in_dir(tmp_path), *LONG).finish() == 0
    assert read_losses(tmp_path) == long_uninterrupted


@pytest.mark.slow
def test_two_processes_are_one_and_one_goes_on_with_what_two_began(tiny, command, tmp_path):
    """Two devices, as two processes or as one: the same sums, but for the order in which devices are added up."""
    one = {"without": ("XLA_FLAGS",), "JAX_NUM_CPU_DEVICES": "2"}
    launcher = ("launch/local.sh", "2", sys.executable, "-m", "slmjax")
    two = {"without": ("XLA_FLAGS",), "JAX_NUM_CPU_DEVICES": "1", "program": launcher}

    alone = command(tiny, in_dir(tmp_path / "one"), *LONG, **one)
    assert alone.finish() == 0, alone.err
    expected = read_losses(tmp_path / "one")

    stopped = command(tiny, in_dir(tmp_path / "two"), *LONG, **two)
    stopped.wait_for_step(tmp_path / "two", 10)
    stopped.process.send_signal(signal.SIGTERM)
    assert stopped.finish() == 75, stopped.err
    assert {f"[{rank}] SIGTERM: saving a checkpoint, then stopping" for rank in "01"} <= set(stopped.err.splitlines())
    saved = max(int(name) for name in checkpoints_in(tmp_path / "two"))
    assert 10 <= saved < 60
    shutil.copytree(tmp_path / "two", tmp_path / "mixed")

    again = command(tiny, in_dir(tmp_path / "two"), *LONG, **two)
    assert again.finish() == 0, again.err
    mixed = command(tiny, in_dir(tmp_path / "mixed"), *LONG, **one)
    assert mixed.finish() == 0, mixed.err

    for run_dir in (tmp_path / "two", tmp_path / "mixed"):
        losses = read_losses(run_dir)
        assert losses.keys() == expected.keys()
        for key, value in losses.items():
            # Adam carries a difference in the last place of a gradient on from step to step.
            assert value == pytest.approx(expected[key], rel=1e-3), key
        assert losses[1, "loss"] == pytest.approx(expected[1, "loss"], rel=1e-6)
