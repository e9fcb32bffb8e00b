"""Which documents the scores keep: by value, by quantile of the whole corpus, or by a sample of it."""

import dataclasses
import time
from collections.abc import Iterator

import numpy as np

from data_pipelines import tasks
from data_pipelines.deduplicate import GlobalStep
from data_pipelines.documents import Shard, column
from data_pipelines.measuring import finish_verdicts, measure_path
from data_pipelines.quality.quantiles import order_statistics
from data_pipelines.quality.scorers import QualityStageConfig
from data_pipelines.verdicts import Verdicts, verdicts_path
from slmjax.config import QualityFilterConfig, QualitySampleConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecideScoresTask(tasks.Task):
    """Decides on the documents of one shard: each rule with its inclusive bounds on the key, the first one broken."""

    config: QualityStageConfig
    stage_name: str
    shard: Shard
    previous: str | None
    bounds: dict[str, tuple[float, float]]


def decide(config: QualityStageConfig, step: GlobalStep) -> list[tasks.Done]:
    """Writes the verdicts of every shard after the stage."""
    planned = [
        DecideScoresTask(
            root=step.root,
            step=f"verdicts/{step.name}",
            name=shard.name,
            fingerprint=step.fingerprint,
            config=config,
            stage_name=step.name,
            shard=shard,
            previous=step.previous,
            bounds={},
        )
        for shard in step.shards
    ]
    if any(tasks.load_finished(task) is None for task in planned):
        bounds = _bounds(config, step)
        planned = [dataclasses.replace(task, bounds=bounds) for task in planned]
    step.shown.phase("decide", planned)
    return tasks.run_tasks(step.engine, decide_scores, planned, advance=step.shown.advance)


def decide_scores(task: DecideScoresTask) -> tasks.Done:
    """Writes the verdicts of a shard; the result counts them."""
    started = time.monotonic()
    keys = _keys(task.config, task.root, task.stage_name, task.shard)
    rules = np.full(len(keys), "", object)
    for rule, (low, high) in task.bounds.items():
        rules[((keys < low) | (keys > high)) & (rules == "")] = rule
    verdicts = Verdicts.load(task.root, task.previous, task.shard).after(task.stage_name, rules)
    return finish_verdicts(task, task.stage_name, task.shard, verdicts, started=started)


def _bounds(config: QualityStageConfig, step: GlobalStep) -> dict[str, tuple[float, float]]:
    """The bounds of every rule; those of quantiles and samples are found among the documents that are alive."""
    number = sum(map(len, _living_keys(config, step)))
    ranks: dict[str, int] = {}
    bounds: dict[str, tuple[float, float]] = {}
    match config:
        case QualityFilterConfig():
            if config.min_score is not None:
                bounds["min_score"] = (config.min_score, np.inf)
            if config.max_score is not None:
                bounds["max_score"] = (-np.inf, config.max_score)
            if config.min_score_quantile is not None:
                ranks["min_score_quantile"] = min(int(config.min_score_quantile * number), number - 1)
            if config.max_score_quantile is not None:
                ranks["max_score_quantile"] = max(int(np.ceil(config.max_score_quantile * number)) - 1, 0)
        case QualitySampleConfig():
            ranks["not_sampled"] = number - max(round(config.fraction * number), 1)
    if ranks and number:
        values = order_statistics(lambda: _living_keys(config, step), list(ranks.values()))
        for rule, value in zip(ranks, values, strict=True):
            bounds[rule] = (-np.inf, value) if rule.startswith("max_") else (value, np.inf)
    return bounds


def _living_keys(config: QualityStageConfig, step: GlobalStep) -> Iterator[np.ndarray]:
    """Keys of the documents that are alive, one shard at a time.

    Raises:
      ValueError: one of them has no score.
    """
    for shard in step.shards:
        keys = _keys(config, step.root, step.name, shard)
        if step.previous is not None:
            reasons = column(verdicts_path(step.root, step.previous, shard), "reason")
            living = reasons.is_null().to_numpy(zero_copy_only=False)
        else:
            living = np.ones(len(keys), bool)
        if np.isnan(keys[living]).any():
            missing = np.flatnonzero(np.isnan(keys) & living)
            first = column(measure_path(step.root, step.name, shard), "id")[int(missing[0])].as_py()
            raise ValueError(
                f"{step.name}: {len(missing)} documents of shard {shard.name} have no score, the first one {first}; "
                "score the documents that reach this stage again"
            )
        yield keys[living]


def _keys(config: QualityStageConfig, root, stage_name: str, shard: Shard) -> np.ndarray:
    """What the rules bound: the score or, for a sample, the score over the temperature plus Gumbel noise.

    The documents with the highest such sums are a sample without replacement (Kool et al. 2019, arXiv:1903.06059).
    """
    path = measure_path(root, stage_name, shard)
    scores = column(path, "score").to_numpy(zero_copy_only=False)
    if isinstance(config, QualityFilterConfig) or config.temperature == 0:
        return scores
    return scores / config.temperature + column(path, "noise").to_numpy()
