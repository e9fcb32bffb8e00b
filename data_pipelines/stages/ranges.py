"""Parts of texts, such as words and lines, as arrays: where they start and end, their sizes, hashes and flags."""

import functools

import numpy as np

from data_pipelines.stages.buffer import Buffer
from data_pipelines.stages.ranks import Ranks, Spread, overlapping

# Odd, so that multiplication loses nothing; the fraction of the golden ratio (Knuth, TAOCP 3, 6.4), and another.
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_OTHER = np.uint64(0xD6E8FEB86659FD93)
_HALF = np.uint64(32)
_FIRST_BYTES = np.array([(1 << 8 * i) - 1 for i in range(9)], np.uint64)


class Ranges:
    """Parts of texts, in order; none crosses from one document to the next.

    Attributes:
      texts: of which these are parts.
      starts, ends: positions of bytes.
    """

    def __init__(self, texts: Buffer, starts: np.ndarray, ends: np.ndarray):
        assert len(starts) == len(ends)
        self.texts = texts
        self.starts = starts
        self.ends = ends

    def __len__(self) -> int:
        return len(self.starts)

    @functools.cached_property
    def first(self) -> np.ndarray:
        """Index of the first range of each document, and at the end the number of ranges."""
        return np.append(np.searchsorted(self.starts, self.texts.starts), len(self))

    @functools.cached_property
    def per_document(self) -> np.ndarray:
        """Number of ranges in each document."""
        return np.diff(self.first)

    @functools.cached_property
    def document(self) -> np.ndarray:
        """Index of the document of each range."""
        return np.repeat(np.arange(len(self.texts)), self.per_document)

    @functools.cached_property
    def _starts_before(self) -> Ranks:
        flags = np.zeros(len(self.texts.raw), bool)
        flags[self.starts] = True
        return Ranks(flags)

    def index(self, positions: np.ndarray) -> np.ndarray:
        """Index of the first range that starts at or after each position."""
        return self._starts_before.before(positions)

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Sum of values or flags, one for each range, over the ranges of each document."""
        if values.dtype == bool:
            return Ranks(values).count(self.first[:-1], self.first[1:])
        sums = np.zeros(len(self.texts), np.int64)
        filled = np.flatnonzero(self.per_document)
        sums[filled] = np.add.reduceat(values, self.first[filled]) if len(filled) else 0
        return sums

    @functools.cached_property
    def bytes(self) -> np.ndarray:
        """Length of each range."""
        return self.ends - self.starts

    @functools.cached_property
    def _spread(self) -> Spread:
        return Spread(self.starts, self.bytes)

    def any(self, flags: np.ndarray) -> np.ndarray:
        """Whether any of `flags`, one for each byte of the texts, is set in each range."""
        return Ranks(flags).any(self._spread)

    @functools.cached_property
    def hashes(self) -> np.ndarray:
        """uint64 hash of the bytes of each range, the same everywhere; up to eight bytes no two are equal."""
        sizes = self.bytes
        view = overlapping(self.texts.data)
        hashes = sizes.view(np.uint64) * _OTHER
        hashes ^= view[self.starts] & _FIRST_BYTES.take(np.minimum(sizes, 8))
        hashes *= MULTIPLIER
        hashes ^= hashes >> _HALF
        # Of the longer ones the last eight bytes are added; of these up to 16 there are no others.
        rows = np.flatnonzero(sizes > 8)
        if len(rows) == 0:
            return hashes
        last = view[self.ends[rows] - 8]
        last *= _OTHER
        last ^= last >> _HALF
        longer = np.flatnonzero(sizes[rows] > 16)
        if len(longer):
            last[longer] += self._between(rows[longer])
        hashes[rows] += last * MULTIPLIER
        return hashes

    def _between(self, rows: np.ndarray) -> np.ndarray:
        """Hashes of all but the first eight bytes of some ranges of more than 16: of every eight bytes, then summed."""
        sizes = self.bytes[rows]
        blocks = (sizes - 1) >> 3
        firsts = np.cumsum(blocks) - blocks
        number = np.arange(1, int(firsts[-1] + blocks[-1]) + 1) - np.repeat(firsts, blocks)
        starts = np.repeat(self.starts[rows], blocks) + (number << 3)
        left = np.repeat(self.ends[rows], blocks) - starts
        content = overlapping(self.texts.data)[starts] & _FIRST_BYTES.take(np.minimum(left, 8))
        content *= _OTHER
        content ^= content >> _HALF
        content *= powers(int(blocks.max()) + 1).take(number)
        return np.add.reduceat(content, firsts)

    def strings(self, rows: np.ndarray) -> list[str]:
        """The text of some ranges."""
        raw = self.texts.raw
        starts, ends = self.starts[rows].tolist(), self.ends[rows].tolist()
        return [raw[start:end].decode() for start, end in zip(starts, ends, strict=True)]


class Words(Ranges):
    """Words. `inside` is, for each byte of the texts, whether it is in a word."""

    def __init__(self, texts: Buffer, starts: np.ndarray, ends: np.ndarray, inside: np.ndarray):
        super().__init__(texts, starts, ends)
        self.inside = inside

    @functools.cached_property
    def _chars_before(self) -> np.ndarray:
        inside = self.inside if self.texts.is_ascii else self.inside & ((self.texts.data & 0xC0) != 0x80)
        return Ranks(inside).before(np.append(self.starts, self.texts.num_bytes))

    def chars_before(self, words: np.ndarray) -> np.ndarray:
        """Characters in all words before some words, of which one may be one past the last."""
        return self._chars_before[words]


def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Quotients; 0 where the whole is nothing."""
    return part / np.maximum(whole, 1)


