"""Examples from the lists that a run writes: records in quarantine, and texts of evaluation sets that were found."""

import collections
import dataclasses
import hashlib
import time
from pathlib import Path
from typing import Any

import orjson

from data_pipelines import tasks

_EXAMPLES = 3  # of a reason
_FOUND = 12
_MOST_CHARS = 400  # of a field


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListTask(tasks.Task):
    """Chooses from the jsonl file `path`."""

    path: Path


def quarantined(task: ListTask) -> tasks.Done:
    """The result has a few records of every reason: those with the least hashes of where they are."""
    started = time.monotonic()
    chosen: dict[str, list[Any]] = collections.defaultdict(list)
    with open(task.path, "rb") as lines:
        for line in lines:
            record = orjson.loads(line)
            place = "\0".join(str(record[name]) for name in ("source", "file", "record"))
            digest = hashlib.blake2b(place.encode(), digest_size=8).hexdigest()
            of_reason = chosen[record["reason"]]
            of_reason.append([digest, _short(record)])
            if len(of_reason) > 100 * _EXAMPLES:
                chosen[record["reason"]] = _least(of_reason)
    return tasks.finish(task, [], {reason: _least(chosen[reason]) for reason in sorted(chosen)}, started=started)


def merge(found: list[dict[str, list[Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Records by reason, of several files."""
    reasons = sorted({reason for each in found for reason in each})
    return {
        reason: [record for _, record in _least([one for each in found for one in each.get(reason, [])])]
        for reason in reasons
    }


def contaminated(task: ListTask) -> tasks.Done:
    """The result has the matches of the most n-grams, one of each document and item."""
    started = time.monotonic()
    chosen: dict[tuple[str, str, str], list[Any]] = {}
    with open(task.path, "rb") as lines:
        for line in lines:
            match = orjson.loads(line)
            key = (match["document"], match["evaluation"], match["item"])
            entry = [-match["ngrams"], *key, match["field"], _short(match)]
            if key not in chosen or entry[:-1] < chosen[key][:-1]:
                chosen[key] = entry
            if len(chosen) > 100 * _FOUND:
                chosen = dict(sorted(chosen.items(), key=lambda item: item[1][:-1])[:_FOUND])
    first = sorted(chosen.values(), key=lambda entry: entry[:-1])[:_FOUND]
    return tasks.finish(task, [], {"found": [entry[-1] for entry in first]}, started=started)


def _least(entries: list[Any]) -> list[Any]:
    return sorted(entries, key=lambda entry: entry[0])[:_EXAMPLES]


def _short(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value[:_MOST_CHARS] if isinstance(value, str) else value for name, value in record.items()}
