"""Where metrics go: a file always, the terminal, Weights & Biases. The only importer of wandb, and only when asked."""

import datetime
import logging
import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from slmjax import files
from slmjax.config import TrackingConfig, WandbConfig

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Takes the metrics of a step; `step` counts finished updates. A name with a slash is an evaluation's."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records `metrics` after `step` updates."""
        ...

    def close(self) -> None:
        """Writes out what is held back."""
        ...


def make_tracker(
    config: TrackingConfig, run_dir: os.PathLike | str, *, total_steps: int, resume_step: int, config_json: Any
) -> Tracker:
    """Returns the trackers that `config` asks for as one; on any process but the first, one that does nothing."""
    if jax.process_index() != 0:
        return _All([])
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    trackers: list[Tracker] = [JsonlTracker(run_dir / "metrics.jsonl", resume_step=resume_step)]
    if config.wandb is not None:
        trackers.append(WandbTracker(config.wandb, run_dir, config_json=config_json))
    if config.console:
        trackers.append(ConsoleTracker(total_steps=total_steps, resume_step=resume_step))
    return _All(trackers)


class _All:
    def __init__(self, trackers: Sequence[Tracker]):
        self._trackers = trackers

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


class JsonlTracker:
    """One JSON object a line, {"step": ..., metric: ...}, on disk as soon as it is logged. NaN and infinities are null.

    Lines of steps after `resume_step`, which will come again, are dropped from an existing file, and so are lines that
    a killed process left half written.
    """

    def __init__(self, path: Path, *, resume_step: int):
        if path.exists():
            lines = path.read_bytes().splitlines()
            kept = [line for line in lines if (step := _step_of(line)) is not None and step <= resume_step]
            with files.replacing(path) as partial:
                partial.write_bytes(b"".join(line + b"\n" for line in kept))
            if len(kept) < len(lines):
                logger.info("dropped %d lines after step %d from %s", len(lines) - len(kept), resume_step, path)
        self._file = path.open("ab")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a line."""
        self._file.write(orjson.dumps({"step": step, **metrics}, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _step_of(line: bytes) -> int | None:
    try:
        return int(orjson.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


class ConsoleTracker:
    """A progress bar that stays at the bottom of a terminal; plain lines where the output is no terminal."""

    def __init__(self, *, total_steps: int, resume_step: int, console: Console | None = None):
        self._total_steps = total_steps
        # soft_wrap: a file gets whole lines, whatever width rich imagines for it.
        self._console = console or Console(file=sys.stderr, soft_wrap=not sys.stderr.isatty())
        self._first: tuple[int, float] | None = None
        self._progress = None
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                console=self._console,
            )
            self._task = self._progress.add_task("train", total=total_steps, completed=resume_step, text="compiling")
            self._progress.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows the metrics of a step, or prints those of an evaluation for good."""
        evaluation = {name: value for name, value in metrics.items() if "/" in name}
        if evaluation:
            self._print(step, "  ".join(f"{name} {value:.4f}" for name, value in evaluation.items()))
        if "loss" not in metrics:
            return
        text = "  ".join([*_shown(metrics), f"eta {self._eta(step)}"])
        if self._progress is None:
            self._print(step, text)
        else:
            self._progress.update(self._task, completed=step, text=text)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._progress is not None:
            self._progress.stop()

    def _print(self, step: int, text: str) -> None:
        self._console.print(f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}  {text}", highlight=False)

    def _eta(self, step: int) -> str:
        """The rest at the pace since the first logged step, which had compiled by then."""
        now = time.monotonic()
        if self._first is None or step <= self._first[0]:
            self._first = (step, now)
            return "-"
        first_step, first_time = self._first
        seconds = (now - first_time) / (step - first_step) * (self._total_steps - step)
        return str(datetime.timedelta(seconds=round(seconds)))


def _shown(metrics: Mapping[str, float]) -> list[str]:
    formats = {
        "loss": "loss {:.4f}",
        "learning_rate": "lr {:.2e}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "mfu": "mfu {:.1%}",
    }
    shown = [form.format(metrics[name]) for name, form in formats.items() if name in metrics]
    return shown + ([f"skipped {metrics['total_skips']:.0f}"] if metrics.get("total_skips") else [])


class WandbTracker:
    """Weights & Biases. The id of the run is kept in <run_dir>/wandb_id, so that a resumed run continues its curves."""

    def __init__(self, config: WandbConfig, run_dir: Path, *, config_json: Any):
        import wandb
        import wandb.errors

        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                mode=config.mode,
                name=run_dir.name,
                id=id_file.read_text().strip(),
                resume="allow" if config.mode == "online" else None,
                dir=run_dir,
                config=config_json,
                settings=wandb.Settings(console="off", silent=config.mode == "offline"),
            )
        except wandb.errors.Error as error:
            raise RuntimeError(
                f"Weights & Biases could not start in mode {config.mode!r}: {error}. Run `wandb login`, set "
                "WANDB_API_KEY, or use WandbConfig.mode = 'offline', which needs no account"
            ) from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the metrics to those of the same step."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Ends the run; waits for the upload when online."""
        self._run.finish()
