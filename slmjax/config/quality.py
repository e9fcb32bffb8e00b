"""Quality scores in a pipeline: where a document's score comes from, which documents it keeps, and generated text."""

import dataclasses
from typing import Literal

from slmjax.config.check import fraction, not_negative, positive, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityModelConfig:
    """Scores of a model that `slmjax data train-quality` wrote to the directory `path`; ~ and variables expand.

    The score of a classifier is a probability, of a regression a value on the scale of its scores, of a preference
    model the log-odds against an average document, of an n-gram model nats a word (higher is less likely), of
    importance weights log p_target - log p_raw.
    """

    path: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastTextModelConfig:
    """Probability of `label` under a fastText model file (.bin, .ftz); needs the extra `quality`."""

    path: str
    label: str

    def __post_init__(self):
        require(self.label != "", self, "label must name one of the model's labels, such as '__label__hq', got ''")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreFilesConfig:
    """Scores made elsewhere, such as by `slmjax data score`: parquet with the columns `id` and `column`.

    Attributes:
      path: directory with a file for every shard of the documents, of the same name.
      column: a column of numbers.
    """

    path: str
    column: str = "score"


ScorerConfig = QualityModelConfig | FastTextModelConfig | ScoreFilesConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityFilterConfig:
    """Keeps documents by their score. Without a bound it only measures.

    Attributes:
      scorer: where the scores come from.
      min_score, max_score: inclusive bounds on the score.
      min_score_quantile: drops at most this share of the documents that reach this stage, those with the lowest scores:
        0.7 keeps the top 30 %, and all that tie with the lowest kept.
      max_score_quantile: keeps this share of them from the bottom, and ties. With both, the middle.
    """

    scorer: ScorerConfig
    min_score: float | None = None
    max_score: float | None = None
    min_score_quantile: float | None = None
    max_score_quantile: float | None = None

    def __post_init__(self):
        fraction(self, "min_score_quantile", "max_score_quantile")
        for low, high in (("min_score", "max_score"), ("min_score_quantile", "max_score_quantile")):
            lower, upper = getattr(self, low), getattr(self, high)
            ordered = lower is None or upper is None or lower < upper
            require(ordered, self, f"{low} must be less than {high}, got {lower} and {upper}")

    @property
    def has_bound(self) -> bool:
        """Whether it can drop anything."""
        bounds = (self.min_score, self.max_score, self.min_score_quantile, self.max_score_quantile)
        return any(bound is not None for bound in bounds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualitySampleConfig:
    """Samples documents without replacement, each with a probability that grows as exp(score / temperature).

    With importance weights this is DSIR (Xie et al. 2023, arXiv:2302.03169), with preference scores QuRating's
    selection (Wettig et al. 2024, arXiv:2402.09739). The sample of a larger `fraction` holds that of a smaller one.

    Attributes:
      scorer: where the scores come from.
      fraction: share of the documents that reach this stage to keep.
      temperature: 0.0 takes the highest scores, a large one any documents.
      seed: of the draw, which depends on it and on the documents' ids alone.
    """

    scorer: ScorerConfig
    fraction: float
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self):
        require(0 < self.fraction <= 1, self, f"fraction must lie in (0, 1], got {self.fraction}")
        not_negative(self, "temperature", "seed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratedFilesSourceConfig:
    """Text that a model generated, jsonl or parquet: every record says from which checkpoint and which prompt.

    Both are part of a document's id, <name>/<checkpoint>/<prompt>#<file>:<record>, and all texts of a prompt fall on
    the same side of the split. A pipeline with such a source must have a deduplication and a quality stage. The
    defaults are the fields of the samples.jsonl that `slmjax sample` writes.

    Attributes:
      paths, format, max_record_bytes: as in FilesSourceConfig.
      text_field: the generated text.
      checkpoint_field: name or hash of the checkpoint, not empty.
      prompt_field: identifier of the prompt, not empty.
    """

    paths: tuple[str, ...]
    name: str = "generated"
    format: Literal["auto", "jsonl", "parquet"] = "auto"
    text_field: str = "completion"
    checkpoint_field: str = "checkpoint_sha256"
    prompt_field: str = "prompt_id"
    max_record_bytes: int = 32 << 20

    def __post_init__(self):
        require(len(self.paths) > 0, self, "paths needs at least one file, directory, glob or address, got ()")
        positive(self, "max_record_bytes")
