"""Resumable tasks: a marker says from what a task's outputs were made, and a task with its marker is not repeated."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import slmjax
from data_pipelines.engines import Engine
from slmjax import files
from slmjax.config.resolved import to_json

_LIBRARIES = (
    "fastwarc",
    "ftfy",
    "numpy",
    "orjson",
    "py3langid",
    "pyarrow",
    "resiliparse",
    "sentencepiece",
    "zstandard",
)


class Extent(NamedTuple):
    """How much a task goes through, which is what rates and the remaining time go by; 0 where that is not known."""

    bytes: int = 0
    documents: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A piece of work from files to files. Subclasses add what it needs.

    Attributes:
      root: the pipeline's output directory.
      step: of the pipeline; groups the markers.
      name: unique in the step.
      fingerprint: of everything the outputs depend on, by `fingerprint`.
    """

    root: Path
    step: str
    name: str
    fingerprint: str

    @property
    def marker(self) -> Path:
        """Path of the completion marker."""
        return self.root / "work" / "markers" / self.step / f"{self.name}.json"

    @property
    def extent(self) -> Extent:
        """What it goes through."""
        return Extent()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Done:
    """A finished task.

    Attributes:
      outputs: sha256 of each file, by its path relative to the task's root.
      result: what the task has to say about them, as JSON values.
      seconds: that it took; None when an earlier run had finished it.
      extent: of the task.
    """

    outputs: dict[str, str]
    result: dict[str, Any]
    seconds: float | None
    extent: Extent


def run_tasks(
    engine: Engine, function: Callable[[Any], Done], tasks: Sequence[Task], *, advance: Callable[[Done], None]
) -> list[Done]:
    """Runs the tasks that are not finished, and returns all of them in order.

    Args:
      engine: where to run.
      function: does a task and ends with `finish`.
      tasks: of one step; markers of others, left from an earlier config, are removed.
      advance: called with every task as it is done.
    """
    if tasks:
        files.remove_others(tasks[0].marker.parent, {task.marker.name for task in tasks})
    done = [load_finished(task) for task in tasks]
    for earlier in filter(None, done):
        advance(earlier)
    pending = [i for i, earlier in enumerate(done) if earlier is None]
    for i, now in zip(pending, engine.map(function, [tasks[i] for i in pending]), strict=True):
        done[i] = now
        advance(now)
    return [task for task in done if task is not None]


def load_finished(task: Task) -> Done | None:
    """Returns the finished task if its marker has its fingerprint and its outputs are there; else None."""
    try:
        marker = json.loads(task.marker.read_text(encoding="utf-8"))
        if marker["fingerprint"] != task.fingerprint:
            return None
        for name, output in marker["outputs"].items():
            path = task.root / name
            if not path.is_file() or path.stat().st_size != output["bytes"]:
                return None
        hashes = {name: output["sha256"] for name, output in marker["outputs"].items()}
        return Done(outputs=hashes, result=marker["result"], seconds=None, extent=task.extent)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # absent or damaged
        return None


def finish(task: Task, outputs: Iterable[Path], result: dict[str, Any], *, started: float) -> Done:
    """Writes the marker of a task whose outputs are in place; `started` is the time.monotonic() of its start."""
    hashes = {str(path.relative_to(task.root)): files.sha256(path) for path in outputs}
    described = {
        name: {"bytes": (task.root / name).stat().st_size, "sha256": digest} for name, digest in hashes.items()
    }
    marker = {"fingerprint": task.fingerprint, "outputs": described, "result": result}
    files.write_text(task.marker, json.dumps(marker, indent=1) + "\n")
    return Done(outputs=hashes, result=result, seconds=time.monotonic() - started, extent=task.extent)


def fingerprint(*parts: Any) -> str:
    """Digest of config dataclasses and JSON values, and of this program."""
    return sha256_of([*parts, versions()])


def sha256_of(value: Any) -> str:
    """Digest of a config dataclass or JSON value."""
    return hashlib.sha256(json.dumps(to_json(value)).encode()).hexdigest()


@functools.cache
def versions() -> dict[str, str]:
    """Of Python, the libraries that shape the output, and this program, whose sources are hashed."""
    found = {name: _version(name) for name in _LIBRARIES}
    sources = hashlib.sha256()
    here = Path(__file__).parent
    for path in sorted([*here.rglob("*.py"), *(Path(slmjax.__file__).parent / "data").glob("*.py")]):
        sources.update(path.read_bytes())
    return {
        "python": platform.python_version(),
        "slmjax": slmjax.__version__,
        **{name: version for name, version in found.items() if version is not None},
        "program_sha256": sources.hexdigest(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