def powers(number: int) -> np.ndarray:
    """The first powers of the multiplier."""
    return np.multiply.accumulate(np.full(number, MULTIPLIER))


def group(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Brings equal uint64 keys together.

    Returns the order of the keys, those that are equal in the order in which they came, and where in it each run of
    equal keys starts.
    """
    packed, low = _sorted(keys)
    order = (packed & low).view(np.int64)
    ordered = keys[order]
    new = ordered[1:] != ordered[:-1]
    if (new & _alike(packed, low)).any():
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        new = ordered[1:] != ordered[:-1]
    return order, np.flatnonzero(np.append(True, new)[: len(keys)])


def repeated(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where uint64 keys are that occur several times: equal ones together, in the order in which they came.

    Returns their indices, and where in these each run of equal keys starts.
    """
    packed, low = _sorted(keys)
    alike = np.zeros(len(keys) + 1, bool)  # as the one before
    if len(keys):
        alike[1:-1] = _alike(packed, low)
    rows = np.flatnonzero(alike[1:] | alike[:-1])
    order, first = (packed[rows] & low).view(np.int64), ~alike[rows]
    ordered = keys[order]
    if (first[1:] != (ordered[1:] != ordered[:-1])).any():
        order, runs = group(keys)
        sizes = np.diff(np.append(runs, len(keys)))
        several = np.repeat(sizes > 1, sizes)
        sizes = sizes[sizes > 1]
        return order[several], np.cumsum(sizes) - sizes
    return order, np.flatnonzero(first)


def _sorted(keys: np.ndarray) -> tuple[np.ndarray, np.uint64]:
    """Sorted numbers, each of the upper bits of a hash of a key and its index; and a mask of the bits of the index.

    Sorting numbers that hold their own index is several times faster than argsort.
    """
    low = np.uint64((1 << len(keys).bit_length()) - 1)
    packed = keys * MULTIPLIER
    packed &= ~low
    packed |= np.arange(len(keys), dtype=np.uint64)
    packed.sort()
    return packed, low


def _alike(packed: np.ndarray, low: np.uint64) -> np.ndarray:
    """Whether each number but the first agrees with the one before in the bits that were sorted by."""
    return (packed[1:] ^ packed[:-1]) <= low
