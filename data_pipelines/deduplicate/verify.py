"""The check of every candidate: a document is dropped for one that is kept and truly similar to it, or not at all."""

import collections
import itertools
import time
from collections.abc import Callable

import numpy as np

from data_pipelines import tasks
from data_pipelines.deduplicate import buckets
from data_pipelines.deduplicate.corpus import PhaseTask
from data_pipelines.deduplicate.exact import LOSS
from data_pipelines.deduplicate.members import MEMBER, Content
from slmjax.config import NearDedupConfig

# Documents of a cluster that later ones are compared with; of more the last. It bounds the memory for one cluster.
_REMEMBERED = 100_000
# Documents with the hash of one band, of which those to compare with are chosen; of more the first.
_PER_BAND = 500


def verify(task: PhaseTask) -> tasks.Done:
    """Writes, in buckets of parts, the documents of some clusters that give way to others."""
    started = time.monotonic()
    config = task.config
    assert isinstance(config, NearDedupConfig)
    readers = list(task.readers(MEMBER))
    found = [reader.records(task.number) for reader in readers]
    numbers = np.concatenate([np.array(reader.numbers(task.number), np.int64) for reader in readers])
    source = np.repeat(np.arange(len(readers)), [len(records) for records in found])
    members = np.concatenate(found)
    part = task.part_of(members["document"])
    earlier = part < task.num_earlier
    order = np.lexsort((members["document"], -members["preference"], ~earlier, members["cluster"]))

    def content(member: int) -> Content:
        (payload,) = readers[source[member]].payloads([int(numbers[member])])
        return Content.unpack(payload, config.bands)

    lost, payloads, pairs = [], [], 0
    ends = np.flatnonzero(np.diff(members["cluster"][order])) + 1
    for cluster in np.split(order, ends):
        kept = _Kept(config, content, task.worker_bytes)
        for member in cluster.tolist():
            document = content(member)
            keeper = None if earlier[member] else kept.like(document)
            if keeper is None:
                kept.add(member, document)
            else:
                lost.append(member)
                payloads.append(keeper)
        pairs += kept.compared
    losses = np.zeros(len(lost), LOSS)
    assert task.starts is not None
    losses["row"] = members["document"][lost] - task.starts[part[lost]]
    buckets.write(task.output, losses, part[lost], task.num_buckets, payloads)
    return task.finish({"members": len(members), "pairs": pairs, "duplicates": len(lost)}, started=started)


class _Kept:
    """The documents of one cluster that are kept so far."""

    def __init__(self, config: NearDedupConfig, content: Callable[[int], Content], worker_bytes: int):
        self._config = config
        self._content = content
        self._by_band: dict[int, list[int]] = collections.defaultdict(list)
        self._bands: collections.OrderedDict[int, list[int]] = collections.OrderedDict()
        self._recent: collections.OrderedDict[int, Content] = collections.OrderedDict()
        self._room = worker_bytes // 4
        self.compared = 0

    def add(self, member: int, document: Content) -> None:
        """Keeps a document."""
        bands = document.bands.tolist()
        self._bands[member] = bands
        for band in bands:
            self._by_band[band].append(member)
        self._hold(member, document)
        if len(self._bands) > _REMEMBERED:
            forgotten, bands = self._bands.popitem(last=False)
            for band in bands:
                self._by_band[band].remove(forgotten)

    def like(self, document: Content) -> bytes | None:
        """Id of a kept document that is similar enough, None where there is none."""
        most = self._config.comparisons
        alike = (self._by_band.get(band, ())[:_PER_BAND] for band in document.bands.tolist())
        for member, _ in collections.Counter(itertools.chain.from_iterable(alike)).most_common(most):
            self.compared += 1
            other = self._recent.get(member) or self._content(member)
            self._hold(member, other)
            if similarity(document.ngrams, other.ngrams, at_least=self._config.similarity) >= self._config.similarity:
                return other.id
        return None

    def _hold(self, member: int, document: Content) -> None:
        """Remembers the content of a document, and forgets that of others, which can be read again."""
        if member not in self._recent:
            self._room -= document.ngrams.nbytes
            self._recent[member] = document
        self._recent.move_to_end(member)
        while self._room < 0 and len(self._recent) > 1:
            _, forgotten = self._recent.popitem(last=False)
            self._room += forgotten.ngrams.nbytes


def similarity(a: np.ndarray, b: np.ndarray, *, at_least: float = 0.0) -> float:
    """Jaccard similarity of two sets, each a sorted array; 0 where their sizes alone keep it below `at_least`."""
    a, b = (a, b) if len(a) < len(b) else (b, a)
    if len(a) < at_least * len(b):
        return 0.0
    shared = np.count_nonzero(b.take(b.searchsorted(a), mode="clip") == a)
    return shared / (len(a) + len(b) - shared)
