"""Rows of equal length out of a token store: the concatenated stream cut up, or whole documents packed. Numpy only."""

import collections
import functools
import logging
from fractions import Fraction

import numpy as np

from slmjax.data.batch import Batch
from slmjax.data.token_store import TokenStore

_log = logging.getLogger(__name__)


def empty_batch(num_rows: int, row_length: int) -> Batch:
    """A batch of nothing but padding, to be filled row by row."""
    dtypes = Batch(tokens=np.int32, targets=np.int32, weights=np.float32, documents=np.int32, positions=np.int32)
    return Batch(*(np.zeros((num_rows, row_length), dtype) for dtype in dtypes))


def row_of(batch: Batch, index: int) -> Batch:
    """One row of a batch, as views."""
    return Batch(*(field[index] for field in batch))


def merge_documents(batch: Batch) -> Batch:
    """The batch with every row as a single document, its positions running: training without document isolation.

    `documents` is None then, which lets attention use kernels that know no documents. Padding stands at the end of a
    row, where causality hides it from every token that is learned.
    """
    rows, length = batch.tokens.shape
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    return batch._replace(documents=None, positions=positions)


class StreamRows:
    """The documents of a store end to end, cut into rows; row i begins at position i * stride.

    Over all rows each token but a document's first is learned exactly once: with a stride below the row length rows
    overlap, and only the last `stride` targets of a row (all of the first row's) have weight.

    Attributes:
      num_rows: the last one may be partly padding.
      tokens_per_row: mean number of positions that are not padding, exact.
      num_bytes: UTF-8 bytes of the learned text.
    """

    def __init__(
        self, store: TokenStore, row_length: int, *, stride: int | None = None, num_documents: int | None = None
    ):
        """Reads the first `num_documents` of the store, or all."""
        num_documents = store.num_documents if num_documents is None else num_documents
        self._store = store
        self._row_length = row_length
        self._stride = row_length if stride is None else stride
        self._num_tokens = int(store.starts(num_documents, num_documents + 1)[0])
        num_inputs = self._num_tokens - 1  # the last token predicts nothing
        if num_inputs < 1:
            raise ValueError(f"{store.path} holds {self._num_tokens} tokens, too few to learn from")
        self.num_rows = 1 + max(0, -(-(num_inputs - row_length) // self._stride))
        last_row = min(row_length, self._num_tokens - (self.num_rows - 1) * self._stride)
        self.tokens_per_row = Fraction((self.num_rows - 1) * row_length + last_row, self.num_rows)
        self.num_bytes = int(store.document_bytes[:num_documents].sum())

    def read(self, row: int, epoch: int, out: Batch) -> None:
        """Writes one row into the zeros of `out`; every epoch has the same rows."""
        del epoch
        start = row * self._stride
        stop = min(start + self._row_length, self._num_tokens)
        first, last = self._store.document_of(start), self._store.document_of(stop - 1)
        tokens = self._store.tokens(start, min(stop + 1, self._num_tokens))
        out.tokens[: stop - start] = tokens[: stop - start]
        out.targets[: len(tokens) - 1] = tokens[1:]
        out.weights[: len(tokens) - 1] = self._store.weights(start + 1, start + len(tokens))
        # Bounds of the documents of this row, as indices into it; the first may begin before it, the last end after it.
        bounds = self._store.starts(first, last + 2) - start
        out.weights[bounds[1:][bounds[1:] <= stop - start] - 1] = 0
        lengths = np.diff(bounds.clip(0, stop - start))
        out.documents[: stop - start] = np.repeat(np.arange(1, len(bounds)), lengths)
        out.positions[: stop - start] = np.arange(stop - start) - np.repeat(bounds[:-1], lengths)
        if row > 0:
            out.weights[: self._row_length - self._stride] = 0


class WholeRows:
    """Whole documents packed into rows by best fit decreasing; every epoch has its own packing.

    An epoch's packing gives documents of equal length each other's places, so that every epoch has the same number of
    rows, filled alike. A document's last token is only a target, so one of n tokens takes n - 1 positions.

    Attributes:
      num_rows, tokens_per_row, num_bytes: as of `StreamRows`.
    """

    def __init__(
        self,
        store: TokenStore,
        row_length: int,
        *,
        seed: int,
        num_documents: int | None = None,
        truncate: bool = True,
    ):
        """Packs the first `num_documents` of the store, or all.

        A document too long for a row loses its end, or is left out if nothing learned remains or `truncate` is false.
        """
        self._store = store
        self._seed = seed
        num_documents = store.num_documents if num_documents is None else num_documents
        self._starts = store.starts(0, num_documents + 1)
        lengths = np.diff(self._starts) - 1
        keep = lengths > 0
        for document in np.flatnonzero(lengths > row_length):
            start = int(self._starts[document]) + 1
            keep[document] = truncate and store.weights(start, start + row_length).any()
        num_long = int((lengths > row_length).sum())
        if num_long > 0:
            num_cut = int((keep & (lengths > row_length)).sum())
            _log.warning(
                "%s: of %d documents, %d are longer than the row of %d; %d of these lose their end, %d are left out",
                *(store.path, num_documents, num_long, row_length, num_cut, num_long - num_cut),
            )
        self._documents = np.flatnonzero(keep)
        if len(self._documents) == 0:
            raise ValueError(f"{store.path}: no document has anything to learn within rows of {row_length} tokens")
        self._lengths = lengths[keep].clip(max=row_length)
        rows = best_fit(np.sort(self._lengths)[::-1], row_length)
        self.num_rows = int(rows.max()) + 1
        self.tokens_per_row = Fraction(int(self._lengths.sum()), self.num_rows)
        self.num_bytes = int(store.document_bytes[self._documents].sum())
        # Slot i is the place of the i-th longest document; row r has _slots[_row_bounds[r] : _row_bounds[r + 1]].
        self._slots = np.argsort(rows, kind="stable")
        self._row_bounds = np.searchsorted(rows[self._slots], np.arange(self.num_rows + 1))
        self._order = functools.lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> np.ndarray:
        """Kept documents from long to short, those of equal length in an order of this epoch."""
        # A bit generator's raw stream is the part of numpy's random numbers that never changes between versions.
        keys = np.random.PCG64([self._seed, epoch]).random_raw(len(self._lengths))
        return np.lexsort((keys, -self._lengths))

    def read(self, row: int, epoch: int, out: Batch) -> None:
        """Writes one row of one epoch into the zeros of `out`."""
        order, begin = self._order(epoch), 0
        for number, slot in enumerate(self._slots[self._row_bounds[row] : self._row_bounds[row + 1]], start=1):
            kept = order[slot]
            start, length = int(self._starts[self._documents[kept]]), int(self._lengths[kept])
            place = slice(begin, begin + length)
            tokens = self._store.tokens(start, start + length + 1)
            out.tokens[place] = tokens[:-1]
            out.targets[place] = tokens[1:]
            out.weights[place] = self._store.weights(start + 1, start + length + 1)
            out.documents[place] = number
            out.positions[place] = np.arange(length)
            begin += length


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Row of each item: the fullest row that it still fits into, else a new one. Best fit decreasing for sorted items.

    Cost: about a microsecond an item.
    """
    with_room: dict[int, list[int]] = collections.defaultdict(list)
    rooms = 0  # bit r is set when a row has room for exactly r more tokens
    rows, num_rows = np.empty(len(lengths), np.int64), 0
    for item, length in enumerate(lengths.tolist()):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row, num_rows = capacity, num_rows, num_rows + 1
        rows[item] = row
        if room > length:
            with_room[room - length].append(row)
            rooms |= 1 << (room - length)
    return rows
