"""Flags, one for each byte of texts, that can be counted between any two positions."""

import numpy as np

_FIRST_BITS = np.array([(1 << i) - 1 for i in range(57)], np.uint64)


class Ranks:
    """Flags, one for each position, that can be counted between any two positions: one count is kept for every 64."""

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

    def any(self, spread: "Spread") -> np.ndarray:
        """Whether any flag is set in each of many short ranges."""
        bits = overlapping(self._bits.view(np.uint8)).take(spread.bytes)
        bits >>= spread.shifts
        bits &= spread.masks
        found = bits != 0
        found[spread.long] = self.count(spread.long_starts, spread.long_ends) != 0
        return found


class Spread:
    """Where the flags of ranges lie in a row of bits, for ranges of which few are longer than 56."""

    def __init__(self, starts: np.ndarray, sizes: np.ndarray):
        self.bytes = starts >> 3
        self.shifts = (starts & 7).view(np.uint64)
        self.masks = _FIRST_BITS.take(np.minimum(sizes, 56))
        self.long = np.flatnonzero(sizes > 56)
        self.long_starts = starts[self.long]
        self.long_ends = self.long_starts + sizes[self.long]


def overlapping(data: np.ndarray) -> np.ndarray:
    """A view of uint8 as the uint64 that starts at each byte, but the last seven."""
    return np.ndarray((len(data) - 7,), np.dtype("<u8"), data, 0, (1,))
