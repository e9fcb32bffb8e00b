"""Parts of texts, such as words and lines, as arrays: where they start and end, their sizes, hashes and flags."""

import functools

import numpy as np

from data_pipelines.stages.buffer import Buffer
from data_pipelines.stages.compiled import compiled

# Odd, so that multiplication loses nothing; the fraction of the golden ratio (Knuth, TAOCP 3, 6.4), and another.
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_OTHER = np.uint64(0xD6E8FEB86659FD93)
_HALF = np.uint64(32)
_NEAR = 32  # so many ranges are looked through one by one
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

    def index(self, positions: np.ndarray) -> np.ndarray:
        """Index of the first range that starts at or after each position; fast where these are in order."""
        return _first_at_or_after(self.starts, positions)

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Sum of values or flags, one for each range, over the ranges of each document."""
        return _sums(values, self.first)

    @functools.cached_property
    def bytes(self) -> np.ndarray:
        """Length of each range."""
        return self.ends - self.starts

    @functools.cached_property
    def hashes(self) -> np.ndarray:
        """uint64 hash of the bytes of each range, the same everywhere; up to eight bytes no two are equal."""
        data = self.texts.data
        eights = np.ndarray((len(data) - 7,), np.dtype("<u8"), data, 0, (1,))  # that start at each byte
        return _hashes(eights, self.starts, self.ends)

    def strings(self, rows: np.ndarray) -> list[str]:
        """The text of some ranges."""
        raw = self.texts.raw
        starts, ends = self.starts[rows].tolist(), self.ends[rows].tolist()
        return [raw[start:end].decode() for start, end in zip(starts, ends, strict=True)]


class Words(Ranges):
    """Words, of which none touches the next one but where characters are words."""

    @functools.cached_property
    def _chars_before(self) -> np.ndarray:
        return np.append(0, np.cumsum(self.texts.chars(self.starts, self.ends)))

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


@compiled
def _hashes(eights, starts, ends):
    """The first eight bytes, the last eight of more than that, and of more than 16 all others, eight by eight."""
    hashes = np.empty(len(starts), np.uint64)
    for i in range(len(starts)):
        at, left = starts[i], ends[i] - starts[i]
        value = np.uint64(left) * _OTHER
        value ^= eights[at] & _FIRST_BYTES[min(left, 8)]
        value *= MULTIPLIER
        value ^= value >> _HALF
        if left > 8:
            longer = eights[ends[i] - 8] * _OTHER
            longer ^= longer >> _HALF
            if left > 16:
                power = MULTIPLIER
                while left > 8:
                    at += 8
                    left -= 8
                    content = (eights[at] & _FIRST_BYTES[min(left, 8)]) * _OTHER
                    content ^= content >> _HALF
                    power *= MULTIPLIER
                    longer += content * power
            value += longer * MULTIPLIER
        hashes[i] = value
    return hashes


@compiled
def _first_at_or_after(starts, positions):
    indices = np.empty(len(positions), np.int64)
    index, before = 0, -1
    for i in range(len(positions)):
        position = positions[i]
        if position < before:
            index = 0
        near = min(index + _NEAR, len(starts))
        while index < near and starts[index] < position:
            index += 1
        if index == near < len(starts):
            index += np.searchsorted(starts[index:], position)
        indices[i] = index
        before = position
    return indices


@compiled
def _sums(values, first):
    sums = np.zeros(len(first) - 1, np.int64)
    for document in range(len(sums)):
        total = 0
        for i in range(first[document], first[document + 1]):
            total += values[i]
        sums[document] = total
    return sums
