"""Stages are two pure functions each: `measure` maps documents to attributes, a decision maps attributes to drops.

Attributes are columns beside the documents, so that thresholds change without measuring again. A filter decides on a
document by itself; a deduplication decides on the whole corpus, from attributes alone. Some filters also change texts:
`rewrite` maps documents to other texts and attributes, which count what was removed_x or masked_x.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeGuard, assert_never

import numpy as np
import pyarrow as pa

from data_pipelines.stages import (
    bad_words,
    boilerplate,
    c4,
    characters,
    contamination,
    encoded,
    exact,
    fineweb,
    gopher,
    language,
    length,
    lines,
    markers,
    mathematics,
    minhash,
    personal,
    repetition,
)
from data_pipelines.stages.texts import Texts
from slmjax.config import (
    BadWordFilterConfig,
    BoilerplateFilterConfig,
    C4FilterConfig,
    C4ParagraphFilterConfig,
    CharacterFilterConfig,
    ConversationFilterConfig,
    DecontaminationConfig,
    EncodedDataFilterConfig,
    ExactDedupConfig,
    FineWebFilterConfig,
    GopherFilterConfig,
    LanguageFilterConfig,
    LengthFilterConfig,
    LineFilterConfig,
    MarkerFilterConfig,
    MaskPersonalDataConfig,
    MathFilterConfig,
    NearDedupConfig,
    RepetitionFilterConfig,
)
from slmjax.config.filters import FilterConfig, RewriteConfig

DedupConfig = ExactDedupConfig | NearDedupConfig
# What `measure` knows. Decontamination is measured by its index, made before.
StageConfig = FilterConfig | DedupConfig | contamination.IndexFile
# Stages that bound what was measured.
BoundedConfig = FilterConfig | ConversationFilterConfig | DecontaminationConfig


def is_measured(config: object) -> TypeGuard[StageConfig]:
    """Whether a stage looks at texts one by one first."""
    return isinstance(config, StageConfig) and not (isinstance(config, ExactDedupConfig) and config.by != "text")


def check_installed(configs: Iterable[object]) -> None:
    """Raises ValueError with the command to run where a package is absent that one of the stages needs."""
    if any(
        isinstance(config, LanguageFilterConfig) or (isinstance(config, ConversationFilterConfig) and config.languages)
        for config in configs
    ):
        language.check_installed()


def measure(config: StageConfig, batch: pa.RecordBatch) -> pa.RecordBatch:
    """Returns the attributes of a batch of documents, a row for each, after their ids."""
    return pa.record_batch({"id": batch.column("id"), **attributes(config, Texts.from_array(batch.column("text")))})


def attributes(config: StageConfig, texts: Texts) -> dict[str, pa.Array]:
    """The attributes that a stage measures."""
    match config:
        case LengthFilterConfig():
            return length.measure(config, texts)
        case LineFilterConfig():
            return lines.measure(config, texts)
        case CharacterFilterConfig():
            return characters.measure(config, texts)
        case RepetitionFilterConfig():
            return repetition.measure(config, texts)
        case MarkerFilterConfig():
            return markers.measure(config, texts)
        case GopherFilterConfig():
            return gopher.measure(config, texts)
        case FineWebFilterConfig():
            return fineweb.measure(config, texts)
        case C4ParagraphFilterConfig():
            return c4.measure_paragraphs(config, texts)
        case BadWordFilterConfig():
            return bad_words.measure(config, texts)
        case LanguageFilterConfig():
            return language.measure(config, texts)
        case EncodedDataFilterConfig():
            return encoded.measure(texts)
        case MathFilterConfig():
            return mathematics.measure(config, texts)
        case C4FilterConfig() | BoilerplateFilterConfig() | MaskPersonalDataConfig():
            return rewrite(config, texts)[1]
        case ExactDedupConfig():
            return exact.measure(texts)
        case NearDedupConfig():
            return minhash.measure(config, texts)
        case contamination.IndexFile():
            return contamination.measure(config, texts)
        case _:
            assert_never(config)


def rewrite(config: RewriteConfig, texts: Texts) -> tuple[Texts, dict[str, pa.Array]]:
    """Changes the texts. The attributes also have the bytes of each new one; of one with none nothing is left."""
    match config:
        case C4FilterConfig():
            changed, counts = c4.clean(config, texts)
        case BoilerplateFilterConfig():
            changed, counts = boilerplate.clean(config, texts)
        case MaskPersonalDataConfig():
            changed, counts = personal.mask(config, texts)
        case _:
            assert_never(config)
    return changed, {"bytes": pa.array(changed.ends - changed.starts), **counts}


def measured_fields(config: StageConfig | ConversationFilterConfig) -> dict[str, object]:
    """The fields that `measure` depends on: of filters all but the thresholds."""
    match config:
        case ExactDedupConfig():
            names = []
        case NearDedupConfig():
            names = ["bands", "rows", "ngram", "signature_bytes", "seed"]
        case contamination.IndexFile():
            names = ["sha256"]
        case _:
            names = [field.name for field in dataclasses.fields(config) if field.name not in _thresholds(config)]
    return {name: getattr(config, name) for name in names}


def failed_rules(config: BoundedConfig, attributes: pa.RecordBatch) -> np.ndarray:
    """Name of the first rule, in the order of the fields, that each document breaks; "" where it breaks none.

    A field min_x or max_x bounds the attribute x, or each of its values; the bound itself is allowed. only_x are the
    values that x may have. A text of which nothing is left is "empty".
    """
    failed = np.full(attributes.num_rows, "", object)
    if isinstance(config, RewriteConfig):
        failed[attributes.column("bytes").to_numpy() == 0] = "empty"
    for rule, threshold in _thresholds(config).items():
        if threshold is None:
            continue
        bound, _, name = rule.partition("_")
        column = attributes.column(name)
        if bound == "only":
            outside = ~np.isin(column.to_pylist(), threshold)[:, None]
        else:
            if isinstance(column, pa.FixedSizeListArray):
                values = column.flatten().to_numpy().reshape(len(column), -1)
            else:
                values = column.to_numpy()[:, None]
            outside = values < threshold if bound == "min" else values > threshold
        failed[outside.any(axis=1) & (failed == "")] = rule
    return failed


def _thresholds(config: BoundedConfig) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(config)]
    return {name: getattr(config, name) for name in names if name.startswith(("min_", "max_", "only_"))}
