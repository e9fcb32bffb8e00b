"""Words: three ways to split texts into them."""

import functools
import itertools

import numpy as np

from data_pipelines.stages import alphabet, english
from data_pipelines.stages.buffer import Buffer
from data_pipelines.stages.compiled import compiled
from data_pipelines.stages.ranges import Words

_APOSTROPHES = (0x27, 0x2019)
_TABLE_BITS = 20
_MAX_ENTRIES = 1 << 19
_MAX_PIECES = 1 << 23  # 64 MB
_WHOLE = (0,)
_ONE = np.uint64(1)


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
    return Words(chunks.texts, *_pieces(chunks.starts, chunks.ends, entries, cuts.first, cuts.offsets))


class _Cuts:
    """Where strings without white space are cut, by their hashes. Entry 0 is no string's.

    Attributes:
      first: index of each entry's first piece in `offsets`, and the number of pieces.
      offsets: where each piece starts, in bytes.
    """

    def __init__(self):
        self._rules = english.Rules()
        self._clear()

    def _clear(self) -> None:
        self._table = np.zeros(1 << _TABLE_BITS, np.int32)
        self._keys = np.zeros(1, np.uint64)
        self.first, self.offsets = np.zeros(2, np.int64), np.zeros(0, np.int64)

    def find(self, chunks: Words) -> np.ndarray:
        """The entry of each string, which is made where there is none yet."""
        hashes = chunks.hashes
        entries = _look_up(hashes, self._keys, self._table)
        unknown = np.flatnonzero(entries == 0)
        if len(unknown) == 0:
            return entries
        fresh, samples = np.unique(hashes[unknown], return_index=True)
        if len(self._keys) + len(fresh) > _MAX_ENTRIES or len(self.offsets) > _MAX_PIECES:
            self._clear()
            if len(chunks) > len(unknown):
                return self.find(chunks)
        self._add(fresh, chunks.strings(unknown[samples]))
        entries[unknown] = _look_up(hashes[unknown], self._keys, self._table)
        return entries

    def _add(self, hashes: np.ndarray, strings: list[str]) -> None:
        """Makes the entries of different strings."""
        while 2 * (len(self._keys) + len(hashes)) > len(self._table):  # only of a batch with very many strings
            self._table = np.zeros(2 * len(self._table), np.int32)
            _enter(self._keys, 1, self._table)
        split = self._rules.split
        offsets = [_offsets(split(string)) for string in strings]
        counts = np.fromiter(map(len, offsets), np.int64, len(offsets))
        number = len(self._keys)
        self._keys = np.concatenate([self._keys, hashes])
        self.first = np.concatenate([self.first, self.first[-1] + np.cumsum(counts)])
        self.offsets = np.concatenate([self.offsets, np.fromiter(itertools.chain.from_iterable(offsets), np.int64)])
        _enter(self._keys, number, self._table)


def _offsets(pieces: list[str]) -> tuple[int, ...]:
    """Where each piece starts, in bytes."""
    if len(pieces) == 1:
        return _WHOLE
    sizes = (len(piece) if piece.isascii() else len(piece.encode()) for piece in pieces[:-1])
    return tuple(itertools.accumulate(sizes, initial=0))


@functools.cache
def _cuts() -> _Cuts:
    return _Cuts()


@compiled
def _look_up(hashes, keys, table):
    """Index of each hash among the keys, 0 where it is none; `table` has the keys at their lowest bits or after."""
    entries = np.empty(len(hashes), np.int64)
    mask = np.uint64(len(table) - 1)
    for i in range(len(hashes)):
        place = hashes[i] & mask
        while table[place] != 0 and keys[table[place]] != hashes[i]:
            place = (place + _ONE) & mask
        entries[i] = table[place]
    return entries


@compiled
def _enter(keys, first, table):
    """Enters keys from `first` on."""
    mask = np.uint64(len(table) - 1)
    for entry in range(first, len(keys)):
        place = keys[entry] & mask
        while table[place] != 0:
            place = (place + _ONE) & mask
        table[place] = entry


@compiled
def _pieces(chunk_starts, chunk_ends, entries, first, offsets):
    """Where the pieces of all strings start and end.

    Strings can be made whose hashes are equal; what is cut as a longer one was has its last pieces empty.
    """
    number = 0
    for i in range(len(entries)):
        number += first[entries[i] + 1] - first[entries[i]]
    starts, ends = np.empty(number, np.int64), np.empty(number, np.int64)
    at = 0
    for i in range(len(entries)):
        for piece in range(first[entries[i]], first[entries[i] + 1]):
            starts[at] = min(chunk_starts[i] + offsets[piece], chunk_ends[i])
            if piece > first[entries[i]]:
                ends[at - 1] = starts[at]
            at += 1
        ends[at - 1] = chunk_ends[i]
    return starts, ends
