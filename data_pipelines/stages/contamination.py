"""Which documents hold text of evaluation sets, by an index of n-grams that `data_pipelines.decontaminate` makes."""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipelines.stages import hashed_words
from data_pipelines.stages.compiled import compiled
from data_pipelines.stages.hashed_words import Words
from data_pipelines.stages.texts import Texts
from slmjax import files

# Texts of evaluation sets that a document's attributes name: those of which it has the most n-grams.
_NAMED = 100
_FOUND = pa.list_(
    pa.struct([("text", pa.int64()), ("ngrams", pa.int64()), ("share", pa.float64()), ("ngram", pa.string())])
)
SECOND = np.uint64(0xD6E8FEB86659FD93)  # odd, with bits in no order
_WHOLE = np.uint64(0x5851F42D4C957F2D)  # keeps hashes of whole documents apart from those of n-grams (Knuth, MMIX)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Index:
    """N-grams of texts of evaluation sets.

    Attributes:
      lengths: in words, of the n-grams.
      prefix: words at the start of each that the keys are hashes of.
      keys: hashes, sorted.
      bits: a Bloom filter (1970) of keys: bit i is set where i are the upper bits of a key, or of `SECOND` times a key.
      grams: hashes of the n-grams, and of texts that are looked for as whole documents, sorted.
      starts: where in `owners` those of each gram start, and their number.
      owners: numbers of the texts that have a gram.
      sizes: grams of each text.
    """

    lengths: np.ndarray
    prefix: np.ndarray
    keys: np.ndarray
    bits: np.ndarray
    grams: np.ndarray
    starts: np.ndarray
    owners: np.ndarray
    sizes: np.ndarray

    def save(self, path: Path) -> None:
        """Writes a whole file."""
        with files.replacing(path) as partial, open(partial, "wb") as file:
            np.savez(file, **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})

    @classmethod
    def load(cls, path: Path) -> "Index":
        """Reads what `save` wrote."""
        with np.load(path) as arrays:
            return cls(**arrays)


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexFile:
    """An index on disk; what is measured depends on nothing else."""

    path: Path
    sha256: str


@functools.lru_cache(maxsize=2)
def load(file: IndexFile) -> Index:
    """One a process, not one a batch."""
    return Index.load(file.path)


def measure(file: IndexFile, texts: Texts) -> dict[str, pa.Array]:
    """Places of each document where n-grams start, the largest share of a text, and which texts were found."""
    index, words, documents = load(file), hashed_words.of(texts), len(texts)
    places, lengths, grams = _find(index, words)
    if len(places) == 0:
        nothing = np.zeros(documents)
        return {
            "matches": pa.array(nothing, pa.int64()),
            "item_share": pa.array(nothing, pa.float64()),
            "found": pa.array([[]] * documents, _FOUND),
        }
    at = np.searchsorted(words.first, places, side="right") - 1  # which document
    matches = np.bincount(np.searchsorted(words.first, np.unique(places), side="right") - 1, minlength=documents)
    # The first place of each gram in each document, then a row for every text that has the gram.
    order = np.lexsort((places, grams, at))
    once = order[np.append(True, (np.diff(at[order]) != 0) | (np.diff(grams[order]) != 0))[: len(order)]]
    counts = np.diff(index.starts)[grams[once]]
    once, rank = np.repeat(once, counts), _ranks(counts)
    owners = index.owners[index.starts[grams[once]] + rank]
    # A row for every text in each document, from its first place.
    order = np.lexsort((places[once], owners, at[once]))
    once, owners = once[order], owners[order]
    begins = np.flatnonzero(np.append(True, (np.diff(at[once]) != 0) | (np.diff(owners) != 0))[: len(once)])
    numbers = np.diff(np.append(begins, len(once)))
    once, owners = once[begins], owners[begins]
    shares = numbers / index.sizes[owners]
    largest = np.zeros(documents)
    np.maximum.at(largest, at[once], shares)
    order = np.lexsort((owners, -numbers, at[once]))
    order = order[_ranks(np.bincount(at[once], minlength=documents)) < _NAMED]
    once = once[order]
    ends = words.ends[places[once] + lengths[once] - 1]
    found = [
        texts.raw[start:end].decode()
        for start, end in zip(words.starts[places[once]].tolist(), ends.tolist(), strict=True)
    ]
    columns = [owners[order], numbers[order], shares[order], pa.array(found, pa.string())]
    rows = pa.StructArray.from_arrays(
        [pa.array(column, field.type) for column, field in zip(columns, _FOUND.value_type, strict=True)],
        fields=list(_FOUND.value_type),
    )
    offsets = np.searchsorted(at[once], np.arange(documents + 1)).astype(np.int32)
    return {
        "matches": pa.array(matches, pa.int64()),
        "item_share": pa.array(largest, pa.float64()),
        "found": pa.ListArray.from_arrays(offsets, rows, type=_FOUND),
    }


