"""Parts of texts, such as words and lines, as arrays: where they start and end, their sizes, hashes and flags."""

import functools
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from data_pipelines.stages import alphabet

if TYPE_CHECKING:
    from data_pipelines.stages.texts import Texts

# Odd, so that multiplication loses nothing; the fraction of the golden ratio (Knuth, TAOCP 3, 6.4), and another.
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_OTHER = np.uint64(0xD6E8FEB86659FD93)
_HALF = np.uint64(32)
_FIRST_BYTES = np.array([(1 << 8 * i) - 1 for i in range(9)], np.uint64)
_LONG = 64  # bytes, from where on ranges are looked at one by one


class Ranks:
    """Counts flags, one for each position, between any two positions, from one count for every 64."""

    def __init__(self, flags: np.ndarray):
        packed = np.packbits(flags, bitorder="little")
        self._bits = np.zeros(len(packed) // 8 + 2, np.uint64)
        self._bits.view(np.uint8)[: len(packed)] = packed
        self._before = np.zeros(len(self._bits) + 1, np.int64)
        np.cumsum(np.bitwise_count(self._bits), out=self._before[1:])

    def before(self, positions: np.ndarray) -> np.ndarray:
        """Number of flags before each position."""
        blocks = positions >> 6
        below = (np.uint64(1) << (positions & 63).astype(np.uint64)) - np.uint64(1)
        return self._before[blocks] + np.bitwise_count(self._bits[blocks] & below)

    def count(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Number of flags from starts to ends."""
        return self.before(ends) - self.before(starts)


class Ranges:
    """Parts of texts, in order; none crosses from one document to the next.

    Attributes:
      texts: of which these are parts.
      starts, ends: positions of bytes.
    """

    def __init__(self, texts: "Texts", starts: np.ndarray, ends: np.ndarray):
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
        """Sum of values, one for each range, over the ranges of each document."""
        return np.diff(np.append(0, np.cumsum(values, dtype=np.int64))[self.first])

    @functools.cached_property
    def bytes(self) -> np.ndarray:
        """Length of each range."""
        return self.ends - self.starts

    @functools.cached_property
    def chars(self) -> np.ndarray:
        """Characters in each range."""
        if self.texts.is_ascii:
            return self.bytes
        continuing = np.uint64(0x0101010101010101 * alphabet.CONTINUES)
        counts = np.zeros(len(self), np.int64)
        for rows, block in _blocks(self.texts.kinds, self.starts, self.bytes):
            counts[rows] += np.bitwise_count(block & continuing)
        long = np.flatnonzero(self.bytes > _LONG)
        counts[long] = self.bytes[long] - self.texts.chars(self.starts[long], self.ends[long])
        return self.bytes - counts

    @functools.cached_property
    def kinds(self) -> np.ndarray:
        """Flags of all characters of each range together."""
        return self._flags(self.texts.kinds)

    @functools.cached_property
    def marks(self) -> np.ndarray:
        """Like `kinds`."""
        return self._flags(self.texts.marks)

    def _flags(self, flags: np.ndarray) -> np.ndarray:
        folded = np.zeros(len(self), np.uint64)
        for rows, block in _blocks(flags, self.starts, self.bytes):
            folded[rows] |= block
        for shift in (32, 16, 8):
            folded |= folded >> np.uint64(shift)
        together = folded.astype(np.uint8)
        for i in np.flatnonzero(self.bytes > _LONG):
            together[i] = np.bitwise_or.reduce(flags[self.starts[i] : self.ends[i]])
        return together

    @functools.cached_property
    def hashes(self) -> np.ndarray:
        """uint64 hash of the bytes of each range, the same everywhere; up to eight bytes no two are equal."""
        blocks = _blocks(self.texts.data, self.starts, self.bytes)
        _, first = next(blocks)
        hashes = (first ^ (self.bytes.astype(np.uint64) * _OTHER)) * MULTIPLIER
        for rows, block in blocks:
            mixed = (hashes[rows] ^ (hashes[rows] >> _HALF)) + block
            hashes[rows] = mixed * MULTIPLIER
        for i in np.flatnonzero(self.bytes > _LONG):
            content = self.texts.raw[self.starts[i] : self.ends[i]]
            hashes[i] = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
        return (hashes ^ (hashes >> _HALF)) * _OTHER

    def strings(self, rows: np.ndarray) -> list[str]:
        """The text of some ranges."""
        raw = self.texts.raw
        starts, ends = self.starts[rows].tolist(), self.ends[rows].tolist()
        return [raw[start:end].decode() for start, end in zip(starts, ends, strict=True)]


def _blocks(data: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> Iterator[tuple[slice | np.ndarray, np.ndarray]]:
    """Yields the next up to eight bytes of ranges as uint64, zero after their ends, first of all, then of the longer.

    Those after `_LONG` bytes are left out.
    """
    view = np.ndarray((len(data) - 7,), np.dtype("<u8"), np.ascontiguousarray(data), 0, (1,))
    yield slice(None), view[starts] & _FIRST_BYTES[np.minimum(sizes, 8)]
    rows = np.flatnonzero(sizes > 8)
    offset = 8
    while len(rows) and offset < _LONG:
        yield rows, view[starts[rows] + offset] & _FIRST_BYTES[np.minimum(sizes[rows] - offset, 8)]
        offset += 8
        rows = rows[sizes[rows] > offset]


def group(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Brings equal uint64 keys together.

    Returns the order of the keys, those that are equal in the order in which they came, and where in it each run of
    equal keys starts.
    """
    # Sorting numbers that hold their own index is several times faster than argsort.
    low = np.uint64((1 << len(keys).bit_length()) - 1)
    packed = ((keys * MULTIPLIER) & ~low) | np.arange(len(keys), dtype=np.uint64)
    packed.sort()
    order = (packed & low).astype(np.int64)
    ordered = keys[order]
    new = ordered[1:] != ordered[:-1]
    high = packed & ~low
    if (new & (high[1:] == high[:-1])).any():  # two keys agree in the bits that were sorted by
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        new = ordered[1:] != ordered[:-1]
    return order, np.flatnonzero(np.append(True, new)[: len(keys)])
