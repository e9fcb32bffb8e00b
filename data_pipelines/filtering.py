"""Measuring for all stages together: a shard is read once, and what they want to know of its words is found once.

The attributes of every filter are a task of their own, so that a filter that is added or changed costs itself only, and
those after it where it changes texts.
"""

import contextlib
import dataclasses
import gc
import itertools
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines import stages, tasks
from data_pipelines.documents import Shard, parquet_writer, read_batches, small_batches
from data_pipelines.engines import Engine
from data_pipelines.measuring import measure_path
from data_pipelines.progress import Step
from data_pipelines.reading import shard_path
from data_pipelines.stages.texts import Texts
from slmjax import files

_TEXT = "text"  # the step, and directory in work, of the texts that filters changed


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardWork:
    """What is to be done for one shard.

    Attributes:
      root: the pipeline's output directory.
      shard: as it was read.
      filters: all of them, in order, by name.
      pending: the tasks that are not finished, one for the attributes of a filter or for the texts.
    """

    root: Path
    shard: Shard
    filters: tuple[tuple[str, stages.StageConfig], ...]
    pending: tuple[tasks.Task, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filtered:
    """What came of it.

    Attributes:
      attributes: the finished tasks of each filter, in the order of the shards.
      shards: with the texts that the filters left.
      hashes: sha256 of each of these by name.
    """

    attributes: dict[str, list[tasks.Done]]
    shards: list[Shard]
    hashes: dict[str, str]


def measure(
    engine: Engine,
    step: Step,
    root: Path,
    filters: Mapping[str, stages.StageConfig],
    shards: Sequence[Shard],
    hashes: Mapping[str, str],
) -> Filtered:
    """Writes the attributes of every filter for every shard, and the texts where a filter changes them."""
    planned = {name: [_task(root, name, shard, hashes, filters) for shard in shards] for name in filters}
    rewritten = any(isinstance(config, stages.RewriteConfig) for config in filters.values())
    if rewritten:
        planned[_TEXT] = [_task(root, _TEXT, shard, hashes, filters) for shard in shards]
    for name, of_shards in planned.items():
        files.remove_others(root / "work" / "markers" / name, {task.marker.name for task in of_shards})
    done = {name: [tasks.load_finished(task) for task in of_shards] for name, of_shards in planned.items()}
    works = []
    for i, shard in enumerate(shards):
        pending = tuple(planned[name][i] for name in planned if done[name][i] is None)
        works.append(ShardWork(root=root, shard=shard, filters=tuple(filters.items()), pending=pending))
        if not pending:
            extent = tasks.Extent(shard.bytes, shard.documents)
            step.advance(tasks.Done(outputs={}, result={}, seconds=None, extent=extent))
    busy = [i for i, work in enumerate(works) if work.pending]
    for i, finished in zip(busy, engine.map(_filter_shard, [works[i] for i in busy]), strict=True):
        for task, now in zip(works[i].pending, finished, strict=True):
            done[task.step][i] = now
        extent = tasks.Extent(shards[i].bytes, shards[i].documents)
        step.advance(tasks.Done(outputs={}, result={}, seconds=0.0, extent=extent))
    finished = {name: [task for task in of_shards if task is not None] for name, of_shards in done.items()}
    if not rewritten:
        return Filtered(attributes=finished, shards=list(shards), hashes=dict(hashes))
    texts = finished.pop(_TEXT)
    files.remove_others(root / "work" / _TEXT, {f"{shard.name}.parquet" for shard in shards})
    return Filtered(
        attributes=finished,
        shards=[
            dataclasses.replace(shard, directory=_TEXT, bytes=text.result["bytes"])
            for shard, text in zip(shards, texts, strict=True)
        ],
        hashes={shard.name: next(iter(text.outputs.values())) for shard, text in zip(shards, texts, strict=True)},
    )


def rates(filtered: Filtered) -> str:
    """MB/s of CPU time of each filter that measured something now."""
    spelled = []
    for name, done in filtered.attributes.items():
        measured = [(task.result["bytes"], task.seconds) for task in done if task.seconds]
        if measured:
            num_bytes, seconds = map(sum, zip(*measured, strict=True))
            spelled.append(f"{name} {num_bytes / seconds / 1e6:,.0f}")
    return f"MB/s on a core: {', '.join(spelled)}" if spelled else ""


def _task(
    root: Path, step: str, shard: Shard, hashes: Mapping[str, str], filters: Mapping[str, stages.StageConfig]
) -> tasks.Task:
    """The task of one filter, or of the texts, for one shard; it depends on the filters before that change texts."""
    names = list(filters)
    before = names if step == _TEXT else names[: names.index(step) + 1]
    depends = [
        (type(filters[name]).__name__, stages.measured_fields(filters[name]))
        for name in before
        if name == step or isinstance(filters[name], stages.RewriteConfig)
    ]
    return tasks.Task(root=root, step=step, name=shard.name, fingerprint=tasks.fingerprint(depends, hashes[shard.name]))


def _filter_shard(work: ShardWork) -> list[tasks.Done]:
    """Does the tasks of one shard, and returns them in order."""
    pending = {task.step for task in work.pending}
    outputs = {step: _path(work, step) for step in pending}
    seconds: dict[str, float] = defaultdict(float)
    num_bytes: dict[str, int] = defaultdict(int)
    with contextlib.ExitStack() as stack:
        writers: dict[str, pq.ParquetWriter] = {}
        columns = None if _TEXT in pending else ["id", "bytes", "text"]
        for batch in read_batches(shard_path(work.root, work.shard), columns):
            for step, table in _filter_batch(work.filters, batch, pending, seconds).items():
                started = time.process_time()
                if step not in writers:
                    compression = "none" if step == _TEXT else "lz4"
                    writer = parquet_writer(outputs[step], table.schema, compression=compression)
                    writers[step] = stack.enter_context(writer)
                writers[step].write_table(table)
                num_bytes[step] += sum(table.column("bytes").to_pylist()) if step == _TEXT else batch.num_rows
                seconds[step] += time.process_time() - started
    done = []
    for task in work.pending:
        size = num_bytes[_TEXT] if task.step == _TEXT else work.shard.bytes
        started = time.monotonic() - seconds[task.step]
        done.append(tasks.finish(task, [outputs[task.step]], {"bytes": size}, started=started))
    return done


def _path(work: ShardWork, step: str) -> Path:
    if step == _TEXT:
        return shard_path(work.root, dataclasses.replace(work.shard, directory=_TEXT))
    return measure_path(work.root, step, work.shard)


def _filter_batch(
    filters: Sequence[tuple[str, stages.StageConfig]],
    batch: pa.RecordBatch,
    pending: set[str],
    seconds: dict[str, float],
) -> dict[str, pa.Table]:
    """Attributes, and texts, of one batch of documents by step; adds the CPU time of each to `seconds`."""
    tables: dict[str, list[pa.RecordBatch]] = defaultdict(list)
    for part in small_batches(batch):
        texts = Texts.from_array(part.column("text"))
        rewrites = []
        for name, config in filters:
            started = time.process_time()
            attributes: dict[str, Any] | None = None
            if isinstance(config, stages.RewriteConfig):
                texts, attributes = stages.rewrite(config, texts)
                rewrites.append(config)
            elif name in pending:
                attributes = stages.attributes(config, texts)
            if name in pending:
                tables[name].append(pa.record_batch({"id": part.column("id"), **(attributes or {})}))
            seconds[name] += time.process_time() - started
        if _TEXT in pending:
            tables[_TEXT].append(_with_texts(part, texts, rewrites))
        # Texts and their words refer to each other; left to the collector, those of dozens of parts fill the memory.
        del texts
        gc.collect(1)
    return {name: pa.Table.from_batches(parts) for name, parts in tables.items()}


def _with_texts(batch: pa.RecordBatch, texts: Texts, rewrites: Sequence[stages.RewriteConfig]) -> pa.RecordBatch:
    """The documents with other texts; of conversations every message is changed by itself."""
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    if "messages" in columns:
        conversations = columns["messages"].to_pylist()
        changed = Texts.of([message["content"] for messages in conversations for message in messages])
        for config in rewrites:
            changed, _ = stages.rewrite(config, changed)
        contents = iter(changed.strings)
        for message in itertools.chain.from_iterable(conversations):
            message["content"] = next(contents)
        columns["messages"] = pa.array(conversations, columns["messages"].type)
        texts = Texts.of(["\n\n".join(message["content"] for message in messages) for messages in conversations])
    columns["text"] = texts.array
    columns["bytes"] = pa.array(texts.ends - texts.starts)
    return pa.record_batch(list(columns.values()), schema=batch.schema)
