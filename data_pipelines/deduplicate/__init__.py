"""Stages that decide on a document by what else the corpus holds."""

from typing import assert_never

from data_pipelines import tasks
from data_pipelines.deduplicate import exact, near
from data_pipelines.deduplicate.corpus import GlobalStep
from slmjax.config import ExactDedupConfig, NearDedupConfig

__all__ = ["GlobalStep", "decide"]

DedupConfig = ExactDedupConfig | NearDedupConfig


def decide(config: DedupConfig, step: GlobalStep) -> list[tasks.Done]:
    """Writes the verdicts of every shard after the stage."""
    match config:
        case ExactDedupConfig():
            return exact.decide(config, step)
        case NearDedupConfig():
            return near.decide(config, step)
        case _:
            assert_never(config)
