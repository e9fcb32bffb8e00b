"""Exact duplicates, of texts or of ids, among all documents: the digests of the parts meet, in buckets."""

import itertools
import time

import numpy as np
import pyarrow as pa

from data_pipelines import tasks
from data_pipelines.deduplicate import buckets
from data_pipelines.deduplicate.corpus import GlobalStep, Phases, PhaseTask
from data_pipelines.deduplicate.survivors import preferences
from data_pipelines.documents import column, read_batches
from data_pipelines.measuring import finish_verdicts
from data_pipelines.stages import exact
from data_pipelines.verdicts import Verdicts
from slmjax.config import ExactDedupConfig

# The best document of a part with a digest; the payload is its id.
_ENTRY = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<u4"), ("preference", "<f8")])
# A document that gives way to one of another part, whose id is the payload.
LOSS = np.dtype([("row", "<u4")])


def decide(config: ExactDedupConfig, step: GlobalStep) -> list[tasks.Done]:
    """Writes the verdicts of every shard."""
    phases = Phases(config, step, against=config.against)
    if phases.finished is not None:
        return phases.finished
    num_buckets = buckets.number(phases.num_documents * _ENTRY.itemsize, step.worker_bytes)
    entries = phases.by_part("scatter", scatter, num_buckets=num_buckets)
    losses = phases.by_bucket("meet", meet, num_buckets=len(phases.parts), inputs=[entries])
    return phases.verdicts(write_verdicts, inputs=[losses])


def scatter(task: PhaseTask) -> tasks.Done:
    """Writes the best document of a part for each digest, in buckets of digests."""
    started = time.monotonic()
    assert task.part is not None
    rows, halves, best = _digests(task)
    kept = np.unique(best)
    entries = np.zeros(len(kept), _ENTRY)
    entries["high"], entries["low"] = halves[kept, 0], halves[kept, 1]
    entries["row"] = rows[kept]
    entries["preference"] = preferences(task)[rows[kept]]
    ids = column(task.part.path, "id").take(pa.array(rows[kept])).to_pylist()
    spread = buckets.spread(entries["high"], task.num_buckets)
    buckets.write(task.output, entries, spread, task.num_buckets, [name.encode() for name in ids])
    return task.finish({}, started=started)


def meet(task: PhaseTask) -> tasks.Done:
    """Writes, in buckets of parts, the documents that give way to those of other parts with the same digest."""
    started = time.monotonic()
    readers = list(task.readers(_ENTRY))
    found = [reader.records(task.number) for reader in readers]
    number = np.concatenate([np.array(reader.numbers(task.number), np.int64) for reader in readers])
    part = np.repeat(np.arange(len(readers)), [len(records) for records in found])
    entries = np.concatenate(found)
    earlier = part < task.num_earlier
    order = np.lexsort((part, -entries["preference"], ~earlier, entries["low"], entries["high"]))
    entries, part, number, earlier = entries[order], part[order], number[order], earlier[order]
    first = np.ones(len(entries), bool)
    first[1:] = (entries["high"][1:] != entries["high"][:-1]) | (entries["low"][1:] != entries["low"][:-1])
    keepers = np.flatnonzero(first)[np.cumsum(first) - 1]
    lost = np.flatnonzero(~first & ~earlier)
    wanted = np.unique(keepers[lost])
    wanted = wanted[np.argsort(part[wanted], kind="stable")]
    ids: dict[int, bytes] = {}
    bounds = np.searchsorted(part[wanted], np.arange(len(readers) + 1))
    for reader, (start, end) in zip(readers, itertools.pairwise(bounds.tolist()), strict=True):
        if start < end:
            here = wanted[start:end]
            ids.update(zip(here.tolist(), reader.payloads(number[here].tolist()), strict=True))
    losses = np.zeros(len(lost), LOSS)
    losses["row"] = entries["row"][lost]
    payloads = [ids[keeper] for keeper in keepers[lost].tolist()]
    buckets.write(task.output, losses, part[lost], task.num_buckets, payloads)
    return task.finish({}, started=started)


def write_verdicts(task: PhaseTask) -> tasks.Done:
    """Writes the verdicts of a shard."""
    started = time.monotonic()
    assert isinstance(task.config, ExactDedupConfig)
    assert task.part is not None
    assert task.part.shard is not None
    rows, _, best = _digests(task)
    ids = column(task.part.path, "id").to_numpy(zero_copy_only=False)
    originals = np.full(task.part.documents, None, object)
    originals[rows] = np.where(best != np.arange(len(rows)), ids[rows[best]], None)
    lost = read_losses(task)
    for i in np.flatnonzero(np.isin(rows[best], list(lost))):  # and with the best of a part all others
        originals[rows[i]] = lost[int(rows[best[i]])]
    rule = "duplicate" if task.config.by == "text" else f"duplicate_{task.config.by}"
    rules = np.array(["" if original is None else rule for original in originals], object)
    verdicts = Verdicts.load(task.root, task.previous, task.part.shard).after(task.stage_name, rules, originals)
    return finish_verdicts(task, task.stage_name, task.part.shard, verdicts, started=started)


def read_losses(task: PhaseTask) -> dict[int, str]:
    """Rows of the part's documents that give way to others, each with the id of the one that is kept."""
    lost: dict[int, str] = {}
    for reader in task.readers(LOSS):
        rows = reader.records(task.number)["row"].tolist()
        names = reader.payloads(reader.numbers(task.number)) if rows else []
        lost.update(zip(rows, (name.decode() for name in names), strict=True))
    return lost


def _digests(task: PhaseTask) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the living documents of a part: rows, digests as two halves, and index of the best with the same digest."""
    assert isinstance(task.config, ExactDedupConfig)
    assert task.part is not None
    rows = task.living()
    if task.config.by == "id":
        digests = exact.digests(name.encode() for name in column(task.part.path, "id").to_pylist())
    elif task.config.by == "question":
        digests = pa.concat_arrays([*map(exact.questions, read_batches(task.part.path, ["messages"]))])
    else:
        (digests,) = task.attributes(["digest"])
    halves = exact.halves(digests)[rows]
    order = np.lexsort((rows, -preferences(task)[rows], halves[:, 1], halves[:, 0]))
    ordered = halves[order]
    first = np.ones(len(order), bool)
    first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    best = np.zeros(len(order), np.int64)
    best[order] = order[np.flatnonzero(first)[np.cumsum(first) - 1]]
    return rows, halves, best
