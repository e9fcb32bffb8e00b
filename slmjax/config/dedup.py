"""Stages that look at the whole corpus: exact, near and passage-wise deduplication, and decontamination."""

import dataclasses
from typing import Literal

from slmjax.config.check import fraction, not_negative, positive, require

# `against` of every class: output directories of earlier pipelines. Their selected documents come before those of this
# one and are always kept.


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactDedupConfig:
    """Keeps one of the documents that are equal but for letter case and white space, or that have the same id.

    A pipeline with an id_field begins with a stage by = "id" of itself, `unique_ids`.

    Attributes:
      by: what is compared; "question" is all turns of the user in a conversation.
      survivor: which one: the first in the order of the corpus, the longest, or the "best", with the highest `score`.
        Between equals the first.
      score: "<stage>.<attribute>", such as "quality_filter.score", of an earlier stage; for survivor = "best".
      against: output directories of earlier pipelines, whose documents are kept rather than any of these.
    """

    by: Literal["text", "id", "question"] = "text"
    survivor: Literal["first", "longest", "best"] = "first"
    score: str | None = None
    against: tuple[str, ...] = ()

    def __post_init__(self):
        _check_survivor(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NearDedupConfig:
    """Keeps one of documents that share most of their word n-grams: MinHash (Broder 1997), then a check of every pair.

    Two documents of Jaccard similarity s become candidates with probability 1 - (1 - s^rows)^bands; the defaults are
    FineWeb's (arXiv:2406.17557) and find half the pairs of s = 0.72. A candidate is dropped where its true similarity
    to a document that is kept is at least `similarity`.

    Attributes:
      bands: groups of `rows` permutations each; documents are candidates where one whole group agrees.
      ngram: words in a row that make one element of a document's set.
      similarity: Jaccard similarity of the sets of two documents from which on they are duplicates.
      survivor, score, against: as in ExactDedupConfig.
      signature_bytes: only words that start in so many bytes of a document count, since very long documents resemble
        everything.
      comparisons: with how many documents, those that share the most bands with it, a document is compared at most.
      seed: of the permutations.
    """

    bands: int = 14
    rows: int = 8
    ngram: int = 5
    similarity: float = 0.7
    survivor: Literal["first", "longest", "best"] = "first"
    score: str | None = None
    against: tuple[str, ...] = ()
    signature_bytes: int = 500_000
    comparisons: int = 50
    seed: int = 0

    def __post_init__(self):
        positive(self, "bands", "rows", "ngram", "signature_bytes", "comparisons")
        require(
            self.bands * self.rows <= 1 << 14,
            self,
            f"bands * rows, permutations of every document, must be at most {1 << 14}, got {self.bands} * {self.rows}",
        )
        fraction(self, "similarity")
        not_negative(self, "seed")
        require(self.seed < 2**63, self, f"seed must be less than 2**63, got {self.seed}")
        _check_survivor(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassageDedupConfig:
    """Cuts paragraphs or lines that occurred before in the corpus, letter case and white space aside.

    Attributes:
      unit: a paragraph ends at an empty line.
      shortest_words: passages of fewer words, separated by white space, stay.
      max_cut_share: documents of which more is cut are dropped; None is no bound. One with nothing left always is.
      against: as in ExactDedupConfig.
    """

    unit: Literal["paragraph", "line"]
    shortest_words: int = 10
    max_cut_share: float | None = None
    against: tuple[str, ...] = ()

    def __post_init__(self):
        positive(self, "shortest_words")
        fraction(self, "max_cut_share")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubstringDedupConfig:
    """Cuts every run of at least `words` words that occurred before in the corpus (Lee et al. 2022, arXiv:2107.06499).

    They use 50 tokens of byte-pair encoding; here words are separated by white space, and letter case does not matter.

    Attributes:
      words: in the shortest run that is cut.
      max_cut_share, against: as in PassageDedupConfig.
    """

    words: int = 50
    max_cut_share: float | None = None
    against: tuple[str, ...] = ()

    def __post_init__(self):
        positive(self, "words")
        fraction(self, "max_cut_share")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationTextConfig:
    """Items of an evaluation set, jsonl or parquet: texts that must not be trained on.

    Attributes:
      paths: files, directories, globs or fsspec addresses; environment variables and ~ are expanded.
      name: in the report.
      fields: of a record, each a text or a list of texts. Every text is looked for by itself.
      id_field: what the report calls an item; None is its file and number.
      format, max_record_bytes: as in FilesSourceConfig.
    """

    paths: tuple[str, ...]
    name: str
    fields: tuple[str, ...] = ("text",)
    id_field: str | None = None
    format: Literal["auto", "jsonl", "parquet"] = "auto"
    max_record_bytes: int = 32 << 20

    def __post_init__(self):
        require(len(self.paths) > 0, self, "paths needs at least one file, directory, glob or address, got ()")
        require(len(self.fields) > 0, self, "fields needs the name of at least one field, got ()")
        positive(self, "max_record_bytes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecontaminationConfig:
    """Drops documents that hold text of evaluation sets: word n-grams in common (Brown et al. 2020, arXiv:2005.14165).

    Words are runs of letters, marks and digits without case. N-grams without a letter do not count. A text of fewer
    than `ngram` words is looked for as a whole; one of fewer than `shortest_words` only as a document of its own, since
    what is so short occurs anywhere.

    Attributes:
      evaluations: the evaluation sets.
      ngram: words in a row.
      max_matches: places of a document where an n-gram of an evaluation set starts.
      max_item_share: the largest share of the n-grams of one text of an evaluation set found in a document.
    """

    evaluations: tuple[EvaluationTextConfig, ...]
    ngram: int = 13
    shortest_words: int = 8
    max_matches: int | None = 0
    max_item_share: float | None = None

    def __post_init__(self):
        positive(self, "ngram", "shortest_words")
        fraction(self, "max_item_share")
        names = [evaluation.name for evaluation in self.evaluations]
        require(len(names) > 0, self, "evaluations needs at least one evaluation set, got ()")
        require(len(names) == len(set(names)), self, f"names of evaluations must differ, got {names}")
        require(self.max_matches is None or self.max_matches >= 0, self, f"max_matches is {self.max_matches}")


CorpusStageConfig = (
    ExactDedupConfig | NearDedupConfig | PassageDedupConfig | SubstringDedupConfig | DecontaminationConfig
)


def _check_survivor(config: ExactDedupConfig | NearDedupConfig) -> None:
    require(
        (config.survivor == "best") == (config.score is not None),
        config,
        f"score goes with survivor = 'best', got survivor = {config.survivor!r} and score = {config.score!r}",
    )
    require(
        config.score is None or config.score.count(".") == 1,
        config,
        f"score must be '<stage>.<attribute>', such as 'quality_filter.score', got {config.score!r}",
    )
