"""The training loop, in the order things happen: build, restore, step, log, evaluate, save, stop."""

import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

import slmjax
from slmjax import files, model
from slmjax.config import RunConfig
from slmjax.config.resolved import from_json
from slmjax.data.batch import Batch
from slmjax.data.exclusive import only_user
from slmjax.data.loader import eval_batches, make_loader
from slmjax.data.tokenizer import Tokenizer
from slmjax.evaluate.likelihood import evaluate_all
from slmjax.parallel.mesh import make_mesh, on_mesh
from slmjax.parallel.rules import constrain, host_batch_to_global, process_rows
from slmjax.train import guard
from slmjax.train.checkpoint import Checkpointer, restore_params
from slmjax.train.compiler import compiler_options
from slmjax.train.restore import require_tokenizer
from slmjax.train.state import TrainState, abstract_state, build_optimizer, init_state
from slmjax.train.step import make_train_step
from slmjax.train.throughput import Meter
from slmjax.train.tracking import make_tracker

logger = logging.getLogger(__name__)

# Changing one of these in a run that has checkpoints would make it another run.
_FIXED_FIELDS = ("model", "input", "seed", "init_from")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended.

    Attributes:
      step: updates made, also by earlier calls.
      interrupted: whether a signal ended it; the state is saved, and the same command goes on.
      metrics: of the last logged step and the last evaluation.
    """

    step: int
    interrupted: bool
    metrics: dict[str, float]


def train(run: RunConfig, *, config_text: str, config_json: Any) -> Outcome:
    """Trains `run` from its newest checkpoint, or from the start.

    Args:
      run: the run.
      config_text: the config as one Gin file, kept in the run directory and in every checkpoint.
      config_json: the resolved config as JSON values, likewise.

    Raises:
      ValueError: the run directory belongs to another config, stores and tokenizer do not fit together, or the batch
        cannot be divided.
      CheckpointError: there are checkpoints, but none is whole; or one could not be written.
      TrainingDiverged: the guard stopped the run.
    """
    mesh = make_mesh(run.mesh)
    output_dir = Path(run.output_dir)
    tokenizer = _matching_tokenizer(run)
    if run.input.batch_size % (mesh.size * run.execution.microbatches):
        raise ValueError(
            f"InputConfig.batch_size {run.input.batch_size} is not a multiple of {mesh.size} devices times "
            f"ExecutionConfig.microbatches {run.execution.microbatches}; change one of them"
        )
    with contextlib.ExitStack() as held:
        if jax.process_index() == 0:
            held.enter_context(only_user(output_dir))
        return _train(run, mesh, tokenizer, config_text=config_text, config_json=config_json)


def _train(run: RunConfig, mesh: Mesh, tokenizer: Tokenizer, *, config_text: str, config_json: Any) -> Outcome:
    output_dir = Path(run.output_dir)
    optimizer, schedule = build_optimizer(run)
    abstract = abstract_state(run, optimizer, mesh)
    checkpointer = Checkpointer(output_dir / "checkpoints", run.checkpoint)
    if checkpointer.steps():
        _require_same_run(output_dir, run)
    state, start_step = _initial_state(run, optimizer, abstract, checkpointer, tokenizer)
    if start_step > run.steps:
        raise ValueError(
            f"the newest checkpoint in {output_dir} is of step {start_step}, beyond RunConfig.steps {run.steps}; "
            "give at least as many steps, or another RunConfig.output_dir"
        )

    train_step = jax.jit(
        on_mesh(mesh, make_train_step(run, optimizer, schedule, constrain(mesh))),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, abstract), None),
        compiler_options=compiler_options(jax.default_backend(), run.execution),
    )
    batches = make_loader(
        run.input,
        seed=run.seed,
        start_step=start_step,
        steps=run.steps,
        rows=process_rows(run.input.batch_size, mesh),
        tokenizer_sha256=tokenizer.sha256,
    )
    description = {"config": config_text, "config_json": config_json, "versions": versions()}
    _describe_run(output_dir, **description)
    tracker = make_tracker(
        run.tracking, output_dir, total_steps=run.steps, resume_step=start_step, config_json=config_json
    )
    save = _Saver(checkpointer, {**description, "tokenizer_sha256": tokenizer.sha256}, start_step)
    log = _Log(run, tracker, mesh)
    profile = _Profile(run, output_dir, finish=log.flush)
    evaluate = partial(evaluate_all, run_config=run, mesh=mesh, tokenizer_sha256=tokenizer.sha256)
    try:
        with _StopSignal() as stop:
            for step, batch in _numbered(batches, start_step, log.meter):
                profile.before(step)
                state, metrics = train_step(state, host_batch_to_global(batch, mesh))
                # The metrics of the step before: while they are read, the device works on this one.
                log.step(step, metrics, batch)
                done = step + 1
                if _due(done, run.evaluation.every_steps) and done < run.steps:
                    log.evaluation(done, partial(evaluate, state.params))
                interrupted = stop.requested(synchronise=_due(done, run.tracking.log_every_steps))
                if interrupted or done == run.steps or _due(done, run.checkpoint.every_steps):
                    log.flush()
                    with log.meter.paused():
                        save(done, state)
                if interrupted:
                    return Outcome(done, True, log.latest)
            log.flush()
            profile.stop()
            if run.evaluation.sets:
                log.evaluation(run.steps, partial(evaluate, state.params))
            return Outcome(run.steps, False, log.latest)
    finally:
        profile.stop()
        tracker.close()
        checkpointer.close()  # waits for the last save


def versions() -> dict[str, str]:
    """Returns what one needs to know to repeat a run: code, libraries, Python and hardware."""
    found = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "grain", "numpy")}
    return {
        "slmjax": slmjax.__version__,
        "commit": _commit(),
        **found,
        "python": platform.python_version(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "command": " ".join(sys.argv),
    }


def _commit() -> str:
    """Returns the commit of this file's repository, with "-dirty" if files of it have changed since."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    except OSError:  # no git here
        return "unknown"


