"""The apply step: the documents that are left, each with its side of the split, and a record of every decision."""

import dataclasses
import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipelines import tasks
from data_pipelines.documents import CONVERSATION_SCHEMA, TEXT_SCHEMA, Shard, parquet_writer, read_batches
from data_pipelines.reading import shard_path
from data_pipelines.verdicts import Cuts, Verdicts
from slmjax.config import SplitConfig

_DECISIONS = pa.schema(
    [("id", pa.string()), ("reason", pa.string()), ("duplicate_of", pa.string()), ("held_out", pa.bool_())]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectTask(tasks.Task):
    """Selects the documents of one shard: those alive after the stage `last`, all of them where it is None."""

    shard: Shard
    conversations: bool
    split: SplitConfig
    last: str | None

    @property
    def extent(self) -> tasks.Extent:
        """The shard."""
        return tasks.Extent(self.shard.bytes, self.shard.documents)


def is_held_out(config: SplitConfig, key: str) -> bool:
    """Whether documents with this split key are held out."""
    digest = hashlib.blake2b(f"{config.salt}\0{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < config.held_out_fraction * 2**64


def documents_path(root: Path, shard: Shard) -> Path:
    """Where the selected documents of a shard are."""
    return root / "documents" / f"{shard.name}.parquet"


def select_shard(task: SelectTask) -> tasks.Done:
    """Writes documents/<shard> with the kept documents and work/decisions/<shard> with a row for every document."""
    started = time.monotonic()
    outputs = [documents_path(task.root, task.shard), task.root / "work" / "decisions" / f"{task.shard.name}.parquet"]
    schema = (CONVERSATION_SCHEMA if task.conversations else TEXT_SCHEMA).append(pa.field("held_out", pa.bool_()))
    verdicts = Verdicts.load(task.root, task.last, task.shard)
    start = 0
    counts = {"train": 0, "held_out": 0}
    with (
        parquet_writer(outputs[0], schema, compression="zstd") as kept,
        parquet_writer(outputs[1], _DECISIONS) as decisions,
    ):
        for batch in read_batches(shard_path(task.root, task.shard)):
            rows = slice(start, start + len(batch))
            reasons = pa.array(verdicts.reasons[rows], pa.string(), mask=verdicts.alive[rows])
            originals = pa.array(verdicts.duplicate_of[rows], pa.string())
            sides = pa.array([is_held_out(task.split, key) for key in batch.column("key").to_pylist()], pa.bool_())
            decisions.write_batch(pa.record_batch([batch.column("id"), reasons, originals, sides], schema=_DECISIONS))
            batch = _without(batch, verdicts.cuts, start)
            start += len(batch)
            chosen = pa.record_batch([*batch.columns, sides], schema=schema).filter(reasons.is_null())
            if len(chosen):
                kept.write_batch(chosen)
            held_out = sum(chosen.column("held_out").to_pylist())
            counts["held_out"] += held_out
            counts["train"] += len(chosen) - held_out
    return tasks.finish(task, outputs, {**counts, "bytes": task.shard.bytes}, started=started)


def _without(batch: pa.RecordBatch, cuts: Cuts, start: int) -> pa.RecordBatch:
    """What is left of the documents after the cuts; `start` is the row in the shard of the first."""
    rows = np.unique(cuts.rows[slice(*np.searchsorted(cuts.rows, [start, start + len(batch)]))]).tolist()
    if not rows:
        return batch
    texts = batch.column("text").to_pylist()
    for row in rows:
        texts[row - start] = cuts.apply(row, texts[row - start])
    sizes = pa.array([len(text.encode()) for text in texts], pa.int64())
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    return pa.record_batch({**columns, "text": pa.array(texts, pa.string()), "bytes": sizes}, schema=batch.schema)


def of_side(batch: pa.RecordBatch, *, held_out: bool) -> pa.RecordBatch:
    """Rows of one side of the split, by the column held_out."""
    return batch.filter(pa.array(batch.column("held_out").to_numpy(zero_copy_only=False) == held_out))


def read_side(root: Path, shards: Sequence[Shard], *, held_out: bool, columns: Sequence[str]) -> Iterator[dict]:
    """Yields `columns` of the selected documents of one side, in order, a dictionary for each."""
    for shard in shards:
        for batch in read_batches(documents_path(root, shard), [*columns, "held_out"]):
            yield from of_side(batch, held_out=held_out).select(list(columns)).to_pylist()
