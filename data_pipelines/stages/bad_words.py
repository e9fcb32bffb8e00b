"""How many words of a list a document has, as C4 looks for them (arXiv:1910.10683, 2.2)."""

import dataclasses
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipelines.stages import alphabet
from data_pipelines.stages.ranges import Ranges
from data_pipelines.stages.texts import Texts
from slmjax.config.filters import BadWordFilterConfig

_WORD = re.compile(r"\w+")


@dataclasses.dataclass(frozen=True)
class _List:
    """Words and phrases in lower case.

    Attributes:
      phrases: all of them.
      by_beginning: those that begin with letters or digits, by the hash of these.
      pairs: whether one may have some first and second, and some third and fourth bytes.
      is_ascii: whether all are.
    """

    phrases: tuple[bytes, ...]
    by_beginning: dict[int, list[bytes]]
    pairs: tuple[np.ndarray, np.ndarray]
    is_ascii: bool


def measure(config: BadWordFilterConfig, texts: Texts) -> dict[str, pa.Array]:
    """How often the words occur, whatever the case of their letters."""
    words = _read(config.words, config.path)
    if not texts.is_ascii and not words.is_ascii:
        lowered = Texts.from_array(pc.call_function("utf8_lower", [texts.array]))
    else:
        lowered = Texts(texts.lower, texts.starts, texts.ends)
        lowered.kinds = texts.kinds
    found = _occurrences(words, lowered, whole=config.whole_words)
    starts = [start for start, size in found if not config.whole_words or _alone(lowered, start, size)]
    documents = np.searchsorted(lowered.starts, np.array(starts, np.int64), side="right") - 1
    return {"bad_words": pa.array(np.bincount(documents, minlength=len(texts)))}


def _occurrences(words: _List, texts: Texts, *, whole: bool) -> Iterator[tuple[int, int]]:
    """Where a phrase stands in the text, and its size; of whole words only where letters and digits begin."""
    for phrase in words.phrases:
        if not whole or not _WORD.match(phrase.decode()):
            start = texts.raw.find(phrase)
            while start >= 0:
                yield start, len(phrase)
                start = texts.raw.find(phrase, start + len(phrase))
    if not whole:
        return
    word = (texts.kinds & alphabet.WORD) != 0
    starts = np.flatnonzero(word[1:] & ~word[:-1]) + 1
    for pairs, offset in zip(words.pairs, (0, 2), strict=True):
        both = texts.data[starts + offset].astype(np.int64) << 8 | texts.data[starts + offset + 1]
        starts = starts[pairs[both]]
    ends = np.array([_end(word, start) for start in starts.tolist()], np.int64)
    for start, beginning in zip(starts.tolist(), Ranges(texts, starts, ends).hashes.tolist(), strict=True):
        for phrase in words.by_beginning.get(beginning, ()):
            if texts.raw.startswith(phrase, start):
                yield start, len(phrase)


def _end(word: np.ndarray, start: int) -> int:
    size = 16
    while word[start : start + size].all():
        size *= 2
    return start + int(word[start : start + size].argmin())


def _alone(texts: Texts, start: int, size: int) -> bool:
    """Whether no letter or digit stands before or after."""
    return not (texts.kinds[start - 1] | texts.kinds[start + size]) & alphabet.WORD


@functools.cache
def _read(words: tuple[str, ...], path: str | None) -> _List:
    listed = list(words)
    if path is not None:
        listed += Path(os.path.expandvars(path)).expanduser().read_text(encoding="utf-8").splitlines()
    phrases = tuple(sorted({word.strip().lower().encode() for word in listed if word.strip()}))
    by_beginning: dict[int, list[bytes]] = {}
    pairs = (np.zeros(1 << 16, bool), np.zeros(1 << 16, bool))
    for phrase in phrases:
        begins = _WORD.match(phrase.decode())
        if begins is None:
            continue
        beginning = begins.group()
        key = int(Texts.of([beginning]).words("whitespace").hashes[0])
        by_beginning.setdefault(key, []).append(phrase)
        for table, pair in zip(pairs, (beginning.encode()[:2], beginning.encode()[2:4]), strict=True):
            low, high = (int.from_bytes(pair.ljust(2, bytes([fill])), "big") for fill in (0, 255))
            table[low : high + 1] = True  # of a shorter word the rest may be anything
    return _List(phrases, by_beginning, pairs, all(phrase.isascii() for phrase in phrases))
