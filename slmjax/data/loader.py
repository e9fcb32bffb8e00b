"""Batches of training and of evaluation. The only importer of grain.

Row r of training step s is row s * batch_size + r of the mixture, and everything about it is computed from that number
and the seed. So the step is the whole state of the input: a run resumes by starting at its step, and any number of
processes reads the same global batches.
"""

import hashlib
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from grain.experimental import index_shuffle

from slmjax.config import EvalSetConfig, InputConfig
from slmjax.data.batch import Batch
from slmjax.data.exposure import exposure, require_epochs
from slmjax.data.packing import StreamRows, WholeRows, empty_batch, merge_documents, row_of
from slmjax.data.sources import open_mixture, open_store

# Grain shuffles with 4 rounds, after which means of 16 consecutive indices out of 2^32 spread 2.7 times as widely as
# random ones do (1.2-1.5 times out of 10^7); after 8 rounds as they should. It takes indices below 2^32.
_SHUFFLE_ROUNDS = 8


def make_loader(
    config: InputConfig,
    *,
    seed: int,
    start_step: int,
    steps: int,
    rows: Sequence[int] | None = None,
    tokenizer_sha256: str | None = None,
) -> Iterator[Batch]:
    """Batches of steps [start_step, steps), prepared ahead by a thread, as numpy arrays.

    `rows` are the rows of each global batch that this process reads (`parallel.rules.process_rows`); None is all.

    Raises:
      ValueError: a store is damaged, empty, of another tokenizer than `tokenizer_sha256` (None does not check), or
        would be repeated beyond its max_epochs.
    """
    batches = _TrainingBatches(config, seed, steps, rows or range(config.batch_size), tokenizer_sha256)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=config.prefetch_batches)
    return iter(grain.MapDataset.source(batches)[start_step:].to_iter_dataset(options))


class _TrainingBatches:
    """Random access to the batch of every step."""

    def __init__(self, config: InputConfig, seed: int, steps: int, rows: Sequence[int], tokenizer_sha256: str | None):
        self._config, self._seed, self._steps, self._local_rows = config, seed, steps, rows
        mixed = open_mixture(config, seed=seed, tokenizer_sha256=tokenizer_sha256)
        require_epochs(exposure(mixed, config, steps=steps))
        self._sources, self._mixture = [source.rows for source in mixed.sources], mixed.mixture

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> Batch:
        first = int(index) * self._config.batch_size
        batch = empty_batch(len(self._local_rows), self._config.sequence_length)
        for i, row in enumerate(self._local_rows):
            number, row_of_source = self._mixture.locate(first + row)
            source = self._sources[number]
            epoch, unshuffled = divmod(row_of_source, source.num_rows)
            shuffled = index_shuffle(
                unshuffled, max_index=source.num_rows - 1, seed=_seed(self._seed, number, epoch), rounds=_SHUFFLE_ROUNDS
            )
            source.read(shuffled, epoch, row_of(batch, i))
        return batch if self._config.document_isolation else merge_documents(batch)


def eval_batches(
    eval_set: EvalSetConfig,
    *,
    batch_size: int,
    sequence_length: int,
    document_isolation: bool = True,
    local_rows: Sequence[int] | None = None,
    tokenizer_sha256: str | None = None,
) -> Iterator[Batch]:
    """Batches in which every learned token of a held-out set has weight exactly once, in the order of the store.

    With a stride, rows overlap so that each token but those of the first row has at least sequence_length - stride
    positions before it. `max_tokens` is rounded down to whole documents, but at least one. In a set of whole documents
    those longer than a row are left out. The last batch is filled up with padding. `local_rows` as `rows` in training.

    Raises:
      ValueError: as `make_loader`, or the stride exceeds sequence_length.
    """
    rows = _eval_rows(eval_set, sequence_length, tokenizer_sha256)
    return _read_in_order(rows, batch_size, sequence_length, local_rows or range(batch_size), document_isolation)


def eval_bytes(eval_set: EvalSetConfig, *, sequence_length: int) -> int:
    """UTF-8 bytes of the text whose tokens `eval_batches` gives weight, for bits per byte."""
    return _eval_rows(eval_set, sequence_length, None).num_bytes


def _read_in_order(
    rows: StreamRows | WholeRows,
    batch_size: int,
    sequence_length: int,
    local_rows: Sequence[int],
    document_isolation: bool,
) -> Iterator[Batch]:
    for first in range(0, rows.num_rows, batch_size):
        batch = empty_batch(len(local_rows), sequence_length)
        for i, row in enumerate(local_rows):
            if first + row < rows.num_rows:
                rows.read(first + row, 0, row_of(batch, i))
        yield batch if document_isolation else merge_documents(batch)


def _eval_rows(eval_set: EvalSetConfig, sequence_length: int, tokenizer_sha256: str | None) -> StreamRows | WholeRows:
    store = open_store(eval_set.source, tokenizer_sha256)
    num_documents = store.num_documents
    if eval_set.max_tokens is not None:
        num_documents = max(1, int(np.searchsorted(store.document_starts, eval_set.max_tokens, side="right")) - 1)
    if eval_set.source.rows == "whole":
        return WholeRows(store, sequence_length, seed=0, num_documents=num_documents, truncate=False)
    if eval_set.stride is not None and eval_set.stride > sequence_length:
        raise ValueError(
            f"the stride {eval_set.stride} of evaluation set {eval_set.name!r} exceeds the sequence_length "
            f"{sequence_length}: tokens between the rows would be left out"
        )
    return StreamRows(store, sequence_length, stride=eval_set.stride, num_documents=num_documents)


def _seed(seed: int, source: int, epoch: int) -> int:
    """A 32-bit seed of its own for every epoch of every source; sums would give sources each other's orders."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{source}/{epoch}".encode(), digest_size=4).digest(), "little")
