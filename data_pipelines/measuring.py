"""The steps in the middle: attributes of every shard, and what a filter decides by them."""

import dataclasses
import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipelines import stages, tasks
from data_pipelines.documents import Shard, column, parquet_writer, read_batches
from data_pipelines.quality import scorers
from data_pipelines.reading import shard_path
from data_pipelines.stages import conversation
from data_pipelines.verdicts import Verdicts, verdicts_path
from slmjax.config import ConversationFilterConfig

# Stages that are measured by themselves, not together with the filters.
AloneConfig = scorers.QualityStageConfig | ConversationFilterConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasureTask(tasks.Task):
    """Measures the attributes of one stage for one shard."""

    stage: AloneConfig
    shard: Shard

    @property
    def extent(self) -> tasks.Extent:
        """The shard."""
        return tasks.Extent(self.shard.bytes, self.shard.documents)


def measure_path(root: Path, step: str, shard: Shard) -> Path:
    """Where the attributes of a shard are."""
    return root / "work" / "attributes" / step / f"{shard.name}.parquet"


def measured_content(stage: AloneConfig) -> dict[str, Any]:
    """What the attributes of a stage depend on besides the documents."""
    if isinstance(stage, ConversationFilterConfig):
        return stages.measured_fields(stage)
    return scorers.measured_content(stage)


def measure_shard(task: MeasureTask) -> tasks.Done:
    """Writes the attributes of a shard, a row for each document."""
    started = time.monotonic()
    output = measure_path(task.root, task.step, task.shard)
    if isinstance(task.stage, ConversationFilterConfig):
        measure, columns = functools.partial(conversation.measure, task.stage), ["id", "messages"]
    else:
        measure = functools.partial(scorers.measure, task.stage, shard_name=task.shard.name)
        columns = ["id", "text"]
    batches = map(measure, read_batches(shard_path(task.root, task.shard), columns))
    first = next(batches)
    with parquet_writer(output, first.schema) as writer:
        writer.write_batch(first)
        for batch in batches:
            writer.write_batch(batch)
    return tasks.finish(task, [output], {"bytes": task.shard.bytes}, started=started)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecideTask(tasks.Task):
    """Decides on the documents of one shard by the attributes of the filter called `stage_name`.

    `previous` is the name of the stage before, None for the first.
    """

    stage_name: str
    stage: stages.BoundedConfig
    shard: Shard
    previous: str | None

    @property
    def extent(self) -> tasks.Extent:
        """The shard."""
        return tasks.Extent(self.shard.bytes, self.shard.documents)


def decide_shard(task: DecideTask) -> tasks.Done:
    """Writes the verdicts of a shard after the filter; the result counts them."""
    started = time.monotonic()
    attributes = pa.Table.from_batches(read_batches(measure_path(task.root, task.stage_name, task.shard)))
    rules = np.concatenate([stages.failed_rules(task.stage, batch) for batch in attributes.to_batches()])
    before = Verdicts.load(task.root, task.previous, task.shard)
    living = attributes.filter(pa.array(before.alive))
    changes = {
        name: int(living.column(name).to_numpy().sum())
        for name in living.column_names
        if name.startswith(("removed_", "masked_"))
    }
    verdicts = before.after(task.stage_name, rules)
    return finish_verdicts(task, task.stage_name, task.shard, verdicts, started=started, changes=changes)


def finish_verdicts(
    task: tasks.Task,
    stage_name: str,
    shard: Shard,
    verdicts: Verdicts,
    *,
    started: float,
    changes: Mapping[str, int] | None = None,
) -> tasks.Done:
    """Writes the verdicts of a shard after a stage, and the marker of the task, whose result counts them.

    `changes` counts what the stage changed in the texts that reached it.
    """
    output = verdicts_path(task.root, stage_name, shard)
    verdicts.save(output)
    sizes = column(shard_path(task.root, shard), "bytes").to_numpy()
    counts = {**verdicts.counts(stage_name, sizes), "changes": dict(changes or {})}
    return tasks.finish(task, [output], counts, started=started)
