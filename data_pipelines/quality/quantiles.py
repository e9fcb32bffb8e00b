"""Order statistics of more numbers than fit into memory, exactly: several passes, each with a table of fixed size."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

_DIGIT_BITS = 16
_SIGN = np.uint64(1 << 63)


def order_statistics(read: Callable[[], Iterable[np.ndarray]], ranks: Sequence[int]) -> list[float]:
    """Returns the value that would stand at each rank (from 0) if all values were sorted.

    A value is found 16 bits at a time, the highest first, so that four passes with half a MB each suffice.

    Args:
      read: begins a pass; returns float64 values without NaN in pieces, the same ones every time.
      ranks: less than the number of values.
    """
    found, left = [0] * len(ranks), list(ranks)
    for shift in range(64 - _DIGIT_BITS, -1, -_DIGIT_BITS):
        counts = np.zeros((len(ranks), 1 << _DIGIT_BITS), np.int64)
        for piece in read():
            keys = _sortable(piece)
            digits = (keys >> np.uint64(shift) & np.uint64((1 << _DIGIT_BITS) - 1)).astype(np.int64)
            # A shift by 64 bits is undefined, so two steps.
            above = keys >> np.uint64(shift) >> np.uint64(_DIGIT_BITS)
            for i, prefix in enumerate(found):
                counts[i] += np.bincount(digits[above == np.uint64(prefix)], minlength=counts.shape[1])
        for i in range(len(ranks)):
            ends = np.cumsum(counts[i])
            digit = int(np.searchsorted(ends, left[i], side="right"))
            left[i] -= int(ends[digit] - counts[i][digit])
            found[i] = found[i] << _DIGIT_BITS | digit
    return [_value(key) for key in found]


def _sortable(values: np.ndarray) -> np.ndarray:
    """uint64 keys in the order of the values: the bits of floats sort like integers but for their sign."""
    bits = (values + 0.0).view(np.uint64)  # + 0.0 makes -0.0 the 0.0 that it equals
    return np.where(bits & _SIGN != 0, ~bits, bits | _SIGN)


def _value(key: int) -> float:
    bits = key & ~(1 << 63) if key >> 63 else ~key & (1 << 64) - 1
    return float(np.array(bits, np.uint64).view(np.float64))
