"""Clusters of duplicates: how large they are, and which are the largest, in buckets like the stages that found them."""

import collections
import dataclasses
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipelines import tasks
from data_pipelines.deduplicate import buckets
from data_pipelines.documents import Shard, column
from data_pipelines.engines import Engine
from data_pipelines.stages import hashed_words
from data_pipelines.stages.ranges import Ranges
from data_pipelines.stages.texts import Texts

_LARGEST = 5  # clusters of a stage that are shown
_MEMBERS = 4  # of each, besides the survivor

# A document that was dropped for another: hash of the stage and of the other's id, and where it is.
_ENTRY = np.dtype([("key", "<u8"), ("part", "<u4"), ("row", "<u4"), ("stage", "<u4")])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterTask(tasks.Task):
    """Writes the entries of a shard in buckets, or counts those of one bucket.

    Attributes:
      number: of the shard or of the bucket.
      shard: None for a bucket.
      num_shards, num_buckets: in all.
      stages: their names, in order.
    """

    number: int
    shard: Shard | None
    num_shards: int
    num_buckets: int
    stages: tuple[str, ...]

    def path(self, number: int) -> Path:
        """Where the entries of a shard are."""
        return self.root / "work" / "shuffle" / "report" / f"{number:06d}.bin"


def find(
    engine: Engine,
    root: Path,
    shards: Sequence[Shard],
    stages: tuple[str, ...],
    *,
    duplicates: int,
    worker_bytes: int,
    fingerprint: str,
    phase: Callable[[str, Sequence[tasks.Task]], Callable[[tasks.Done], None]],
) -> dict[str, dict[str, Any]]:
    """Returns, by stage, "sizes" (documents in a cluster -> clusters) and the "largest" with some members.

    `phase` announces tasks of a name and returns what is told of each that is done.
    """
    whole = tasks.Task(root=root, step="report/clusters", name="clusters", fingerprint=fingerprint)
    done = tasks.load_finished(whole)
    if done is None:
        started = time.monotonic()
        num_buckets = buckets.number(duplicates * _ENTRY.itemsize, worker_bytes)
        first = ClusterTask(
            root=root,
            step="shuffle/report_scatter",
            name="",
            fingerprint=tasks.fingerprint(fingerprint, num_buckets),
            number=0,
            shard=None,
            num_shards=len(shards),
            num_buckets=num_buckets,
            stages=stages,
        )
        scattered = [
            dataclasses.replace(first, name=shard.name, number=number, shard=shard)
            for number, shard in enumerate(shards)
        ]
        tasks.run_tasks(engine, scatter, scattered, advance=phase("duplicates", scattered))
        met = [
            dataclasses.replace(first, step="shuffle/report_meet", name=f"{number:06d}", number=number)
            for number in range(num_buckets)
        ]
        counted = tasks.run_tasks(engine, meet, met, advance=phase("clusters", met))
        done = tasks.finish(whole, [], _merged([each.result for each in counted]), started=started)
    for directory in ("work/shuffle", "work/markers/shuffle"):
        shutil.rmtree(root / directory, ignore_errors=True)
    return done.result


def scatter(task: ClusterTask) -> tasks.Done:
    """Writes the entries of a shard."""
    started = time.monotonic()
    assert task.shard is not None
    path = task.root / "work" / "decisions" / f"{task.shard.name}.parquet"
    reasons, others = column(path, "reason"), column(path, "duplicate_of")
    rows = np.flatnonzero(others.is_valid().to_numpy(zero_copy_only=False))
    encoded = reasons.take(pa.array(rows)).dictionary_encode()
    numbers = [task.stages.index(reason.partition(".")[0]) for reason in encoded.dictionary.to_pylist()]
    ids = Texts.from_array(others.take(pa.array(rows)))
    entries = np.zeros(len(rows), _ENTRY)
    entries["stage"] = np.array(numbers, np.uint32)[encoded.indices.to_numpy()] if numbers else 0
    hashes = Ranges(ids, ids.starts, ids.ends).hashes
    entries["key"] = hashed_words.mix(hashes + entries["stage"] * hashed_words.MULTIPLIER)
    entries["part"], entries["row"] = task.number, rows
    output = task.path(task.number)
    buckets.write(output, entries, buckets.spread(entries["key"], task.num_buckets), task.num_buckets)
    return tasks.finish(task, [output], {}, started=started)


def meet(task: ClusterTask) -> tasks.Done:
    """Counts the clusters of a bucket."""
    started = time.monotonic()
    readers = (buckets.Reader(task.path(number), _ENTRY, task.num_buckets) for number in range(task.num_shards))
    entries = np.concatenate([reader.records(task.number) for reader in readers])
    entries = entries[np.lexsort((entries["row"], entries["part"], entries["key"]))]
    first = np.flatnonzero(np.append(True, entries["key"][1:] != entries["key"][:-1])[: len(entries)])
    sizes = np.diff(np.append(first, len(entries))) + 1  # and the survivor
    found: dict[str, dict[str, Any]] = {}
    for number in np.unique(entries["stage"][first]).tolist():
        mine = np.flatnonzero(entries["stage"][first] == number)
        order = mine[np.lexsort((entries["key"][first[mine]], -sizes[mine]))][:_LARGEST]
        values, counts = np.unique(sizes[mine], return_counts=True)
        found[task.stages[number]] = {
            "sizes": dict(zip(map(str, values.tolist()), counts.tolist(), strict=True)),
            "largest": [_cluster(entries, int(first[i]), int(sizes[i])) for i in order],
        }
    return tasks.finish(task, [], found, started=started)


def _cluster(entries: np.ndarray, start: int, size: int) -> list[Any]:
    """[-size, key, [[part, row] of some members]], which sorts as they are shown."""
    members = entries[start : start + min(_MEMBERS, size - 1)]
    places = list(zip(members["part"].tolist(), members["row"].tolist(), strict=True))
    return [-size, int(entries["key"][start]), places]


def _merged(found: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    sizes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    largest: dict[str, list[Any]] = collections.defaultdict(list)
    for of_bucket in found:
        for stage, clusters in of_bucket.items():
            sizes[stage].update(clusters["sizes"])
            largest[stage] = sorted([*largest[stage], *clusters["largest"]])[:_LARGEST]
    return {
        stage: {"sizes": {key: sizes[stage][key] for key in sorted(sizes[stage], key=int)}, "largest": largest[stage]}
        for stage in sorted(sizes)
    }
