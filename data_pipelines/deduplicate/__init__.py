"""Stages that decide on a document by what else the corpus holds."""

import dataclasses
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipelines import tasks
from data_pipelines.documents import Shard, column
from data_pipelines.engines import Engine
from data_pipelines.measuring import finish_verdicts, measure_path
from data_pipelines.reading import shard_path
from data_pipelines.stages import DedupConfig, exact, minhash
from data_pipelines.verdicts import Verdicts
from slmjax.config import ExactDedupConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlobalStep:
    """Where and on what a stage over the whole corpus works.

    Attributes:
      root: the pipeline's output directory.
      engine: runs its tasks.
      name: of the stage.
      shards: of the corpus, in order.
      previous: name of the stage before, None for the first.
      fingerprint: of everything that the verdicts depend on.
    """

    root: Path
    engine: Engine
    name: str
    shards: tuple[Shard, ...]
    previous: str | None
    fingerprint: str


def decide(config: DedupConfig, step: GlobalStep) -> list[tasks.Done]:
    """Writes the verdicts of every shard after the stage."""
    planned = [
        tasks.Task(root=step.root, step=f"verdicts/{step.name}", name=shard.name, fingerprint=step.fingerprint)
        for shard in step.shards
    ]
    finished = [done for done in map(tasks.load_finished, planned) if done is not None]
    if len(finished) == len(planned):
        return finished
    before = [Verdicts.load(step.root, step.previous, shard) for shard in step.shards]

    def living(name: str) -> pa.Array:
        return pa.concat_arrays(
            column(measure_path(step.root, step.name, shard), name).filter(pa.array(verdicts.alive))
            for shard, verdicts in zip(step.shards, before, strict=True)
        )

    if isinstance(config, ExactDedupConfig):
        first, rule = exact.first_of_each(living("digest")), "duplicate"
    else:
        first = minhash.first_of_each(living(f"band_{band:02d}").to_numpy() for band in range(config.bands))
        rule = "near_duplicate"
    alive = np.concatenate([verdicts.alive for verdicts in before])
    ids = np.concatenate(
        [column(shard_path(step.root, shard), "id").to_numpy(zero_copy_only=False) for shard in step.shards]
    )
    kept = np.arange(len(ids))
    kept[alive] = np.flatnonzero(alive)[first]
    rules = np.where(kept != np.arange(len(ids)), rule, "").astype(object)
    ends = np.cumsum([shard.documents for shard in step.shards])[:-1]
    done = []
    for task, shard, verdicts, why, originals in zip(
        planned, step.shards, before, np.split(rules, ends), np.split(ids[kept], ends), strict=True
    ):
        after = verdicts.after(step.name, why, originals)
        done.append(finish_verdicts(task, step.name, shard, after, started=time.monotonic()))
    return done
