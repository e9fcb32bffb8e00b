"""One offline data pipeline: sources, filters, deduplication, split, tokenizer and where the token stores go."""

import dataclasses
from typing import Literal

from slmjax.config.check import directory, positive, require, utf8
from slmjax.config.dedup import (
    CorpusStageConfig,
    ExactDedupConfig,
    NearDedupConfig,
    PassageDedupConfig,
    SubstringDedupConfig,
)
from slmjax.config.engines import EngineConfig, LocalEngineConfig
from slmjax.config.filters import FilterConfig, MaskPersonalDataConfig, RewriteConfig
from slmjax.config.instruction import ConversationFilterConfig
from slmjax.config.quality import GeneratedFilesSourceConfig, QualityFilterConfig, QualitySampleConfig
from slmjax.config.sources import ConversationSourceConfig, TextSourceConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormaliseConfig:
    r"""Cleans every text: line ends become \n, control characters other than tab and line feed go.

    Attributes:
      unicode_form: the Unicode normalisation, None for none.
      repair_mojibake: undo that UTF-8 was read as another encoding, as in "fÃ¼r"; needs the package ftfy, and is slow.
    """

    unicode_form: Literal["NFC", "NFKC"] | None = "NFC"
    repair_mojibake: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Held-out documents, chosen by the hash of `salt` and each document's split key.

    The key is the module path for the standard library, the value of id_field where there is one, the first user turn
    of a conversation, and else the text: a document stays on its side whatever else the corpus holds.
    """

    held_out_fraction: float = 0.01
    salt: str = "slmjax"

    def __post_init__(self):
        require(
            0 <= self.held_out_fraction < 1,
            self,
            f"held_out_fraction must lie in [0, 1), got {self.held_out_fraction}",
        )
        utf8(self, "salt")


FIXED_PIECES = 300  # control symbols, line breaks with indentation and bytes, in every vocabulary that is trained


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainTokenizerConfig:
    """Trains a SentencePiece model on the training split; see `slmjax.data.tokenizer.train_tokenizer`.

    Attributes:
      vocab_size: number of ids, of which FIXED_PIECES are there whatever the text.
      user_symbols: strings that are always one piece.
      split_digits: make every digit a token of its own.
      pieces_across_words: let pieces span spaces and mix letters with punctuation.
      max_passages: train on a random sample of this many passages (of at most 4,000 characters); None is all.
      seed: of that sample.
    """

    vocab_size: int
    model_type: Literal["bpe", "unigram"] = "bpe"
    user_symbols: tuple[str, ...] = ()
    character_coverage: float = 0.9995
    split_digits: bool = True
    pieces_across_words: bool = False
    max_passages: int | None = 25_000
    seed: int = 0

    def __post_init__(self):
        positive(self, "max_passages")
        require(
            FIXED_PIECES < self.vocab_size < 2**31,
            self,
            f"vocab_size must be more than {FIXED_PIECES}, which are control symbols, line breaks and bytes, and less "
            f"than 2**31, got {self.vocab_size}",
        )
        require(
            0.98 <= self.character_coverage <= 1,
            self,
            f"character_coverage must lie between 0.98 and 1, got {self.character_coverage}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExistingTokenizerConfig:
    """A tokenizer model trained before; environment variables and ~ in `path` are expanded."""

    path: str


StageConfig = FilterConfig | ConversationFilterConfig | CorpusStageConfig | QualityFilterConfig | QualitySampleConfig

MIN_WORKER_BYTES = 1 << 20
_CUTTING = (PassageDedupConfig, SubstringDedupConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """A corpus: read, normalised, filtered, split, tokenised. Running the same config again resumes or does nothing.

    Attributes:
      output_dir: everything the pipeline writes, which depends neither on this nor on engine, num_workers and
        worker_bytes; a source never reads what lies in here.
      sources: all text or all conversations.
      normalise: cleaning before everything else; None leaves the texts as they are.
      stages: filters and deduplications, in order.
      engine: where the work is done.
      num_workers: tasks at the same time, each in a process; None is one for every processor.
      shard_bytes: text in one file between steps, the unit of parallel work and of resuming.
      worker_bytes: memory for what one worker holds of the whole corpus in a stage that looks at all of it, at least
        1 MiB; less means more and smaller pieces, each a task, and the same output.
    """

    output_dir: str
    sources: tuple[TextSourceConfig | ConversationSourceConfig, ...]
    tokenizer: TrainTokenizerConfig | ExistingTokenizerConfig
    normalise: NormaliseConfig | None = NormaliseConfig()
    stages: tuple[StageConfig, ...] = ()
    split: SplitConfig = SplitConfig()
    engine: EngineConfig = LocalEngineConfig()  # noqa: RUF009 (frozen)
    num_workers: int | None = None
    shard_bytes: int = 32 << 20
    worker_bytes: int = 512 << 20

    def __post_init__(self):
        positive(self, "num_workers", "shard_bytes")
        require(
            self.worker_bytes >= MIN_WORKER_BYTES,
            self,
            f"worker_bytes must be at least {MIN_WORKER_BYTES} (1 MiB), got {self.worker_bytes}: stages over the whole "
            "corpus make a task of each eighth of it; a worker takes hundreds of MB beside it",
        )
        directory(self, "output_dir")
        require("://" not in self.output_dir, self, f"output_dir must be a local directory, got {self.output_dir!r}")
        for source in self.sources:
            utf8(source, "name")
        names = [source.name for source in self.sources]
        require(len(names) > 0, self, "sources needs at least one source, got ()")
        require(len(names) == len(set(names)), self, f"names of sources must differ, got {names}")
        kinds = {isinstance(source, ConversationSourceConfig) for source in self.sources}
        require(
            len(kinds) == 1, self, f"sources must be all text or all conversations (write two configs), got {names}"
        )
        cutting = [type(stage).__name__ for stage in self.stages if isinstance(stage, _CUTTING)]
        require(
            not (self.conversations and cutting), self, f"{cutting} cut from texts, which would break conversations"
        )
        of_turns = [
            type(stage).__name__
            for stage in self.stages
            if isinstance(stage, ConversationFilterConfig)
            or (isinstance(stage, ExactDedupConfig) and stage.by == "question")
        ]
        require(
            self.conversations or not of_turns,
            self,
            f"{of_turns} look at questions and answers, but sources has texts; take a source of conversations",
        )
        generated = [source.name for source in self.sources if isinstance(source, GeneratedFilesSourceConfig)]
        deduplicated = any(isinstance(stage, ExactDedupConfig | NearDedupConfig) for stage in self.stages)
        selected = any(
            isinstance(stage, QualitySampleConfig) or (isinstance(stage, QualityFilterConfig) and stage.has_bound)
            for stage in self.stages
        )
        require(
            not generated or (deduplicated and selected),
            self,
            f"generated text (sources {generated}) enters only through deduplication and a quality stage: stages needs "
            "ExactDedupConfig or NearDedupConfig, and QualityFilterConfig with a bound or QualitySampleConfig",
        )

        self._check_rewrites()

    def _check_rewrites(self):
        """What changes texts comes before what looks at the whole corpus, and leaves conversations whole."""
        rewrites = [i for i, stage in enumerate(self.stages) if isinstance(stage, RewriteConfig)]
        others = [i for i, stage in enumerate(self.stages) if not isinstance(stage, FilterConfig)]
        if rewrites and others:
            last, first = (type(self.stages[i]).__name__ for i in (rewrites[-1], others[0]))
            require(rewrites[-1] < others[0], self, f"{last} changes texts and must come before {first}")
        for stage in self.stages:
            fits = not self.conversations or not isinstance(stage, RewriteConfig)
            name = type(stage).__name__
            require(
                fits or isinstance(stage, MaskPersonalDataConfig),
                self,
                f"{name} would tear conversations apart; remove it",
            )

    @property
    def conversations(self) -> bool:
        """Whether the sources are conversations, of which only the assistant's turns are learned."""
        return isinstance(self.sources[0], ConversationSourceConfig)
