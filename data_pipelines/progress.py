"""What a person sees while a pipeline runs, and timings.json: the one output that differs from run to run."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.progress import Task as Bar
from rich.table import Table
from rich.text import Text

from data_pipelines.manifest import Manifest
from data_pipelines.tasks import Done, Task
from slmjax import files

_LINE_EVERY = 30.0  # seconds between lines where there is no terminal to draw a bar on


class _Phase:
    """Tasks that are counted together: how many, of how many bytes, and what of them was done now or before."""

    def __init__(self, name: str, num_tasks: int, size: int):
        self.name = name
        self.started = time.monotonic()
        self.num_tasks, self.size = num_tasks, size
        self.num_done = self.num_skipped = 0
        self.size_done = self.size_skipped = 0
        self.bytes = self.documents = 0

    def advance(self, done: Done) -> None:
        self.num_done += 1
        self.size_done += done.extent.bytes
        if done.seconds is None:
            self.num_skipped += 1
            self.size_skipped += done.extent.bytes
        else:
            self.bytes += done.result.get("bytes", done.extent.bytes)
            self.documents += done.result.get("documents", done.extent.documents)

    @property
    def share(self) -> float:
        """How much is done, by bytes where they are known."""
        done, everything = (self.size_done, self.size) if self.size else (self.num_done, self.num_tasks)
        return min(done / everything, 1.0) if everything else 1.0

    def seconds_left(self) -> float | None:
        """At the speed so far; None before anything was done."""
        by_bytes = (self.size, self.size_done, self.size_skipped)
        everything, done, before = by_bytes if self.size else (self.num_tasks, self.num_done, self.num_skipped)
        if done <= before:
            return None
        return (time.monotonic() - self.started) * max(everything - done, 0) / (done - before)

    def facts(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-9)
        left = self.seconds_left()
        told = [f"{self.share:4.0%}", f"{self.num_done:,}/{self.num_tasks:,} tasks"]
        told += [f"{self.bytes / seconds / 1e6:,.1f} MB/s"] if self.bytes else []
        told += [f"{self.documents / seconds:,.0f} docs/s"] if self.documents else []
        return ", ".join([*told, f"{_clock(seconds)} so far" if left is None else f"{_clock(left)} left"])


class Step:
    """Counts the tasks of one step, or of each of its phases, as they are done."""

    def __init__(self, name: str, num_tasks: int, size: int = 0):
        self._name = name
        self.phases = [_Phase(name, num_tasks, size)]
        self.note = ""

    def advance(self, done: Done) -> None:
        """Counts one task; `bytes` and `documents` of its result are what it went through."""
        self.phases[-1].advance(done)

    def phase(self, name: str, planned: Sequence[Task]) -> None:
        """Begins a part of the step that has tasks of its own."""
        size = sum(task.extent.bytes for task in planned)
        self.phases.append(_Phase(f"{self._name}: {name}", len(planned), size))

    @property
    def done_before(self) -> bool:
        """Whether earlier runs had done everything."""
        return all(phase.num_done == phase.num_skipped for phase in self.phases)

    def most(self, kind: str) -> int:
        """The bytes or documents of the phase that went through the most of them: phases go through the same texts."""
        return max(getattr(phase, kind) for phase in self.phases)


class _StepColumn(ProgressColumn):
    """What the step that is under way has to say."""

    def __init__(self, step: Step):
        super().__init__()
        self._step = step

    def render(self, task: Bar) -> Text:
        return Text(self._step.phases[-1].facts(), no_wrap=True)


class Reporter:
    """Prints a line for every step, and the funnel at the end; writes timings.json around every step.

    timings.json names the steps that this run has finished, in order.
    """

    def __init__(self, console: Console, timings_path: Path, *, line_every: float = _LINE_EVERY):
        self._console = console
        self._path = timings_path
        self._line_every = line_every
        self._earlier: dict[str, dict[str, float | int | None]] = {}
        with contextlib.suppress(OSError, ValueError):  # absent or damaged
            earlier = json.loads(timings_path.read_text(encoding="utf-8"))
            self._earlier = earlier if isinstance(earlier, dict) else {}
        self._timings: dict[str, dict[str, float | int | None]] = {}

    @contextlib.contextmanager
    def step(self, name: str, num_tasks: int, size: int = 0) -> Iterator[Step]:
        """Shows a bar while the step runs, then a line with its time, its rate and its `note`.

        `size` is what its tasks go through, in the bytes of their extents; 0 counts tasks instead. Where the console is
        no terminal there is a line every half minute instead of the bar.
        """
        self._save()
        started = time.monotonic()
        step = Step(name, num_tasks, size)
        with self._bar(step) if self._draws else self._lines(step):
            yield step
        seconds = time.monotonic() - started
        text_bytes, documents = step.most("bytes"), step.most("documents")
        timing = {
            "seconds": round(seconds, 3),
            "megabytes_per_second": round(text_bytes / seconds / 1e6, 2) if text_bytes else None,
            "documents_per_second": round(documents / seconds, 1) if documents else None,
            "tasks": sum(phase.num_tasks for phase in step.phases),
            "tasks_done_before": sum(phase.num_skipped for phase in step.phases),
        }
        # A step with nothing to do keeps the timing of the run that did it.
        self._timings[name] = self._earlier.get(name, timing) if step.done_before else timing
        self._save()
        rates = f"{text_bytes / seconds / 1e6:8.1f} MB/s" if text_bytes else " " * 13
        rates += f" {documents / seconds:9,.0f} docs/s" if documents else " " * 17
        rates = f"{'done before':>13}{'':17}" if step.done_before else rates
        self._print(f"{name:<20} {seconds:6.1f} s {rates}  {step.note}".rstrip())

    @property
    def _draws(self) -> bool:
        return self._console.is_terminal and not self._console.is_dumb_terminal

    @contextlib.contextmanager
    def _bar(self, step: Step) -> Iterator[None]:
        width = min(max(self._console.width - 90, 5), 40)  # the words come first
        columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=width), _StepColumn(step))
        with Progress(*columns, console=self._console, transient=True) as bar:
            shown = bar.add_task(step.phases[-1].name, total=1.0)

            def draw() -> None:
                phase = step.phases[-1]
                bar.update(shown, description=phase.name, completed=phase.share)

            with _repeatedly(draw, 0.2):
                yield

    @contextlib.contextmanager
    def _lines(self, step: Step) -> Iterator[None]:
        def write() -> None:
            self._print(f"{step.phases[-1].name:<20} {step.phases[-1].facts()}")

        with _repeatedly(write, self._line_every):
            yield

    def _print(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)

    def _save(self) -> None:
        files.write_text(self._path, json.dumps(self._timings, indent=1) + "\n")

    def summary(self, manifest: Manifest, root: Path) -> None:
        """Prints the funnel and the sizes of the stores."""
        table = Table(title=Text(str(root)), title_justify="left")
        for heading in ("step", "source", "documents", "MB", "dropped"):
            table.add_column(heading, justify="right" if heading in ("documents", "MB") else "left", overflow="fold")
        for step in manifest.steps:
            dropped = ", ".join(f"{count:,} {reason}" for reason, count in step.dropped.items())
            kept = step.kept
            cells = (step.step, step.source, f"{kept.documents:,}", f"{kept.bytes / 1e6:,.2f}", dropped)
            table.add_row(*map(Text, cells))
        self._console.print(table)
        for name, split in manifest.splits.items():
            self._print(
                f"{name}: {split.documents:,} documents, {split.bytes / 1e6:,.2f} MB, {split.tokens:,} tokens, "
                f"{split.bytes_per_token:.2f} bytes a token"
            )


@contextlib.contextmanager
def _repeatedly(function, seconds: float) -> Iterator[None]:
    """Calls a function every so often from a thread."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            function()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
