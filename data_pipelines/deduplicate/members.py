"""Documents of clusters, with all that is needed to compare them: bands, n-grams, and which one is preferred."""

import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from data_pipelines import tasks
from data_pipelines.deduplicate import buckets
from data_pipelines.deduplicate.connect import LABEL
from data_pipelines.deduplicate.corpus import PhaseTask
from data_pipelines.deduplicate.survivors import preferences
from data_pipelines.documents import read_batches, small_batches
from data_pipelines.stages import hashed_words, minhash
from data_pipelines.stages.texts import Texts
from slmjax.config import NearDedupConfig

_HALF = np.uint64(32)
MEMBER = np.dtype([("cluster", "<u4"), ("document", "<u4"), ("preference", "<f8")])


class Content(NamedTuple):
    """The payload of a member.

    Attributes:
      id: of the document.
      bands: uint64, hashes of its bands.
      ngrams: uint32, hashes of its n-grams, sorted, each once. In 32 bits, two documents of 10,000 n-grams have 0.02 in
        common by chance.
    """

    id: bytes
    bands: np.ndarray
    ngrams: np.ndarray

    def pack(self) -> bytes:
        """As bytes."""
        return self.bands.tobytes() + self.ngrams.tobytes() + self.id + len(self.id).to_bytes(8, "little")

    @classmethod
    def unpack(cls, payload: bytes, num_bands: int) -> "Content":
        """What `pack` packed."""
        id_start = len(payload) - 8 - int.from_bytes(payload[-8:], "little")
        bands = np.frombuffer(payload, "<u8", num_bands)
        ngrams = np.frombuffer(payload, "<u4", (id_start - bands.nbytes) // 4, bands.nbytes)
        return cls(id=payload[id_start:-8], bands=bands, ngrams=ngrams)


def living_bands(task: PhaseTask) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the living documents of a part that have words, and the hashes of their bands."""
    assert isinstance(task.config, NearDedupConfig)
    counts, bands = task.attributes(["ngrams", "bands"])
    rows = task.living()
    rows = rows[counts.to_numpy()[rows] > 0]
    return rows, bands.flatten().to_numpy().reshape(-1, task.config.bands)[rows]


def write_members(task: PhaseTask) -> tasks.Done:
    """Writes the documents of a part that are in clusters, in buckets of clusters."""
    started = time.monotonic()
    assert isinstance(task.config, NearDedupConfig)
    assert task.part is not None
    labels = np.sort(task.read(LABEL), order="document")
    rows = labels["document"].astype(np.int64) - task.part.start
    members = np.zeros(len(labels), MEMBER)
    members["cluster"], members["document"] = labels["cluster"], labels["document"]
    members["preference"] = preferences(task)[rows]
    living, bands = living_bands(task)
    bands = bands[np.searchsorted(living, rows)]
    payloads = [
        Content(name, band, ngrams).pack() for (name, ngrams), band in zip(_contents(task, rows), bands, strict=True)
    ]
    spread = buckets.spread(hashed_words.mix(labels["cluster"].astype(np.uint64)), task.num_buckets)
    buckets.write(task.output, members, spread, task.num_buckets, payloads)
    return task.finish({"members": len(members)}, started=started)


def _contents(task: PhaseTask, rows: np.ndarray) -> Iterator[tuple[bytes, np.ndarray]]:
    """Ids, and sorted hashes of the n-grams, of some documents of a part."""
    assert isinstance(task.config, NearDedupConfig)
    assert task.part is not None
    start = 0
    for group in read_batches(task.part.path, ["id", "text", "bytes"]):
        here = rows[slice(*np.searchsorted(rows, [start, start + len(group)]))] - start
        start += len(group)
        for batch in small_batches(group.take(pa.array(here))):
            texts = Texts.from_array(batch.column("text"))
            hashes, counts = minhash.ngrams(task.config, hashed_words.split(texts, punctuation=False))
            numbered = np.repeat(np.arange(len(counts), dtype=np.uint64), counts) << _HALF | hashes >> _HALF
            numbered = buckets.distinct(numbered)
            bounds = np.searchsorted(numbered, np.arange(1, len(counts), dtype=np.uint64) << _HALF)
            names = (name.encode() for name in batch.column("id").to_pylist())
            yield from zip(names, np.split(numbered.astype(np.uint32), bounds), strict=True)
