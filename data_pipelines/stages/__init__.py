"""Stages are two pure functions each: `measure` maps documents to attributes, a decision maps attributes to drops.

Attributes are columns beside the documents, so that thresholds change without measuring again. A filter decides on a
document by itself; a deduplication decides on the whole corpus, from attributes alone.
"""

import dataclasses
from typing import assert_never

import numpy as np
import pyarrow as pa

from data_pipelines.stages import characters, exact, length, lines, markers, minhash, repetition
from slmjax.config import (
    CharacterFilterConfig,
    ExactDedupConfig,
    LengthFilterConfig,
    LineFilterConfig,
    MarkerFilterConfig,
    NearDedupConfig,
    RepetitionFilterConfig,
)

FilterConfig = (
    LengthFilterConfig | LineFilterConfig | CharacterFilterConfig | RepetitionFilterConfig | MarkerFilterConfig
)
DedupConfig = ExactDedupConfig | NearDedupConfig
StageConfig = FilterConfig | DedupConfig


def measure(config: StageConfig, batch: pa.RecordBatch) -> pa.RecordBatch:
    """Returns the attributes of a batch of documents, a row for each, after their ids."""
    texts = batch.column("text").to_pylist()
    match config:
        case LengthFilterConfig():
            attributes = length.measure(texts)
        case LineFilterConfig():
            attributes = lines.measure(config, texts)
        case CharacterFilterConfig():
            attributes = characters.measure(texts)
        case RepetitionFilterConfig():
            attributes = repetition.measure(texts)
        case MarkerFilterConfig():
            attributes = markers.measure(config, texts)
        case ExactDedupConfig():
            attributes = exact.measure(batch.column("text"))
        case NearDedupConfig():
            attributes = minhash.measure(config, batch.column("text"))
        case _:
            assert_never(config)
    return pa.record_batch({"id": batch.column("id"), **attributes})


def measured_fields(config: StageConfig) -> dict[str, object]:
    """The fields that `measure` depends on: all but the thresholds."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: value for name, value in fields.items() if name not in _thresholds(config)}


def failed_rules(config: FilterConfig, attributes: pa.RecordBatch) -> np.ndarray:
    """Name of the first rule, in the order of the fields, that each document breaks; "" where it breaks none.

    A field min_x or max_x bounds the attribute x, or each of its values; the bound itself is allowed.
    """
    failed = np.full(attributes.num_rows, "", object)
    for rule, threshold in _thresholds(config).items():
        if threshold is None:
            continue
        bound, _, name = rule.partition("_")
        column = attributes.column(name)
        if isinstance(column, pa.FixedSizeListArray):
            values = column.flatten().to_numpy().reshape(len(column), -1)
        else:
            values = column.to_numpy()[:, None]
        outside = values < threshold if bound == "min" else values > threshold
        failed[outside.any(axis=1) & (failed == "")] = rule
    return failed


def _thresholds(config: StageConfig) -> dict[str, float | tuple[float, ...] | None]:
    names = [field.name for field in dataclasses.fields(config)]
    return {name: getattr(config, name) for name in names if name.startswith(("min_", "max_"))}
