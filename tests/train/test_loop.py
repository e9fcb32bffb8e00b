"""A whole run in this process: what it writes, what it refuses, and how it ends."""

import json

import jax
import numpy as np
import pytest
from tiny_run import read_losses, read_metrics, train_here, write_store, write_tiny_run

from slmjax.config.resolved import from_json
from slmjax.data.exclusive import only_user
from slmjax.data.tokenizer import Tokenizer
from slmjax.gin_loader import load
from slmjax.parallel.mesh import make_mesh
from slmjax.train import loop
from slmjax.train.checkpoint import restore_params
from slmjax.train.guard import TrainingDiverged
from slmjax.train.state import abstract_state, build_optimizer
from slmjax.train.throughput import Meter

pytestmark = [pytest.mark.usefixtures("compiled_once"), pytest.mark.multidevice]

# Enough for a run that is refused, or looked at from outside.
SHORT = (
    "RunConfig.steps = 3",
    "second/MixtureStageConfig.start_step = 2",
    "EvaluationConfig.every_steps = None",
)


def load_params(directory, abstract_params, **kwargs):
    return restore_params(directory, abstract_params, **kwargs).state["params"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The config file of a run, with its data."""
    return write_tiny_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def finished(tiny):
    """The directory of a run that was never stopped, and its outcome."""
    outcome = train_here(tiny)
    return tiny.parent / "run", outcome


def in_dir(path):
    return f"RunConfig.output_dir = {str(path)!r}"


def params_in(run_dir, config_file, *, step=None):
    run = load([config_file]).config
    abstract = abstract_state(run, build_optimizer(run)[0], make_mesh(run.mesh))
    return jax.device_get(load_params(run_dir / "checkpoints", abstract.params, step=step))


def checkpoints_in(run_dir):
    return sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir())


def test_run_directory(finished, tiny):
    run_dir, outcome = finished
    run = load([tiny]).config
    assert (outcome.step, outcome.interrupted) == (12, False)
    # What is in the directory is enough to make the run again.
    assert load([run_dir / "config.gin"]).config == run
    assert from_json(json.loads((run_dir / "config.json").read_text())) == run
    versions = json.loads((run_dir / "versions.json").read_text())
    assert versions["jax"] == jax.__version__
    assert versions["devices"] == "8 x cpu"
    assert checkpoints_in(run_dir) == [9, 12]  # every third and the last; the newest two are kept
    lines = read_metrics(run_dir)
    training = {line["step"]: line for line in lines if "loss" in line}
    held_out = {line["step"]: line for line in lines if "held_out/bits_per_byte" in line}
    assert sorted(training) == list(range(1, 13))
    assert sorted(held_out) == [4, 8, 12]
    assert len(lines) == 15
    assert training[12]["loss"] < training[1]["loss"]
    assert held_out[12]["held_out/loss"] < held_out[4]["held_out/loss"]
    assert {"grad_norm", "learning_rate", "total_skips", "tokens_per_second", "step_seconds"} <= training[12].keys()
    assert outcome.metrics.items() >= held_out[12].items() - {("step", 12)}


def test_a_finished_run_started_again_stays_as_it_is(finished, tiny):
    run_dir, _ = finished
    losses, params = read_losses(run_dir), params_in(run_dir, tiny)
    again = train_here(tiny)
    assert (again.step, again.interrupted) == (12, False)
    assert checkpoints_in(run_dir) == [9, 12]
    assert read_losses(run_dir) == losses
    jax.tree.map(np.testing.assert_array_equal, params_in(run_dir, tiny), params)


def test_keep_every(tiny, tmp_path):
    train_here(
        tiny,
        in_dir(tmp_path),
        "CheckpointConfig.every_steps = 2",
        "CheckpointConfig.keep_last = 1",
        "CheckpointConfig.keep_every_steps = 4",
        "CheckpointConfig.asynchronous = False",
    )
    assert checkpoints_in(tmp_path) == [4, 8, 12]


def test_console(tiny, tmp_path, capsys):
    train_here(tiny, in_dir(tmp_path), *SHORT, "TrackingConfig.console = True", "TrackingConfig.log_every_steps = 2")
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3", "3/3"]  # the first and the last always
    assert "held_out/bits_per_byte" in lines[-1]


REFUSED = {
    "another model": ("FeedForwardConfig.hidden = 48", "holds a run with another model"),
    "another mixture": ("a/TokenSourceConfig.weight = 3.0", "holds a run with another input"),
    "another seed": ("RunConfig.seed = 1", "holds a run with another seed"),
    "another start": ("RunConfig.init_from = 'elsewhere'", "holds a run with another init_from"),
    "fewer steps": ("RunConfig.steps = 11", "of step 12, beyond RunConfig.steps 11"),
    "another optimizer": (
        "RunConfig.optimizer = @MuonConfig()\nMuonConfig.peak_lr = 0.1\nMuonConfig.adamw = @AdamWConfig()",
        "saved by another model or optimizer",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_a_directory_of_another_run_is_refused_and_left_alone(finished, tiny, change, message):
    run_dir, _ = finished
    before = {path: path.read_bytes() for path in run_dir.glob("*.*")}
    with pytest.raises(ValueError, match=message):
        train_here(tiny, *change.splitlines())
    assert {path: path.read_bytes() for path in run_dir.glob("*.*")} == before
    assert checkpoints_in(run_dir) == [9, 12]


def test_a_directory_has_one_writer(finished, tiny):
    with only_user(finished[0]), pytest.raises(ValueError, match="another process is writing"):
        train_here(tiny)


def test_what_does_not_make_another_run_may_change(finished, tiny, tmp_path):
    """More steps, another learning rate, another precision: the run goes on where it was."""
    run_dir, _ = finished
    (tmp_path / "checkpoints").mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((run_dir / name).read_bytes())
    (run_dir / "checkpoints" / "12").rename(tmp_path / "checkpoints" / "12")
    changes = (
        "RunConfig.steps = 14",
        "AdamWConfig.peak_lr = 0.001",
        "ExecutionConfig.compute_dtype = 'bfloat16'",
        "EvaluationConfig.every_steps = None",
        "MeshConfig.data = 2",
    )
    try:
        outcome = train_here(tiny, in_dir(tmp_path), *changes)
    finally:
        (tmp_path / "checkpoints" / "12").rename(run_dir / "checkpoints" / "12")
    assert outcome.step == 14
    training = [line for line in read_metrics(tmp_path) if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, 15))
    assert training[12]["learning_rate"] < 0.001 < training[9]["learning_rate"]
    assert training[12]["loss"] < training[9]["loss"]


def test_a_run_goes_on_although_fields_were_added_since(finished, tiny):
    """They have their defaults, with which the run was made."""
    run_dir, _ = finished
    path = run_dir / "config.json"
    before = path.read_text()
    older = json.loads(before)
    for part, name in ((older["model"], "logit_scale"), (older["input"], "document_isolation"), (older, "init_from")):
        del part[name]
    path.write_text(json.dumps(older))
    try:
        assert train_here(tiny).step == 12
    finally:
        path.write_text(before)


def test_a_start_that_failed_does_not_claim_the_directory(tiny, tmp_path):
    with pytest.raises(ValueError, match="is not a token store"):
        train_here(tiny, in_dir(tmp_path), *SHORT, "a/TokenSourceConfig.path = 'nowhere'")
    assert train_here(tiny, in_dir(tmp_path), *SHORT).step == 3


@pytest.fixture(scope="module")
def foreign(tiny):
    """A store of another tokenizer."""
    root = tiny.parent
    write_store(
        root / "foreign", ["def f(): pass"], Tokenizer.load(root / "tokenizer.model"), tokenizer_sha256="f" * 64
    )
    return root / "foreign"


@pytest.mark.parametrize("source", ["a", "held_out"])
def test_a_store_of_another_tokenizer_is_refused_before_the_first_step(tiny, foreign, tmp_path, source):
    with pytest.raises(ValueError, match="foreign was written with the tokenizer ffff"):
        train_here(tiny, in_dir(tmp_path / "run"), *SHORT, f"{source}/TokenSourceConfig.path = {str(foreign)!r}")
    assert list((tmp_path / "run").glob("*")) == []


def test_a_held_out_set_that_cannot_be_read_is_refused_before_the_first_step(tiny, tmp_path):
    with pytest.raises(ValueError, match="stride 33 of evaluation set 'held_out' exceeds the sequence_length 32"):
        train_here(tiny, in_dir(tmp_path / "run"), "EvalSetConfig.stride = 33")
    assert list((tmp_path / "run").glob("*")) == []


def test_a_vocabulary_larger_than_the_model_s_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"340 ids, but ModelConfig.vocab_size is 339; it must be at least as large"):
        train_here(tiny, in_dir(tmp_path), "ModelConfig.vocab_size = 339")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("InputConfig.batch_size = 12", "batch_size 12 is not a multiple of 8 devices"),
        ("ExecutionConfig.microbatches = 2", "batch_size 8 is not a multiple of 8 devices times .*microbatches 2"),
        ("MeshConfig.data = 3", "8 devices cannot be divided by 3"),
    ],
)
def test_batches_that_cannot_be_divided_are_refused(tiny, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        train_here(tiny, in_dir(tmp_path), change)


def test_init_from_takes_the_parameters_and_nothing_else(finished, tiny, tmp_path):
    run_dir, _ = finished
    # With this learning rate nothing moves, so the parameters after the first step are those that it began with.
    changes = (*SHORT, f"RunConfig.init_from = {str(run_dir)!r}", "AdamWConfig.peak_lr = 1e-30")
    train_here(tiny, in_dir(tmp_path), *changes)
    jax.tree.map(np.testing.assert_array_equal, params_in(tmp_path, tiny), params_in(run_dir, tiny))
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 3]
    assert lines[0]["learning_rate"] == pytest.approx(0.5e-30)  # warm-up from the start
    before = [line for line in read_metrics(run_dir) if line["step"] == 12][-1]
    assert lines[-1] == before | {"step": 3}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (("RunConfig.init_from = '/nowhere'",), OSError, "no finished checkpoint in /nowhere/checkpoints"),
        (("RunConfig.init_from = '{run_dir}'", "ModelConfig.width = 24"), ValueError, r"another model: .*\(352, 16\)"),
    ],
)
def test_init_from_something_else_is_refused(finished, tiny, tmp_path, change, error, message):
    changes = [each.format(run_dir=finished[0]) for each in change]
    with pytest.raises(error, match=message):
        train_here(tiny, in_dir(tmp_path), *changes)


def test_divergence_stops_the_run_with_good_checkpoints(tiny, tmp_path):
    """The first updates overflow the parameters, and from then on every step is bad."""
    overflow = (in_dir(tmp_path), "AdamWConfig.peak_lr = 1e38", "CheckpointConfig.every_steps = 1")
    with pytest.raises(TrainingDiverged, match="3 bad steps in a row"):
        train_here(tiny, *overflow, "GuardConfig.max_consecutive_skips = 3")
    lines = read_metrics(tmp_path)
    assert lines[-1]["total_skips"] == 2
    assert lines[-1]["grad_norm"] is None
    with pytest.raises(TrainingDiverged, match="'stop'"):
        train_here(tiny, *overflow, "GuardConfig.on_bad_step = 'stop'")


def trace_files(run_dir):
    return list((run_dir / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("steps", [(1, 2), (1, 100)])
def test_profile(tiny, tmp_path, steps):
    """Also where the run ends before the trace does."""
    train_here(tiny, in_dir(tmp_path), *SHORT, f"TrackingConfig.profile_steps = {steps}")
    (trace,) = trace_files(tmp_path)
    assert trace.stat().st_size > 10_000


def test_evaluation_and_saving_are_no_step_time(tiny, tmp_path, monkeypatch):
    """By a clock that moves only when the run evaluates or saves."""
    now = [0.0]

    def slow(function):
        def call(*args, **kwargs):
            now[0] += 1000.0
            return function(*args, **kwargs)

        return call

    def ticking_meter(**arguments):
        def clock():
            now[0] += 0.001
            return now[0]

        return Meter(**arguments, clock=clock, process_seconds=0.0)

    monkeypatch.setattr(loop, "Meter", ticking_meter)
    monkeypatch.setattr(loop, "evaluate_all", slow(loop.evaluate_all))
    monkeypatch.setattr(loop.Checkpointer, "save", slow(loop.Checkpointer.save))
    train_here(tiny, in_dir(tmp_path), "CheckpointConfig.every_steps = 4")
    assert now[0] > 6000
    seconds = [line["step_seconds"] for line in read_metrics(tmp_path) if "step_seconds" in line]
    assert len(seconds) == 11
    assert max(seconds) < 0.1
    goodput = [line["goodput"] for line in read_metrics(tmp_path) if "goodput" in line]
    assert goodput[-1] < 0.01


def test_versions_without_git(monkeypatch):
    def no_git(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(loop.subprocess, "run", no_git)
    assert loop.versions()["commit"] == "unknown"
