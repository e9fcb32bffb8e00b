"""What quality models are trained on: texts, scored texts and pairs of texts, from files."""

import collections
import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipelines.documents import Document
from data_pipelines.quality.features import Grams, Words, grams, read_words
from data_pipelines.readers.inputs import list_inputs
from data_pipelines.readers.records import Reject, read_records
from data_pipelines.readers.sources import read_documents
from data_pipelines.stages.normalise import normalise
from slmjax.config import NormaliseConfig, PreferenceFilesSourceConfig, ScoredFilesSourceConfig
from slmjax.config.sources import TextSourceConfig

_GROUP_BYTES = 1 << 20


class Reader:
    """Reads examples, and counts what it cannot use by reason in `rejected`."""

    def __init__(self, config: NormaliseConfig | None):
        self._clean = functools.partial(normalise, config)
        self.rejected: collections.Counter[str] = collections.Counter()

    def texts(self, sources: Sequence[TextSourceConfig]) -> Iterator[str]:
        """Yields the text of every document."""
        for source in sources:
            for file in list_inputs(source):
                for item in read_documents(source, file, self._clean):
                    if isinstance(item, Document):
                        yield item.text
                    else:
                        self.rejected[item.reason] += 1

    def scored(self, sources: Sequence[ScoredFilesSourceConfig]) -> Iterator[tuple[str, float]]:
        """Yields texts with their scores."""
        for source in sources:
            for record in self._records(source, (source.text_field, source.score_field)):
                text, score = record[source.text_field], record[source.score_field]
                if self._is_text(text) and self._is_number(score, -np.inf, np.inf):
                    yield self._clean(text), float(score)

    def pairs(self, sources: Sequence[PreferenceFilesSourceConfig]) -> Iterator[tuple[str, str, float]]:
        """Yields pairs of texts, with the probability that the first one is better."""
        for source in sources:
            texts = (source.preferred_field, source.other_field)
            field = source.probability_field
            for record in self._records(source, texts if field is None else (*texts, field)):
                first, second = record[texts[0]], record[texts[1]]
                probability = 1.0 if field is None else record[field]
                if self._is_text(first) and self._is_text(second) and self._is_number(probability, 0, 1):
                    yield self._clean(first), self._clean(second), float(probability)

    def _records(
        self, source: ScoredFilesSourceConfig | PreferenceFilesSourceConfig, fields: Sequence[str]
    ) -> Iterator[dict[str, Any]]:
        for file in list_inputs(source):
            for item in read_records(file, fields, source.max_record_bytes):
                if isinstance(item, Reject):
                    self.rejected[item.reason] += 1
                elif any(item[1].get(field) is None for field in fields):
                    self.rejected["missing_field"] += 1
                else:
                    yield item[1]

    def _is_text(self, value: object) -> bool:
        if not isinstance(value, str):
            self.rejected["wrong_type"] += 1
        elif not value.strip():
            self.rejected["empty_text"] += 1
        else:
            return True
        return False

    def _is_number(self, value: object, low: float, high: float) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool):
            self.rejected["wrong_type"] += 1
        elif not np.isfinite(value) or not low <= value <= high:
            self.rejected["out_of_range"] += 1
        else:
            return True
        return False


class FeatureTable:
    """The n-grams of the texts that a model learns from, each text once, and which of them are held out."""

    def __init__(self, *, ngram: int, bits: int, document_bytes: int, held_out_fraction: float):
        self._hash = functools.partial(grams, ngram=ngram, bits=bits)
        self._ngram, self._document_bytes, self._held_out_fraction = ngram, document_bytes, held_out_fraction
        self._numbers: dict[bytes, int] = {}
        self._pending: list[str] = []
        self._pending_bytes = 0
        self._pieces: list[Grams] = []

    def add(self, text: str) -> int:
        """Returns the number of a text; the same for equal texts."""
        digest = digest_of(text)
        if digest not in self._numbers:
            self._numbers[digest] = len(self._numbers)
            content = text.encode()[: self._document_bytes]
            self._pending.append(content.decode(errors="ignore"))  # a character may have been cut
            self._pending_bytes += len(content)
            if self._pending_bytes >= _GROUP_BYTES:
                self._flush()
        return self._numbers[digest]

    def features(self) -> Grams:
        """The n-grams of all texts by their numbers."""
        self._flush()
        buckets = np.concatenate(
            [np.zeros((self._ngram, 0), np.int32), *(piece.buckets for piece in self._pieces)], axis=1
        )
        sizes = np.concatenate([np.zeros(0, np.int64), *(np.diff(piece.bounds) for piece in self._pieces)])
        self._pieces = [Grams(buckets, np.append(0, np.cumsum(sizes)))]
        return self._pieces[0]

    def held_out(self) -> np.ndarray:
        """0 for a text to train on, 1 for one to calibrate with, 2 for one to measure with; by its hash."""
        places = np.array([place_of(digest) for digest in self._numbers])
        return np.where(places >= self._held_out_fraction, 0, np.where(places < self._held_out_fraction / 2, 1, 2))

    def _flush(self) -> None:
        self._pieces += map(self._hash, read_words(pa.array(self._pending, pa.string())))
        self._pending, self._pending_bytes = [], 0


class DataHash:
    """A digest of examples in their order."""

    def __init__(self):
        self._digest = hashlib.sha256()

    def add(self, *values: str | float) -> None:
        """Adds one example."""
        self._digest.update(repr([digest_of(value) if isinstance(value, str) else value for value in values]).encode())

    def hexdigest(self) -> str:
        """Digest of all that was added."""
        return self._digest.hexdigest()


def grouped_words(texts: Iterable[str]) -> Iterator[Words]:
    """Yields the words of texts, in pieces with whole documents."""
    group, size = [], 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= _GROUP_BYTES:
            yield from read_words(pa.array(group, pa.string()))
            group, size = [], 0
    yield from read_words(pa.array(group, pa.string()))


def digest_of(text: str) -> bytes:
    """16 bytes that stand for a text."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def place_of(digest: bytes) -> float:
    """A number in [0, 1) for every text, spread evenly."""
    return int.from_bytes(digest[:8], "little") / 2**64
