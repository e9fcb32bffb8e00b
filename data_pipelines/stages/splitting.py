"""Words: three ways to split texts into them."""

import functools
import itertools

import numpy as np

from data_pipelines.stages import alphabet, english
from data_pipelines.stages.buffer import Buffer
from data_pipelines.stages.ranges import Words, group

_APOSTROPHES = (0x27, 0x2019)
_TABLE_BITS = 20
_MAX_ENTRIES = 1 << 19
_WHOLE = (0,)


def whitespace(texts: Buffer) -> Words:
    """What stands between white space, as str.split finds it."""
    return _runs(texts, (texts.kinds & alphabet.SPACE) == 0)


def unicode(texts: Buffer) -> Words:
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
    return Words(texts, starts, ends)


def _runs(texts: Buffer, flags: np.ndarray) -> Words:
    """The bytes in a row whose flags are set."""
    edges = np.flatnonzero(flags[1:] != flags[:-1])
    edges += 1
    return Words(texts, edges[0::2].copy(), edges[1::2].copy())


def datatrove(chunks: Words) -> Words:
    """The English words that datatrove counts, punctuation among them; see `english`.

    Each different string between white space, one of `chunks`, is cut once, and remembered for later batches.
    """
    cuts = _cuts()
    entries = cuts.find(chunks)
    counts, first = cuts.counts[entries], cuts.first[entries]
    # Every string between white space becomes as many words as it has pieces.
    ends = np.cumsum(counts)
    within = np.arange(int(counts.sum())) - np.repeat(ends - counts, counts)
    starts = np.repeat(chunks.starts, counts) + cuts.offsets[np.repeat(first, counts) + within]
    stops = np.append(starts[1:], 0)[: len(starts)]
    stops[ends - 1] = chunks.ends
    return Words(chunks.texts, starts, stops)


class _Cuts:
    """Where strings without white space are cut, by their hashes.

    A string is looked for in two places of a table, all strings of a batch at once; where both are taken, in a
    dictionary. Entry 0 is no string's.

    Attributes:
      counts: pieces of each entry.
      first: index of each entry's first piece in `offsets`.
      offsets: where each piece starts, in bytes.
    """

    def __init__(self):
        self._rules = english.Rules()
        self._clear()

    def _clear(self) -> None:
        self._table = np.zeros(1 << _TABLE_BITS, np.int32)
        self._others: dict[int, int] = {}
        self._keys = np.zeros(1, np.uint64)
        self.counts, self.first, self.offsets = (np.zeros(1, np.int64) for _ in range(3))

    def find(self, chunks: Words) -> np.ndarray:
        """The entry of each string, which is made where there is none yet."""
        if len(self._keys) > _MAX_ENTRIES:
            self._clear()
        hashes = chunks.hashes
        entries = np.zeros(len(hashes), np.int32)
        for place in self._places(hashes):
            there = self._table[place]
            found = self._keys[there] == hashes
            entries[found] = there[found]
        unknown = np.flatnonzero(entries == 0)
        order, runs = group(hashes[unknown])
        samples = unknown[order[runs]]
        known = np.array([self._others.get(key, 0) for key in hashes[samples].tolist()], np.int32)
        fresh = np.flatnonzero(known == 0)
        if len(fresh):
            known[fresh] = self._add(hashes[samples[fresh]], chunks.strings(samples[fresh]))
        entries[unknown[order]] = np.repeat(known, np.diff(np.append(runs, len(order))))
        return entries

    def _places(self, hashes: np.ndarray) -> list[np.ndarray]:
        shift = np.uint64(64 - _TABLE_BITS)
        return [(hashes >> shift).view(np.int64), ((hashes << np.uint64(_TABLE_BITS)) >> shift).view(np.int64)]

    def _add(self, hashes: np.ndarray, strings: list[str]) -> np.ndarray:
        """Makes the entries of different strings, and returns them."""
        split = self._rules.split
        offsets = [_offsets(split(string)) for string in strings]
        counts = np.fromiter(map(len, offsets), np.int64, len(offsets))
        entries = np.arange(len(self._keys), len(self._keys) + len(hashes), dtype=np.int32)
        self._keys = np.concatenate([self._keys, hashes])
        self.first = np.concatenate([self.first, len(self.offsets) + np.cumsum(counts) - counts])
        self.counts = np.concatenate([self.counts, counts])
        self.offsets = np.concatenate([self.offsets, np.fromiter(itertools.chain.from_iterable(offsets), np.int64)])
        left = np.ones(len(hashes), bool)
        for place in self._places(hashes):
            free = np.flatnonzero(left & (self._table[place] == 0))
            self._table[place[free]] = entries[free]
            left[self._table[place] == entries] = False
        self._others.update(zip(hashes[left].tolist(), entries[left].tolist(), strict=True))
        return entries


def _offsets(pieces: list[str]) -> tuple[int, ...]:
    """Where each piece starts, in bytes."""
    if len(pieces) == 1:
        return _WHOLE
    sizes = (len(piece) if piece.isascii() else len(piece.encode()) for piece in pieces[:-1])
    return tuple(itertools.accumulate(sizes, initial=0))


@functools.cache
def _cuts() -> _Cuts:
    return _Cuts()