def _matching_tokenizer(run: RunConfig) -> Tokenizer:
    """Returns the run's tokenizer; refuses one that does not fit the model, and held-out sets that cannot be read."""
    tokenizer = Tokenizer.load(run.input.tokenizer)
    if tokenizer.vocab_size > run.model.vocab_size:
        raise ValueError(
            f"the tokenizer {run.input.tokenizer} has {tokenizer.vocab_size} ids, but ModelConfig.vocab_size is "
            f"{run.model.vocab_size}; it must be at least as large"
        )
    for eval_set in run.evaluation.sets:  # for its errors, which should not wait for the first evaluation
        eval_batches(
            eval_set, batch_size=1, sequence_length=run.input.sequence_length, tokenizer_sha256=tokenizer.sha256
        )
    return tokenizer


def _require_same_run(output_dir: Path, run: RunConfig) -> None:
    """Refuses to go on with the checkpoints of another run."""
    # Built anew, so that a field that did not exist when it was saved has its default.
    saved = output_dir / "config.json"
    try:
        before = from_json(json.loads(saved.read_text(encoding="utf-8")))
    except (ValueError, OSError) as error:
        raise ValueError(f"{saved} cannot be read, so nothing says whose checkpoints these are: {error}") from error
    if not isinstance(before, RunConfig):
        raise ValueError(f"{saved} does not hold the config of a run")
    changed = [name for name in _FIXED_FIELDS if getattr(before, name) != getattr(run, name)]
    if changed:
        raise ValueError(
            f"{output_dir} holds a run with another {', '.join(changed)}; choose another RunConfig.output_dir, "
            "or remove it to start anew"
        )


def _describe_run(output_dir: Path, *, config: str, config_json: Any, versions: dict[str, str]) -> None:
    """Writes into the run directory what one needs to know to repeat the run."""
    if jax.process_index() == 0:
        output_dir.mkdir(parents=True, exist_ok=True)
        for name, text in (
            ("config.gin", config),
            ("config.json", json.dumps(config_json, indent=1) + "\n"),
            ("versions.json", json.dumps(versions, indent=1) + "\n"),
        ):
            files.write_text(output_dir / name, text)


def _initial_state(
    run: RunConfig, optimizer, abstract: TrainState, checkpointer: Checkpointer, tokenizer: Tokenizer
) -> tuple[TrainState, int]:
    """Returns the newest good checkpoint's state, else parameters of `init_from`, else random ones."""
    restored = checkpointer.restore(abstract)
    if restored is not None:
        require_tokenizer(restored, tokenizer, run.output_dir)
        logger.info("resuming at step %d", restored.step)
        return restored.state, restored.step
    params = None
    if run.init_from is not None:
        base = restore_params(Path(run.init_from) / "checkpoints", abstract.params)
        require_tokenizer(base, tokenizer, run.init_from)
        params = base.state["params"]
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    start = jax.jit(partial(init_state, run, optimizer), donate_argnums=0, out_shardings=shardings)
    return start(params), 0


