"""Instruction data: checks of conversations, influence on a target, and an order of documents by diversity."""

import dataclasses
import re
from typing import Literal

from slmjax.config.check import directory, fraction, not_negative, positive, require
from slmjax.config.quality import ScoreFilesConfig

REFUSALS = (
    "i'm sorry, but",
    "i am sorry, but",
    "sorry, but i",
    "i cannot",
    "i can't",
    "i'm unable to",
    "i am unable to",
    "i'm not able to",
    "unfortunately, i cannot",
    "unfortunately, i can't",
    "as an ai",
)
BOILERPLATE = (
    "as an ai language model",
    "as a language model",
    "as an ai assistant",
    "as an ai,",
    "i'm just an ai",
    "i am just an ai",
    "my knowledge cutoff",
    "my last knowledge update",
    "i don't have personal opinions",
    "i do not have personal opinions",
    "trained by openai",
    "<nooutput>",
    "<noinput>",
)
PLACEHOLDERS = (
    r"\{\{\s*[A-Za-z_][\w .|-]{1,60}\}\}",
    r"\[(?:INSERT|ENTER|ADD|FILL IN|YOUR|NAME|DATE|COMPANY|ADDRESS)\b[^\]\n]{0,60}\]",
    r"\[(?:insert|enter|fill in|your)\b[^\]\n]{0,60}\](?!\()",
    r"<(?:name|date|company|your[ _-][\w -]{1,40}|insert[ _-][\w -]{1,40})>",
)
MARKS = (
    r"<[|\uff5c][\w\u2581]{2,40}[|\uff5c]>",
    r"</?s>",
    r"<</?SYS>>",
    r"\[/?INST\]",
    r"</?(?:start|end)_of_turn>",
    r"### ?(?:Instruction|Input|Response|Human|Assistant|User):",
    r"(?m)^(?:Human|Assistant|USER|ASSISTANT): ",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversationFilterConfig:
    r"""Rules on the turns of a conversation: a template that was not filled in, answers that are none.

    An answer is a turn of the assistant, its question the user's turn before it. Fenced and inline code is not searched
    for placeholders and marks. Words are separated by white space.

    Attributes:
      max_role_errors: turns out of order (a system message or none, then user and assistant in turn), and a last turn
        that is not the assistant's.
      max_empty_turns: turns without a letter or digit.
      max_echoes: answers equal to their question but for letter case and white space.
      max_copied_share: share of an answer's words in runs of `copied_words` that stand in its question; of an answer of
        fewer words 0. The largest of all answers counts.
      max_refusals: answers that begin with one of `refusals`.
      max_boilerplate: answers that hold one of `boilerplate`.
      max_placeholders: places where one of the regular expressions `placeholders` matches.
      max_marks: the same of `marks`: control symbols of this chat template and of others, left in the text.
      max_open_fences: turns with an odd number of code fences.
      max_unfinished: answers that break off: where `ending` is None, those of at least `finished_words` words whose
        last line is not indented, nor of a list, a table or a heading, and ends with a letter, a comma, a dash or an
        opening bracket; else those that the regular expression `ending` does not match at the end.
      max_language_changes: answers in another language than their question, where `languages` is set and both are
        identified with a probability of at least `language_score`; needs the extra `data`.
      min_shortest_question, max_longest_question, min_shortest_answer, max_longest_answer: words of every turn of the
        user and of the assistant.
    """

    max_role_errors: int | None = 0
    max_empty_turns: int | None = 0
    max_echoes: int | None = 0
    max_copied_share: float | None = 0.9
    max_refusals: int | None = 0
    max_boilerplate: int | None = 0
    max_placeholders: int | None = 0
    max_marks: int | None = 0
    max_open_fences: int | None = 0
    max_unfinished: int | None = 0
    max_language_changes: int | None = 0
    min_shortest_question: int | None = None
    max_longest_question: int | None = None
    min_shortest_answer: int | None = None
    max_longest_answer: int | None = None
    refusals: tuple[str, ...] = REFUSALS
    boilerplate: tuple[str, ...] = BOILERPLATE
    placeholders: tuple[str, ...] = PLACEHOLDERS
    marks: tuple[str, ...] = MARKS
    copied_words: int = 5
    finished_words: int = 20
    ending: str | None = None
    languages: bool = False
    language_score: float = 0.9

    def __post_init__(self):
        positive(self, "copied_words", "finished_words")
        fraction(self, "max_copied_share", "language_score")
        for name in ("refusals", "boilerplate"):
            phrases = getattr(self, name)
            require(all(phrase.strip() for phrase in phrases), self, f"{name} must not be blank, got {phrases}")
        for name in ("placeholders", "marks", "ending"):
            patterns = getattr(self, name)
            for pattern in (patterns,) if isinstance(patterns, str) else patterns or ():
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(
                        f"{type(self).__name__}: {name} has {pattern!r}, which is no regular expression: {error}"
                    ) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """Conversations that a model is to become good at: a directory of parquet files, as a pipeline's documents/.

    `name` is part of a column's name; a gradient is taken of the first `max_documents`.
    """

    name: str
    path: str
    max_documents: int | None = 200

    def __post_init__(self):
        require(re.fullmatch(r"\w+", self.name) is not None, self, f"name must be one word, got {self.name!r}")
        positive(self, "max_documents")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfluenceConfig:
    """How much a step on a conversation would help with targets: LESS (Xia et al. 2024, arXiv:2402.04333).

    Gradients are those of low-rank adapters (Hu et al. 2021, arXiv:2106.09685) as they start: the first factor random,
    the second zero, so that the model is that of the checkpoint and the second factor alone has a gradient.

    Attributes:
      targets: sets of conversations.
      projections: names of the weights with adapters, from their beginnings.
      rank: of the adapters.
      dimensions: numbers that the gradients are projected to.
      moments: "adam" gives every conversation the update of Adam from the moments in the checkpoint, as the paper has
        it, "none" its gradient, "auto" the former where the checkpoint has the moments of all these weights. Targets
        have gradients in any case.
      seed: of the adapters and the projection.
    """

    targets: tuple[TargetConfig, ...]
    projections: tuple[str, ...] = ("w_q", "w_k", "w_v", "w_o")
    rank: int = 8
    dimensions: int = 2048
    moments: Literal["auto", "adam", "none"] = "auto"
    seed: int = 0

    def __post_init__(self):
        positive(self, "rank", "dimensions")
        not_negative(self, "seed")
        names = [target.name for target in self.targets]
        require(len(names) > 0, self, "targets needs at least one TargetConfig, got ()")
        require(len(names) == len(set(names)), self, f"names of targets must differ, got {names}")
        require(len(self.projections) > 0, self, "projections needs the name of at least one weight, got ()")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiversityConfig:
    """An order of documents in which every next one is unlike those before, written as files of scores.

    Attributes:
      documents: directory of parquet files, as a pipeline's documents/.
      output_dir: for the scores: `order` from 1, and `distance` (1 - cosine) to the nearest one chosen before.
      embeddings: directory that `slmjax data score --metric embedding` wrote; None takes hashed words (TF-IDF).
      text: what hashed words are taken of: all of a document, or the turns of the user in a conversation.
      method: "k_centre" chooses the farthest from all chosen ones (Sener & Savarese 2018, arXiv:1708.00489);
        "score_first" goes by falling `scores` and chooses what is at least `min_distance` from all chosen ones (DEITA,
        Liu et al. 2024, arXiv:2312.15685).
      scores: for "score_first".
      max_documents: stop when so many are chosen; None is no limit.
      min_distance: stop ("score_first": pass over) where the distance is smaller.
      dimensions: of the vectors of hashed words.
      worker_bytes: vectors that are in memory at one time; others are read from disk for every choice.
    """

    documents: str
    output_dir: str
    embeddings: str | None = None
    text: Literal["all", "question"] = "all"
    method: Literal["k_centre", "score_first"] = "k_centre"
    scores: ScoreFilesConfig | None = None
    max_documents: int | None = None
    min_distance: float = 0.0
    dimensions: int = 256
    worker_bytes: int = 512 << 20

    def __post_init__(self):
        directory(self, "output_dir")
        positive(self, "max_documents", "dimensions", "worker_bytes")
        require(0 <= self.min_distance <= 2, self, f"min_distance must lie between 0 and 2, got {self.min_distance}")
        require(
            (self.method == "score_first") == (self.scores is not None),
            self,
            f"scores goes with method = 'score_first', got {self.method!r} and {self.scores}",
        )
