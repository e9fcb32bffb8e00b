"""Stages that decide on a document by what else the corpus holds."""

from collections.abc import Mapping
from typing import assert_never

from data_pipelines import tasks
from data_pipelines.deduplicate import exact, near, repeats
from data_pipelines.deduplicate.corpus import GlobalStep
from slmjax.config import ExactDedupConfig, NearDedupConfig, PassageDedupConfig, SubstringDedupConfig

__all__ = ["GlobalStep", "check", "decide", "scored_by"]

DedupConfig = ExactDedupConfig | NearDedupConfig | PassageDedupConfig | SubstringDedupConfig


def scored_by(stage: object) -> str:
    """Name of the stage whose scores say which duplicate is kept; "" where there is none."""
    score = stage.score if isinstance(stage, ExactDedupConfig | NearDedupConfig) else None
    return (score or "").partition(".")[0]


def check(named: Mapping[str, object]) -> None:
    """Raises ValueError where a stage goes by the scores of one that does not come before it."""
    before: list[str] = []
    for name, stage in named.items():
        scorer = scored_by(stage)
        if scorer and scorer not in before:
            raise ValueError(f"{name}: score names the stage {scorer!r}, but before it are only {before}")
        before.append(name)


def decide(config: DedupConfig, step: GlobalStep) -> list[tasks.Done]:
    """Writes the verdicts of every shard after the stage."""
    match config:
        case ExactDedupConfig():
            return exact.decide(config, step)
        case NearDedupConfig():
            return near.decide(config, step)
        case PassageDedupConfig() | SubstringDedupConfig():
            return repeats.decide(config, step)
        case _:
            assert_never(config)
