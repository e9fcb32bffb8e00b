"""Words: three ways to split texts into them."""

import functools
from typing import TYPE_CHECKING, assert_never

import numpy as np

from data_pipelines.stages import alphabet, english
from data_pipelines.stages.ranges import Words, group
from slmjax.config.filters import Splitter

if TYPE_CHECKING:
    from data_pipelines.stages.texts import Texts

_APOSTROPHES = (0x27, 0x2019)
_MAX_CACHED = 1 << 19


def words(texts: "Texts", splitter: Splitter) -> Words:
    """The words of all texts."""
    match splitter:
        case "whitespace":
            return whitespace(texts)
        case "unicode":
            return unicode(texts)
        case "datatrove":
            return datatrove(texts)
        case _:
            assert_never(splitter)


def whitespace(texts: "Texts") -> Words:
    """What stands between white space, as str.split finds it."""
    return _runs(texts, (texts.kinds & alphabet.SPACE) == 0)


def unicode(texts: "Texts") -> Words:
    """Letters, marks, digits and underscores in a row; an apostrophe between two letters joins them.

    In scripts without spaces every character is a word.
    """
    kinds = texts.kinds
    word = (kinds & alphabet.WORD) != 0
    letter = (kinds & alphabet.LETTER) != 0
    positions = np.flatnonzero(texts.data[1:-1] == _APOSTROPHES[0]) + 1
    joins = positions[letter[positions - 1] & letter[positions + 1]]
    word[joins] = True
    if texts.beyond is None:
        return _runs(texts, word)
    positions = texts.beyond.positions[texts.beyond.points == _APOSTROPHES[1]]
    joins = positions[letter[positions - 1] & letter[positions + 3]]
    for i in range(3):
        word[joins + i] = True
    alone = (kinds & alphabet.IDEOGRAPH) != 0
    cut = (alone[1:] & ((kinds[1:] & alphabet.CONTINUES) == 0)) | (alone[:-1] & ~alone[1:])
    starts = np.flatnonzero(word[1:] & (~word[:-1] | cut)) + 1
    ends = np.flatnonzero(word[:-1] & (~word[1:] | cut)) + 1
    return Words(texts, starts, ends, word)


def _runs(texts: "Texts", flags: np.ndarray) -> Words:
    """The bytes in a row whose flags are set."""
    edges = np.flatnonzero(flags[1:] != flags[:-1])
    edges += 1
    return Words(texts, edges[0::2].copy(), edges[1::2].copy(), flags)


def datatrove(texts: "Texts") -> Words:
    """The English words that datatrove counts, punctuation among them; see `english`.

    Each different string between white space is cut once, and remembered for the batches that follow.
    """
    chunks = texts.words("whitespace")
    order, runs = group(chunks.hashes)
    sizes = np.diff(np.append(runs, len(order)))
    kind = np.empty(len(chunks), np.int64)  # which different string each is
    kind[order] = np.repeat(np.arange(len(runs)), sizes)
    cache = _cuts()
    if len(cache) > _MAX_CACHED:
        cache.clear()
    samples = order[runs]
    hashes = chunks.hashes[samples].tolist()
    missing = np.array([i for i, key in enumerate(hashes) if key not in cache], np.int64)
    split = _rules().split
    for i, chunk in zip(missing.tolist(), chunks.strings(samples[missing]), strict=True):
        pieces = split(chunk)
        cache[hashes[i]] = _offsets(pieces) if len(pieces) > 1 else _WHOLE
    offsets = [cache[key] for key in hashes]
    counts = np.fromiter(map(len, offsets), np.int64, len(offsets))
    flat = np.fromiter((start for starts in offsets for start in starts), np.int64, int(counts.sum()))
    # Every string between white space becomes as many words as its kind has offsets.
    first = np.cumsum(counts) - counts
    repeats = counts[kind]
    ends = np.cumsum(repeats)
    within = np.arange(int(repeats.sum())) - np.repeat(ends - repeats, repeats)
    starts = np.repeat(chunks.starts, repeats) + flat[np.repeat(first[kind], repeats) + within]
    stops = np.append(starts[1:], 0)[: len(starts)]
    stops[ends - 1] = chunks.ends
    return Words(texts, starts, stops, chunks.inside)


_WHOLE = (0,)


def _offsets(pieces: list[str]) -> tuple[int, ...]:
    """Where each piece starts, in bytes."""
    starts, position = [], 0
    for piece in pieces:
        starts.append(position)
        position += len(piece.encode())
    return tuple(starts)


@functools.cache
def _rules() -> english.Rules:
    return english.Rules()


@functools.cache
def _cuts() -> dict[int, tuple[int, ...]]:
    """By the hash of a string without white space, where its words start."""
    return {}
