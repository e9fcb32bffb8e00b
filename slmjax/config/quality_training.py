"""What `slmjax data train-quality` trains: a model that gives a document a score, from hashed word n-grams."""

import dataclasses
from typing import Literal

from slmjax.config.check import directory, not_negative, positive, require
from slmjax.config.pipeline import NormaliseConfig
from slmjax.config.sources import TextSourceConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoredFilesSourceConfig:
    """Texts with a number each, jsonl or parquet.

    Attributes:
      paths, format, text_field, max_record_bytes: as in FilesSourceConfig.
      score_field: the number.
    """

    paths: tuple[str, ...]
    name: str = "scored"
    format: Literal["auto", "jsonl", "parquet"] = "auto"
    text_field: str = "text"
    score_field: str = "score"
    max_record_bytes: int = 32 << 20

    def __post_init__(self):
        require(len(self.paths) > 0, self, "paths needs at least one file, directory, glob or address, got ()")
        positive(self, "max_record_bytes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceFilesSourceConfig:
    """Pairs of texts, jsonl or parquet.

    Attributes:
      paths, format, max_record_bytes: as in FilesSourceConfig.
      preferred_field: the better text.
      other_field: the other one.
      probability_field: field with the probability that the first one is better, such as the share of a judge's votes;
        None takes it as certain.
    """

    paths: tuple[str, ...]
    name: str = "preferences"
    format: Literal["auto", "jsonl", "parquet"] = "auto"
    preferred_field: str = "preferred"
    other_field: str = "other"
    probability_field: str | None = None
    max_record_bytes: int = 32 << 20

    def __post_init__(self):
        require(len(self.paths) > 0, self, "paths needs at least one file, directory, glob or address, got ()")
        positive(self, "max_record_bytes")


# The features of all models are the word n-grams of 1 to `ngram` words, hashed to 2 ** bits buckets.


@dataclasses.dataclass(frozen=True, kw_only=True)
class _LinearModelConfig:
    ngram: int = 2
    bits: int = 18
    epochs: int = 5
    learning_rate: float = 2.0
    document_bytes: int = 16 << 10

    def __post_init__(self):
        _check_features(self)
        positive(self, "epochs", "learning_rate", "document_bytes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainClassifierConfig(_LinearModelConfig):
    """Logistic regression on the mean of a document's hashed n-grams; the score is the probability of `positive`.

    Attributes:
      positive: texts of the kind that is wanted.
      negative: texts of the kind to choose from.
      epochs: passes of AdaGrad over the texts.
      learning_rate: of AdaGrad.
      document_bytes: training reads this much of the start of each text; about 1.6 times that is in memory.
    """

    positive: tuple[TextSourceConfig, ...]
    negative: tuple[TextSourceConfig, ...]

    def __post_init__(self):
        super().__post_init__()
        _check_sources(self, "positive", "negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainRegressionConfig(_LinearModelConfig):
    """Least squares on the same features, towards scores that texts have, such as FineWeb-Edu's (arXiv:2406.17557).

    `sources` are the scored texts; the other fields are as in TrainClassifierConfig.
    """

    sources: tuple[ScoredFilesSourceConfig, ...]

    def __post_init__(self):
        super().__post_init__()
        _check_sources(self, "sources")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainPreferenceConfig(_LinearModelConfig):
    """A score from which of two texts is better (Bradley & Terry 1952), as QuRating's (arXiv:2402.09739).

    P(a is better than b) = sigmoid(score(a) - score(b)). `sources` are the pairs; the other fields are as in
    TrainClassifierConfig.
    """

    sources: tuple[PreferenceFilesSourceConfig, ...]

    def __post_init__(self):
        super().__post_init__()
        _check_sources(self, "sources")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainNgramModelConfig:
    """A language model of words, orders 1 to `ngram` interpolated by Witten & Bell 1991, counts in 2 ** bits buckets.

    The score is nats a word: low for text like `sources`. In memory are 32-bit counts of every order, and of the kinds
    of words that follow each context: at the defaults 80 MB, however long the text.
    """

    sources: tuple[TextSourceConfig, ...]
    ngram: int = 3
    bits: int = 22

    def __post_init__(self):
        _check_features(self)
        _check_sources(self, "sources")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainImportanceConfig:
    """Weights for importance resampling, DSIR (Xie et al. 2023, arXiv:2302.03169): log p_target(x) - log p_raw(x).

    Both are unigram models of the hashed n-grams, with one added to every count.

    Attributes:
      target: texts that the selection shall resemble.
      raw: texts to choose from, or a sample of them.
      per: "document" is the paper's weight, the sum over a document's n-grams, which between documents of different
        length is mostly length; "ngram" is the mean.
    """

    target: tuple[TextSourceConfig, ...]
    raw: tuple[TextSourceConfig, ...]
    ngram: int = 2
    bits: int = 14
    per: Literal["document", "ngram"] = "document"

    def __post_init__(self):
        _check_features(self)
        _check_sources(self, "target", "raw")


TrainQualityConfig = (
    TrainClassifierConfig
    | TrainRegressionConfig
    | TrainPreferenceConfig
    | TrainNgramModelConfig
    | TrainImportanceConfig
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityTrainingConfig:
    """A quality model to train, and the directory it is written to.

    Attributes:
      output_dir: gets model.json (what it is, how well it does on held-out texts, hashes) and model.npz (its numbers).
      model: what to train.
      normalise: cleaning of the texts; that of the pipelines which will use the model.
      held_out_fraction: of the texts, by the hash of each, kept from training to measure the model.
      seed: of the order of training.
    """

    output_dir: str
    model: TrainQualityConfig
    normalise: NormaliseConfig | None = NormaliseConfig()  # noqa: RUF009 (frozen)
    held_out_fraction: float = 0.1
    seed: int = 0

    def __post_init__(self):
        directory(self, "output_dir")
        require(
            0 < self.held_out_fraction < 1,
            self,
            f"held_out_fraction must lie between 0 and 1, both excluded, got {self.held_out_fraction}",
        )
        not_negative(self, "seed")


def _check_features(config) -> None:
    require(1 <= config.ngram <= 8, config, f"ngram must lie between 1 and 8, got {config.ngram}")
    require(8 <= config.bits <= 28, config, f"bits must lie between 8 and 28, got {config.bits}")


def _check_sources(config, *names: str) -> None:
    for name in names:
        require(len(getattr(config, name)) > 0, config, f"{name} needs at least one source, got ()")
