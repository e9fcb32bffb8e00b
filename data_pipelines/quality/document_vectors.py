"""Documents as vectors of 16-bit integers on disk: embeddings made elsewhere, or hashed words."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from data_pipelines.documents import read_batches
from data_pipelines.quality.document_columns import require_columns, require_messages, require_texts
from data_pipelines.quality.features import grams, read_words
from data_pipelines.quality.model_files import expand
from data_pipelines.stages.hashed_words import mix
from slmjax.config import DiversityConfig
from slmjax.data.conversations import check_messages

FARTHEST = 2.0  # 1 - cosine of opposite vectors

_LARGEST = 32767  # of int16; sums of 2**23 products of such numbers are exact in float64
_WORD_BITS = 18


class Ids(NamedTuple):
    """Ids of all documents, sorted, and of each file the rows of its documents among them."""

    names: list[str]
    rows: list[np.ndarray]


def read_ids(paths: Sequence[Path]) -> Ids:
    """Reads the ids of the documents of some files.

    Raises:
      ValueError: a file holds no documents, or two documents have the same id.
    """
    per_file: list[list[str]] = []
    for path in paths:
        require_columns(path, ("id",))
        per_file.append([name for batch in read_batches(path, ["id"]) for name in batch.column(0).to_pylist()])
    names = [name for of_file in per_file for name in of_file]
    by_name = sorted(range(len(names)), key=names.__getitem__)
    ordered = [names[i] for i in by_name]
    if twice := next((a for a, b in itertools.pairwise(ordered) if a == b), None):
        raise ValueError(f"two documents have the id {twice!r}")
    rows = np.empty(len(names), np.int64)
    rows[by_name] = np.arange(len(names))
    return Ids(ordered, np.split(rows, np.cumsum([len(of_file) for of_file in per_file])[:-1]))


class Vectors:
    """Unit vectors as integers, some of which are in memory as float64 at one time.

    Attributes:
      is_zero: bool (documents,), of what has no direction: a text without words.
    """

    def __init__(self, values: np.ndarray, worker_bytes: int):
        """Takes int16 (documents, dimensions), perhaps a memory map."""
        self._values = values
        rows = max(worker_bytes // (8 * max(values.shape[1], 1)), 1)
        self._starts = range(0, len(values), rows)
        self._step = rows
        # Read once where all of them fit.
        self._whole = values.astype(np.float64) if len(values) <= rows else None
        self._lengths = np.concatenate(
            [np.sqrt((block * block).sum(axis=1)) for _, block in self._blocks()] or [np.zeros(0)]
        )
        self.is_zero = self._lengths == 0

    def __len__(self) -> int:
        return len(self._values)

    def _blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        for start in self._starts:
            place = slice(start, start + self._step)
            yield place, self._values[place].astype(np.float64) if self._whole is None else self._whole

    def row(self, index: int) -> np.ndarray:
        """One vector, float64 of integral values."""
        return self._values[index].astype(np.float64)

    def mean(self) -> np.ndarray:
        """The direction of the mean, of integral values like any vector."""
        total = np.zeros(self._values.shape[1])
        for _, block in self._blocks():
            total += block.sum(axis=0)
        return quantise(total[None])[0].astype(np.float64)

    def distances(self, vector: np.ndarray) -> np.ndarray:
        """1 - cosine of every vector and another: to one of zeros it is 2, and from one of zeros 0.

        So what has no words adds nothing to what was chosen, and does not stand in the way of anything else.
        """
        if not vector.any():
            return np.where(self.is_zero, 0.0, FARTHEST)
        dots = np.empty(len(self))
        for place, block in self._blocks():
            dots[place] = block @ vector
        lengths = self._lengths * np.sqrt((vector * vector).sum())
        cosines = np.divide(dots, lengths, out=np.ones(len(self)), where=lengths > 0)
        return np.maximum(1.0 - cosines, 0.0)


def quantise(vectors: np.ndarray) -> np.ndarray:
    """Unit vectors in the direction of each row, in units of 1 / 32767, int16."""
    lengths = np.sqrt((vectors.astype(np.float64) ** 2).sum(axis=1, keepdims=True))
    return np.rint(vectors / np.where(lengths > 0, lengths, 1.0) * _LARGEST).astype(np.int16)


@contextlib.contextmanager
def of_documents(config: DiversityConfig, paths: Sequence[Path], ids: Ids, scratch: Path) -> Iterator[Vectors]:
    """Makes the vectors in the file `scratch`, in the order of the sorted ids, and removes it at the end."""
    scratch.parent.mkdir(parents=True, exist_ok=True)
    try:
        values: np.ndarray | None = None
        for rows, vectors in _read(config, paths, ids):
            if values is None:
                shape = (len(ids.names), vectors.shape[1])
                values = np.memmap(scratch, np.int16, "w+", shape=shape) if shape[0] else np.zeros(shape, np.int16)
            if vectors.shape[1] != values.shape[1]:
                raise ValueError(f"embeddings have {values.shape[1]} and {vectors.shape[1]} dimensions")
            values[rows] = quantise(vectors)
        yield Vectors(np.zeros((0, 1), np.int16) if values is None else values, config.worker_bytes)
    finally:
        scratch.unlink(missing_ok=True)


def _read(config: DiversityConfig, paths: Sequence[Path], ids: Ids) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields rows and their vectors, float."""
    if config.embeddings is not None:
        for path, rows in zip(paths, ids.rows, strict=True):
            yield from _embeddings(expand(config.embeddings) / path.name, rows, ids)
        return
    frequency = np.zeros(1 << _WORD_BITS, np.int64)
    for path in paths:
        for texts in _texts(config, path):
            for _, buckets, _ in _counted(texts):
                frequency += np.bincount(buckets, minlength=len(frequency))
    weights = np.log((1 + len(ids.names)) / (1 + frequency)) + 1.0
    for path, rows in zip(paths, ids.rows, strict=True):
        start = 0
        for texts in _texts(config, path):
            vectors = np.zeros((len(texts), config.dimensions))
            for documents, buckets, counts in _counted(texts):
                hashed = mix(buckets.astype(np.uint64) + np.uint64(1))
                signs = np.where(hashed >> np.uint64(63), 1.0, -1.0)
                places = (hashed % np.uint64(config.dimensions)).astype(np.int64)
                np.add.at(vectors, (documents, places), signs * np.log1p(counts) * weights[buckets])
            yield rows[start : start + len(texts)], vectors
            start += len(texts)


