"""Records in buckets on disk: every writer makes one file, every reader takes one bucket of all files.

So the number of files grows with the corpus and the number of buckets, not with their product. A file holds where each
bucket starts (int64) and the records; if these have payloads, of any length, also where each starts, and the payloads.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from slmjax import files

_OFFSET = np.dtype("<i8")


def number(total_bytes: int, worker_bytes: int) -> int:
    """How many buckets make one of them take an eighth of `worker_bytes`, since sorting takes several times as much."""
    return max(1, -(-8 * total_bytes // worker_bytes))


def spread(keys: np.ndarray, num_buckets: int) -> np.ndarray:
    """Bucket of each well mixed uint64 key."""
    return ((keys >> np.uint64(32)) * np.uint64(num_buckets) >> np.uint64(32)).astype(np.int64)


def distinct(values: np.ndarray) -> np.ndarray:
    """The values in order, each once. Sorting is several times faster than numpy.unique, which makes a hash table."""
    values = np.sort(values)
    new = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=new[1:])
    return values.compress(new)  # which of masks without order is five times as fast as values[new]


def write(
    path: Path,
    records: np.ndarray,
    buckets: np.ndarray,
    num_buckets: int,
    payloads: Sequence[bytes] | None = None,
) -> None:
    """Writes a file: records in the order of their buckets, those of one bucket in the order in which they come."""
    small = buckets.astype(np.uint16) if num_buckets <= 1 << 16 else buckets  # which sort by radix, much faster
    order = np.argsort(small, kind="stable")
    starts = np.searchsorted(buckets[order], np.arange(num_buckets + 1))
    with files.replacing(path) as partial, open(partial, "wb") as file:
        file.write(starts.astype(_OFFSET).tobytes())
        file.write(np.ascontiguousarray(records[order]).tobytes())
        if payloads is not None:
            lengths = np.fromiter(map(len, payloads), _OFFSET, len(payloads))[order]
            file.write(np.concatenate([[0], np.cumsum(lengths)]).astype(_OFFSET).tobytes())
            file.writelines(payloads[i] for i in order.tolist())


class Reader:
    """Reads one file of `write`, a bucket or a payload at a time, and never the whole file."""

    def __init__(self, path: Path, dtype: np.dtype, num_buckets: int):
        self._path = path
        self._dtype = dtype
        self._records_at = (num_buckets + 1) * _OFFSET.itemsize
        self._num_buckets = num_buckets

    def numbers(self, bucket: int) -> range:
        """Which records of the file those of one bucket are."""
        return range(*self._read(bucket * _OFFSET.itemsize, _OFFSET, 2).tolist())

    def records(self, bucket: int) -> np.ndarray:
        """The records of one bucket."""
        numbers = self.numbers(bucket)
        return self._read(self._records_at + numbers.start * self._dtype.itemsize, self._dtype, len(numbers))

    def payloads(self, numbers: Iterable[int]) -> list[bytes]:
        """The payloads of some records of the file."""
        (total,) = self._read(self._num_buckets * _OFFSET.itemsize, _OFFSET, 1).tolist()
        starts_at = self._records_at + total * self._dtype.itemsize
        payloads_at = starts_at + (total + 1) * _OFFSET.itemsize
        found = []
        with open(self._path, "rb") as file:
            for number in numbers:
                file.seek(starts_at + number * _OFFSET.itemsize)
                first, last = np.frombuffer(file.read(2 * _OFFSET.itemsize), _OFFSET).tolist()
                file.seek(payloads_at + first)
                found.append(file.read(last - first))
        return found

    def _read(self, offset: int, dtype: np.dtype, count: int) -> np.ndarray:
        return np.fromfile(self._path, dtype, count, offset=offset)
