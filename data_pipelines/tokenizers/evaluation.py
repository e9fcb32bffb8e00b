"""How well tokenizers fit texts: bytes a token, tokens a word, round trips, byte tokens, unused pieces."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from data_pipelines.tokenizers.samples import Samples
from slmjax.data.tokenizer import Tokenizer

ALL = "all"


@dataclasses.dataclass(kw_only=True)
class Counts:
    """What was counted of some texts.

    Attributes:
      words: separated by white space.
      byte_tokens: tokens that are single bytes, of characters without a piece.
      failures: texts that do not come back from their ids.
    """

    documents: int = 0
    bytes: int = 0
    words: int = 0
    tokens: int = 0
    byte_tokens: int = 0
    failures: int = 0

    def add(self, **numbers: int) -> None:
        """Adds a text."""
        for name, number in numbers.items():
            setattr(self, name, getattr(self, name) + number)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text a token."""
        return self.bytes / max(self.tokens, 1)

    @property
    def tokens_per_word(self) -> float:
        """Tokens for each word separated by white space."""
        return self.tokens / max(self.words, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Of one tokenizer.

    Attributes:
      groups: by ("source", name), ("language", name), and (ALL, "").
      unused: ids of learned pieces and symbols that no text needs.
    """

    sha256: str
    vocab_size: int
    groups: Mapping[tuple[str, str], Counts]
    unused: Sequence[int]

    def to_json(self) -> dict[str, Any]:
        """All numbers."""
        groups = [
            {
                **({} if by == ALL else {by: name}),
                **dataclasses.asdict(counts),
                "bytes_per_token": counts.bytes_per_token,
                "tokens_per_word": counts.tokens_per_word,
            }
            for (by, name), counts in self.groups.items()
        ]
        return {
            "sha256": self.sha256,
            "vocab_size": self.vocab_size,
            "unused_pieces": len(self.unused),
            "groups": groups,
        }


def evaluate(tokenizers: Sequence[Tokenizer], samples: Samples) -> list[Evaluation]:
    """Evaluates tokenizers on the same texts.

    Raises:
      ValueError: there are no texts.
    """
    groups = [collections.defaultdict(Counts) for _ in tokenizers]
    used = [np.zeros(tokenizer.vocab_size, bool) for tokenizer in tokenizers]
    kinds = [np.array([tokenizer.kind(i) for i in range(tokenizer.vocab_size)]) for tokenizer in tokenizers]
    single_bytes = [kind == "byte" for kind in kinds]
    for batch in samples.batches():
        texts = [sample.text for sample in batch]
        words = [len(text.split()) for text in texts]
        sizes = [len(text.encode()) for text in texts]
        for i, tokenizer in enumerate(tokenizers):
            ids, offsets = encoded = tokenizer.encode_arrays(texts)
            used[i][ids] = True
            before = np.append(0, np.cumsum(single_bytes[i][ids]))[offsets]
            columns = zip(batch, words, sizes, encoded.lists(), np.diff(before).tolist(), strict=True)
            for sample, num_words, size, row, byte_tokens in columns:
                numbers = {
                    "documents": 1,
                    "bytes": size,
                    "words": num_words,
                    "tokens": len(row),
                    "byte_tokens": byte_tokens,
                    "failures": int(tokenizer.decode(row) != sample.text),
                }
                for group in ((ALL, ""), ("source", sample.source), ("language", sample.language or "unknown")):
                    groups[i][group].add(**numbers)
    if not groups[0]:
        raise ValueError(
            f"no texts to evaluate on; {sum(samples.rejected.values())} records were rejected: give others"
        )
    return [
        Evaluation(
            sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            groups=counts,
            unused=np.flatnonzero(~seen & np.isin(kind, ("piece", "symbol"))).tolist(),
        )
        for tokenizer, counts, seen, kind in zip(tokenizers, groups, used, kinds, strict=True)
    ]


def print_evaluations(names: Sequence[str], evaluations: Sequence[Evaluation], console: Console) -> None:
    """Tables of tokenizers side by side: of all texts, then bytes a token by source and by language."""
    overall = Table(
        Column("tokenizer", overflow="fold"),
        *_right("pieces", "unused", "bytes a token", "tokens a word", "byte tokens", "failures"),
    )
    for name, evaluation in zip(names, evaluations, strict=True):
        counts = evaluation.groups[ALL, ""]
        overall.add_row(
            name,
            f"{evaluation.vocab_size:,}",
            f"{len(evaluation.unused):,}",
            f"{counts.bytes_per_token:.3f}",
            f"{counts.tokens_per_word:.3f}",
            f"{counts.byte_tokens / max(counts.tokens, 1):.3%}",
            f"{counts.failures:,} of {counts.documents:,}",
        )
    console.print(overall)
    for by in ("source", "language"):
        groups = sorted(name for kind, name in evaluations[0].groups if kind == by)
        if len(groups) == 1:  # all texts, which are in the first table
            continue
        table = Table(by, *_right("documents", "MB", *(f"bytes a token {name}" for name in names)))
        for group in groups:
            counts = [evaluation.groups[by, group] for evaluation in evaluations]
            sizes = [f"{counts[0].documents:,}", f"{counts[0].bytes / 1e6:.2f}"]
            table.add_row(group, *sizes, *(f"{count.bytes_per_token:.3f}" for count in counts))
        console.print(table)


def _right(*headers: str) -> list[Any]:
    return [Column(header, justify="right", overflow="fold") for header in headers]