def _texts(config: DiversityConfig, path: Path) -> Iterator[pa.Array]:
    wanted = "text" if config.text == "all" else "messages"
    for batch in read_batches(path, ["id", wanted]):
        if wanted not in batch.schema.names:
            raise ValueError(f"{path} has no column {wanted}; text = {config.text!r} needs it")
        ids, found = batch.column("id"), batch.column(wanted)
        if wanted == "text":
            require_texts(path, ids, found)
        else:
            require_messages(path, ids, found, check_messages)
            asked = (
                "\n".join(turn["content"] for turn in turns if turn["role"] == "user") for turns in found.to_pylist()
            )
            found = pa.array(asked, pa.string())
        yield found


def _counted(texts: pa.Array) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields documents, word buckets and how often each stands in the document, every pair once."""
    first = 0
    for words in read_words(texts):
        hashed = grams(words, ngram=1, bits=_WORD_BITS)
        documents = np.repeat(np.arange(len(words.bounds) - 1), np.diff(words.bounds))
        keys, counts = np.unique(documents << _WORD_BITS | hashed.buckets[0], return_counts=True)
        yield (keys >> _WORD_BITS) + first, keys & ((1 << _WORD_BITS) - 1), counts
        first += len(words.bounds) - 1


def _embeddings(path: Path, rows: np.ndarray, ids: Ids) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    if not path.is_file():
        raise ValueError(f"there are no embeddings for the documents of {path.name}: {path} is missing")
    by_name = dict(zip((ids.names[row] for row in rows.tolist()), rows.tolist(), strict=True))
    for batch in read_batches(path, ["id", "embedding"]):
        if batch.num_columns < 2 or not pa.types.is_fixed_size_list(batch.column("embedding").type):
            raise ValueError(f"{path} must have the columns id and embedding, a list of fixed size")
        known = [(i, by_name.pop(name)) for i, name in enumerate(batch.column("id").to_pylist()) if name in by_name]
        places, found = np.array(known, np.int64).reshape(-1, 2).T
        lists = batch.column("embedding")
        vectors = lists.flatten().to_numpy(zero_copy_only=False).reshape(len(lists), -1)[places]
        if not np.isfinite(vectors).all():
            raise ValueError(f"{path} has embeddings that are not finite")
        yield found, vectors
    if by_name:
        raise ValueError(f"{path} has no embedding of {len(by_name)} documents, the first one {next(iter(by_name))}")