def whole_document(hashes: np.ndarray) -> np.ndarray:
    """Hashes of texts that are looked for as documents, from those of all of their words in a row."""
    return hashed_words.mix(hashes ^ _WHOLE)


def _find(index: Index, words: Words) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where n-grams of the index start, among words, how many words each has, and its number."""
    prefix = int(index.prefix)
    shift = np.uint64(65 - (8 * len(index.bits)).bit_length())
    factors = hashed_words.MULTIPLIER, hashed_words.power(prefix)
    keys, maybe = _candidates(words.hashes, prefix, *factors, index.bits, shift)
    maybe = maybe[_position(index.keys, keys) >= 0]
    ends = words.first[np.searchsorted(words.first, maybe, side="right")]  # of the documents
    found = [(np.zeros(0, np.int64),) * 3]
    for length in index.lengths.tolist():
        starts = maybe[maybe + length <= ends]
        found.append(_known(index, starts, length, hashed_words.runs_at(words.hashes, starts, length)))
    short = np.flatnonzero((words.counts > 0) & (words.counts < prefix))
    for length in np.unique(words.counts[short]).tolist():
        starts = words.first[short][words.counts[short] == length]
        hashes = whole_document(hashed_words.runs_at(words.hashes, starts, length))
        found.append(_known(index, starts, length, hashes))
    places, lengths, grams = map(np.concatenate, zip(*found, strict=True))
    return places, lengths, grams


@compiled
def _is_set(bits: np.ndarray, place: np.uint64) -> bool:
    return bits[place >> np.uint64(3)] >> (place & np.uint64(7)) & np.uint64(1) != np.uint64(0)


@compiled
def _candidates(
    hashes: np.ndarray, n: int, multiplier: np.uint64, power: np.uint64, bits: np.ndarray, shift: np.uint64
) -> tuple[np.ndarray, np.ndarray]:
    """Those of `hashed_words.runs` that the filter lets through, and where they start.

    `power` is the `n`-th of the multiplier; a hash shifted by `shift` is the number of a bit.
    """
    keys, places = np.empty(len(hashes), np.uint64), np.empty(len(hashes), np.int64)
    number, total = 0, np.uint64(0)
    for i in range(len(hashes)):
        total = total * multiplier + hashes[i]
        if i >= n:
            total -= hashes[i - n] * power
        if i >= n - 1 and _is_set(bits, total >> shift) and _is_set(bits, total * SECOND >> shift):
            keys[number], places[number] = total, i - n + 1
            number += 1
    return keys[:number], places[:number]


def _known(
    index: Index, places: np.ndarray, length: int, hashes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    numbers = _position(index.grams, hashes)
    places = places[numbers >= 0]
    return places, np.full(len(places), length), numbers[numbers >= 0]


def _position(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each wanted one is among sorted values, -1 where it is not."""
    if len(values) == 0:
        return np.full(len(wanted), -1)
    position = np.minimum(np.searchsorted(values, wanted), len(values) - 1)
    return np.where(values[position] == wanted, position, -1)


def _ranks(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... for each count."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