def _numbered(batches, start_step: int, meter: Meter) -> Iterator[tuple[int, Any]]:
    """Yields (step, batch), counting the time spent waiting for input."""
    batches = iter(batches)
    step = start_step
    while True:
        with meter.waiting_for_input():
            batch = next(batches, None)
        if batch is None:
            return
        yield step, batch
        step += 1


def _visible_keys(batch: Batch, window: int | None) -> float:
    """Returns the mean number of keys that a query of this batch sees."""
    if batch.documents is None:
        return model.causal_visible_keys(batch.tokens.shape[1], window)
    return model.packed_visible_keys(batch.documents, window)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


class _Profile:
    """Traces the steps of `TrackingConfig.profile_steps` that this process makes; `finish` waits for the device."""

    def __init__(self, run: RunConfig, output_dir: Path, *, finish: Callable[[], None]):
        self._steps = range(*(run.tracking.profile_steps or (0, 0)))
        self._directory, self._finish, self._running = output_dir / "profile", finish, False

    def before(self, step: int) -> None:
        """Starts or stops the trace as `step` is the first or comes after the last."""
        if (step in self._steps) != self._running:
            self._finish()
            if self._running:
                self.stop()
            else:
                # Without Python's calls: they are most of a trace's size, and following them through threads that start
                # and end meanwhile, as those of checkpoints do, has crashed the interpreter.
                options = jax.profiler.ProfileOptions()
                options.python_tracer_level = 0
                jax.profiler.start_trace(self._directory, profiler_options=options)
                self._running = True

    def stop(self) -> None:
        """Writes the trace, if one is under way."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


class _Saver:
    """Saves a step once, with the position in the data, which is the number of batches read."""

    def __init__(self, checkpointer: Checkpointer, extra: dict, start_step: int):
        self._checkpointer, self._extra, self._last = checkpointer, extra, start_step

    def __call__(self, step: int, state: TrainState) -> None:
        if step != self._last:
            self._checkpointer.save(step, state, {**self._extra, "data_position": {"next_batch": step}})
            self._last = step


class _Log:
    """Turns the metrics of steps into lines for the trackers, one step behind the device."""

    def __init__(self, run: RunConfig, tracker, mesh: Mesh):
        self.latest: dict[str, float] = {}
        self.meter = Meter(num_devices=mesh.size, device_kind=mesh.devices.flat[0].device_kind)
        self._run, self._tracker = run, tracker
        self._pending: tuple[int, dict, Any] | None = None

    def step(self, step: int, metrics: dict, batch: Any) -> None:
        """Takes over the metrics of `step`, and reads and logs those of the step before."""
        self.flush()
        self._pending = (step, metrics, batch)

    def flush(self) -> None:
        """Waits for the step in hand, checks it and logs it if it is due."""
        if self._pending is None:
            return
        (step, device_metrics, batch), self._pending = self._pending, None
        metrics = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
        guard.check(self._run.guard, step=step, metrics=metrics)
        self.meter.step(tokens=self._run.input.tokens_per_step)
        if step == 0 or _due(step + 1, self._run.tracking.log_every_steps) or step + 1 == self._run.steps:
            flops = model.flops_per_token(self._run.model, partial(_visible_keys, batch))
            metrics |= self.meter.read(flops_per_token=flops)
            self._log(step + 1, metrics)

    def evaluation(self, step: int, evaluate: Callable[[], dict[str, float]]) -> None:
        """Evaluates after `step` updates and logs it; its time does not count as training."""
        self.flush()
        with self.meter.paused():
            self._log(step, evaluate())

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        self.latest |= metrics
        self._tracker.log(step, metrics)


class _StopSignal:
    """Notes SIGTERM and SIGINT so that the loop can save and end; a second signal ends the process at once."""

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __enter__(self) -> "_StopSignal":
        self._received = False
        self._previous = {number: signal.signal(number, self._note) for number in self._SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python

    def _note(self, number: int, frame) -> None:
        self._received = True
        for each in self._SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        print(f"\n{signal.Signals(number).name}: saving a checkpoint, then stopping", file=sys.stderr, flush=True)

    def requested(self, *, synchronise: bool) -> bool:
        """Returns whether to stop. Several processes agree when `synchronise`, at the same step on each."""
        if jax.process_count() == 1:
            return self._received
        return synchronise and bool(np.any(multihost_utils.process_allgather(np.array(self._received))))


__all__ = ["Outcome", "train", "versions"]
