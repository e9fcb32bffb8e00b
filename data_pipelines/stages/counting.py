"""Counting bytes with some flags in parts of texts."""

import numpy as np

from data_pipelines.stages.compiled import compiled


def count(flags: np.ndarray, mask: int, value: int, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """How many bytes from each start to its end are `value`, of the bits that are set in `mask`.

    Args:
      flags: uint8 or bool of each byte.
      mask: which bits of them count.
      value: what these are.
      starts: of the parts.
      ends: of the parts.
    """
    flags = flags.view(np.uint8)
    flags.flags.writeable = False  # as in other calls: every type is compiled by itself
    return _count(flags, np.uint8(mask), np.uint8(value), starts, ends)


@compiled
def _count(flags, mask, value, starts, ends):
    counts = np.empty(len(starts), np.int64)
    for i in range(len(starts)):
        part, total = flags[starts[i] : ends[i]], 0
        for at in range(len(part)):  # from 0, so that no index can be negative and many are looked at together
            total += (part[at] & mask) == value
        counts[i] = total
    return counts
