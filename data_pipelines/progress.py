"""What a person sees while a pipeline runs, and timings.json: the one output that differs from run to run."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from data_pipelines import files
from data_pipelines.manifest import Manifest
from data_pipelines.tasks import Done


class Step:
    """Counts the tasks of one step as they are done."""

    def __init__(self, bar: Progress, num_tasks: int, name: str):
        self._bar = bar
        self._name = name
        self._id = bar.add_task(name, total=num_tasks)
        self.bytes = 0
        self.num_skipped = 0
        self.note = ""

    def advance(self, done: Done) -> None:
        """Counts one task; `bytes` of its result are the text that it went through."""
        self._bar.advance(self._id)
        if done.seconds is None:
            self.num_skipped += 1
        else:
            self.bytes += done.result.get("bytes", 0)

    def phase(self, name: str, num_tasks: int) -> None:
        """Shows a part of the step that has tasks of its own."""
        self._bar.reset(self._id, total=num_tasks, description=f"{self._name}: {name}")

    def advance_phase(self, done: Done) -> None:
        """Counts one task of such a part."""
        self._bar.advance(self._id)


class Reporter:
    """Prints a line for every step, and the funnel at the end; writes timings.json after every step."""

    def __init__(self, console: Console, timings_path: Path):
        self._console = console
        self._path = timings_path
        self._earlier: dict[str, dict[str, float | int | None]] = {}
        with contextlib.suppress(OSError, ValueError):  # absent or damaged
            earlier = json.loads(timings_path.read_text(encoding="utf-8"))
            self._earlier = earlier if isinstance(earlier, dict) else {}
        self._timings: dict[str, dict[str, float | int | None]] = {}

    @contextlib.contextmanager
    def step(self, name: str, num_tasks: int) -> Iterator[Step]:
        """Shows a bar while the step runs, then a line with its time, its rate and its `note`."""
        started = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal) as bar:
            step = Step(bar, num_tasks, name)
            yield step
        seconds = time.monotonic() - started
        rate = step.bytes / seconds / 1e6 if step.bytes else None
        timing = {
            "seconds": round(seconds, 3),
            "megabytes_per_second": rate and round(rate, 2),
            "tasks": num_tasks,
            "tasks_done_before": step.num_skipped,
        }
        # A step with nothing to do keeps the timing of the run that did it.
        self._timings[name] = self._earlier.get(name, timing) if num_tasks == step.num_skipped else timing
        files.write_text(self._path, json.dumps(self._timings, indent=1) + "\n")
        shown_rate = "done before" if num_tasks == step.num_skipped else f"{rate:.1f} MB/s" if rate else ""
        line = f"{name:<20} {seconds:6.1f} s  {shown_rate:>12}  {step.note}".rstrip()
        self._console.print(line, highlight=False, soft_wrap=True)

    def summary(self, manifest: Manifest, root: Path) -> None:
        """Prints the funnel and the sizes of the stores."""
        table = Table(title=escape(str(root)), title_justify="left")
        for heading in ("step", "source", "documents", "MB", "dropped"):
            table.add_column(heading, justify="right" if heading in ("documents", "MB") else "left", overflow="fold")
        for step in manifest.steps:
            dropped = ", ".join(f"{count:,} {reason}" for reason, count in step.dropped.items())
            kept = step.kept
            table.add_row(step.step, escape(step.source), f"{kept.documents:,}", f"{kept.bytes / 1e6:,.2f}", dropped)
        self._console.print(table)
        for name, split in manifest.splits.items():
            self._console.print(
                f"{name}: {split.documents:,} documents, {split.bytes / 1e6:,.2f} MB, {split.tokens:,} tokens, "
                f"{split.bytes_per_token:.2f} bytes a token",
                highlight=False,
                soft_wrap=True,
            )
