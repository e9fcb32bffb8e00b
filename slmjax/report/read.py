"""Reads what runs and pipelines left behind. What is missing or damaged is left out, and said."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

# Beyond it plots overflow.
_LARGEST = 1e100


@dataclasses.dataclass(frozen=True)
class Series:
    """One metric over the steps at which it was logged, ascending; finite values up to 1e100 only."""

    steps: np.ndarray
    values: np.ndarray


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A run directory.

    Attributes:
      config: config.json, or {}.
      versions: versions.json, or {}.
      metrics: by name, from metrics.jsonl.
      evaluation: evaluation.json, or {}.
      samples: lines of samples.jsonl.
      problems: what could not be read, for people.
    """

    path: Path
    config: dict[str, Any]
    versions: dict[str, Any]
    metrics: dict[str, Series]
    evaluation: dict[str, Any]
    samples: list[dict[str, Any]]
    problems: list[str]


@dataclasses.dataclass(frozen=True)
class DataRecord:
    """A data directory: its manifest.json, or {}, and what could not be read."""

    path: Path
    manifest: dict[str, Any]
    problems: list[str]


def read_run(path: Path) -> RunRecord:
    """Reads a run directory, whatever of it is there."""
    problems: list[str] = []
    return RunRecord(
        path=path,
        config=_object(path / "config.json", problems),
        versions=_object(path / "versions.json", problems),
        metrics=_series(_lines(path / "metrics.jsonl", problems)),
        evaluation=_object(path / "evaluation.json", problems),
        samples=_lines(path / "samples.jsonl", problems),
        problems=problems,
    )


def read_data(path: Path) -> DataRecord:
    """Reads a data directory."""
    problems: list[str] = []
    return DataRecord(path, _object(path / "manifest.json", problems), problems)


def _object(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        problems.append(f"{path.name} is missing")
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read: {error}")
    else:
        if isinstance(value, dict):
            return value
        problems.append(f"{path.name} holds no object")
    return {}


def _lines(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        problems.append(f"{path.name} is missing")
        return []
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error}")
        return []
    records, torn = [], []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif line.strip():
            torn.append(number)
    if torn:
        shown = ", ".join(map(str, torn[:5])) + (", ..." if len(torn) > 5 else "")
        problems.append(f"{path.name}: {len(torn)} damaged lines left out ({shown})")
    return records


def _series(records: list[dict[str, Any]]) -> dict[str, Series]:
    """Groups by metric; of a step logged twice, as a resumed run does, the later line counts."""
    points: dict[str, dict[int, float]] = {}
    for record in records:
        step = record.get("step")
        if not isinstance(step, int) or abs(step) > _LARGEST:
            continue
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float) and abs(value) <= _LARGEST:  # NaN is not
                points.setdefault(name, {})[step] = float(value)
    return {
        name: Series(np.array(sorted(by_step)), np.array([by_step[step] for step in sorted(by_step)]))
        for name, by_step in points.items()
    }
