"""The steps in the middle: attributes of every shard, and which documents they drop."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipelines import stages, tasks
from data_pipelines.documents import Shard, parquet_writer, read_batches
from data_pipelines.reading import shard_path
from data_pipelines.stages import exact, minhash
from slmjax.config import ExactDedupConfig, NearDedupConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasureTask(tasks.Task):
    """Measures the attributes of one stage for one shard."""

    stage: stages.StageConfig
    shard: Shard


def measure_path(root: Path, step: str, shard: Shard) -> Path:
    """Where the attributes of a shard are."""
    return root / "work" / "attributes" / step / f"{shard.name}.parquet"


def measure_shard(task: MeasureTask) -> tasks.Done:
    """Writes the attributes of a shard, a row for each document."""
    started = time.monotonic()
    output = measure_path(task.root, task.step, task.shard)
    batches = read_batches(shard_path(task.root, task.shard), ["id", "text"])
    first = stages.measure(task.stage, next(batches))
    with parquet_writer(output, first.schema) as writer:
        writer.write_batch(first)
        for batch in batches:
            writer.write_batch(stages.measure(task.stage, batch))
    return tasks.finish(task, [output], {"bytes": task.shard.bytes}, started=started)


def drops(
    config: stages.StageConfig, root: Path, step: str, shards: Sequence[Shard], alive: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Reason to drop each document of each shard, "" to keep it; of no account where it is not alive.

    A deduplication looks at the documents still alive, and keeps the first of each cluster in the order of the shards.
    """
    paths = [measure_path(root, step, shard) for shard in shards]
    match config:
        case ExactDedupConfig():
            digests = pa.concat_arrays(_living(paths, "digest", alive))
            return _later_ones(exact.first_of_each(digests), alive, "duplicate")
        case NearDedupConfig():
            names = (f"band_{band:02d}" for band in range(config.bands))
            bands = (pa.concat_arrays(_living(paths, name, alive)).to_numpy() for name in names)
            return _later_ones(minhash.first_of_each(bands), alive, "near_duplicate")
        case _:
            return [
                np.concatenate([stages.failed_rules(config, batch) for batch in batches])
                for batches in map(read_batches, paths)
            ]


def column(path: Path, name: str) -> pa.Array:
    """One whole column of a parquet file."""
    return pa.concat_arrays([batch.column(0) for batch in read_batches(path, [name])])


def _living(paths: Sequence[Path], name: str, alive: Sequence[np.ndarray]) -> Iterator[pa.Array]:
    """A column of every shard, of the documents still alive."""
    for path, mask in zip(paths, alive, strict=True):
        yield column(path, name).filter(pa.array(mask))


def _later_ones(first: np.ndarray, alive: Sequence[np.ndarray], reason: str) -> list[np.ndarray]:
    """Gives `reason` to every living document whose first one is another."""
    later = np.zeros(sum(map(len, alive)), bool)
    later[np.flatnonzero(np.concatenate(alive))] = first != np.arange(len(first))
    reasons = np.where(later, reason, "").astype(object)
    return np.split(reasons, np.cumsum([len(mask) for mask in alive])[:-1])
