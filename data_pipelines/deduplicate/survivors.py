"""Which of several equal documents is kept."""

import numpy as np
import pyarrow as pa

from data_pipelines.deduplicate.corpus import PhaseTask
from data_pipelines.documents import column
from data_pipelines.measuring import measure_path
from slmjax.config import ExactDedupConfig, NearDedupConfig


def preferences(task: PhaseTask) -> np.ndarray:
    """float64 for each document of a part: the highest is kept, between equals the first."""
    config = task.config
    assert isinstance(config, ExactDedupConfig | NearDedupConfig)
    assert task.part is not None
    if config.survivor == "first" or task.part.shard is None:
        return np.zeros(task.part.documents)
    if config.survivor == "longest":
        return column(task.part.path, "bytes").to_numpy().astype(np.float64)
    assert config.score is not None
    stage, _, attribute = config.score.partition(".")
    try:
        scores = column(measure_path(task.root, stage, task.part.shard), attribute).cast(pa.float64())
    except (OSError, KeyError, pa.ArrowException) as error:  # no such stage, no such attribute, no numbers
        raise ValueError(
            f"{task.stage_name}: score = {config.score!r} must be '<stage>.<attribute>' of an earlier stage that "
            f"measures one number: {error}"
        ) from error
    values = scores.to_numpy(zero_copy_only=False)
    return np.where(np.isnan(values), -np.inf, values)
