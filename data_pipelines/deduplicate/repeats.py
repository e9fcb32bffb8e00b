"""Passages that occurred before in the corpus are cut: their hashes meet in buckets, and the first occurrence stays."""

import dataclasses
import time

import numpy as np
import pyarrow as pa

from data_pipelines import tasks
from data_pipelines.deduplicate import buckets, passages
from data_pipelines.deduplicate.corpus import GlobalStep, Phases, PhaseTask
from data_pipelines.deduplicate.passages import Passages
from data_pipelines.documents import column, read_batches, small_batches
from data_pipelines.measuring import finish_verdicts
from data_pipelines.stages.ranges import group
from data_pipelines.stages.texts import Texts
from data_pipelines.verdicts import Cuts, Verdicts
from slmjax.config import PassageDedupConfig, SubstringDedupConfig

_HASH = np.dtype("<u8")
_WORD_BYTES = 4  # no fewer bytes of text for a word on average, to guess the number of passages


def decide(config: PassageDedupConfig | SubstringDedupConfig, step: GlobalStep) -> list[tasks.Done]:
    """Writes the verdicts of every shard."""
    phases = Phases(config, step, against=config.against)
    if phases.finished is not None:
        return phases.finished
    words = 1 if isinstance(config, SubstringDedupConfig) else config.shortest_words
    num_bytes = phases.num_bytes // (_WORD_BYTES * words) * _HASH.itemsize
    entries = phases.by_part("scatter", scatter, num_buckets=buckets.number(num_bytes, step.worker_bytes))
    repeated = phases.by_bucket("meet", meet, num_buckets=len(phases.parts), inputs=[entries])
    return phases.verdicts(write_verdicts, inputs=[repeated])


def scatter(task: PhaseTask) -> tasks.Done:
    """Writes the hashes of the passages of a part, each once."""
    started = time.monotonic()
    hashes = buckets.distinct(_living_passages(task).hashes)
    buckets.write(task.output, hashes, buckets.spread(hashes, task.num_buckets), task.num_buckets)
    return task.finish({}, started=started)


def meet(task: PhaseTask) -> tasks.Done:
    """Writes, in buckets of parts, the hashes that a part before has too."""
    started = time.monotonic()
    found = [reader.records(task.number) for reader in task.readers(_HASH)]
    parts = np.repeat(np.arange(len(found)), [len(hashes) for hashes in found])
    hashes = np.concatenate(found)
    order, starts = group(hashes)
    again = np.ones(len(hashes), bool)
    again[order[starts]] = False
    again &= parts >= task.num_earlier
    buckets.write(task.output, hashes[again], parts[again], task.num_buckets)
    return task.finish({}, started=started)


def write_verdicts(task: PhaseTask) -> tasks.Done:
    """Writes the verdicts of a shard, with what is cut from its documents."""
    started = time.monotonic()
    assert isinstance(task.config, PassageDedupConfig | SubstringDedupConfig)
    assert task.part is not None
    assert task.part.shard is not None
    found = _living_passages(task)
    again = _repeated(task.config, found, task.read(_HASH))
    cuts = Cuts.of(*(column[again].astype(np.int64) for column in (found.documents, found.starts, found.ends)))
    before = Verdicts.load(task.root, task.previous, task.part.shard)
    left = before.cuts | cuts
    sizes = column(task.part.path, "bytes").to_numpy()
    rules = np.full(len(sizes), "", object)
    if task.config.max_cut_share is not None:
        rules[cuts.bytes(len(sizes)) > task.config.max_cut_share * sizes] = "max_cut_share"
    rules[_blank(task, left)] = "nothing_left"
    verdicts = before.after(task.stage_name, rules, cuts=cuts)
    changes = {"cut_bytes": int((left.bytes(len(sizes)) - before.cuts.bytes(len(sizes))).sum())}
    return finish_verdicts(task, task.stage_name, task.part.shard, verdicts, started=started, changes=changes)


def _repeated(config: PassageDedupConfig | SubstringDedupConfig, found: Passages, before: np.ndarray) -> np.ndarray:
    """Whether each passage of a part occurred before, in the part or, by its hash, in one before."""
    order, starts = group(found.hashes)
    first = np.repeat(order[starts], np.diff(np.append(starts, len(order))))  # of each passage in the order
    again = np.zeros(len(order), bool)
    again[order] = order != first
    if isinstance(config, SubstringDedupConfig):
        # A run of words that overlaps with the first one like it is what is left of a repetition when that is cut.
        overlapping = (found.documents[order] == found.documents[first]) & (found.starts[order] < found.ends[first])
        again[order[overlapping]] = False
    return again | np.isin(found.hashes, before)


def _blank(task: PhaseTask, cuts: Cuts) -> np.ndarray:
    """Of which documents of a part the cuts leave nothing but white space."""
    assert task.part is not None
    blank = np.zeros(task.part.documents, bool)
    start = 0
    for batch in read_batches(task.part.path, ["text"]) if len(cuts.rows) else ():
        here = slice(*np.searchsorted(cuts.rows, [start, start + len(batch)]))
        for row in np.unique(cuts.rows[here]).tolist():
            blank[row] = not cuts.apply(row, batch.column("text")[row - start].as_py()).strip()
        start += len(batch)
    return blank


def _living_passages(task: PhaseTask) -> Passages:
    """Passages of the documents of a part that are alive; `documents` are rows of the part."""
    assert isinstance(task.config, PassageDedupConfig | SubstringDedupConfig)
    assert task.part is not None
    alive = np.zeros(task.part.documents, bool)
    alive[task.living()] = True
    found: list[Passages] = []
    start = 0
    for group_of_rows in read_batches(task.part.path, ["text", "bytes"]):
        for batch in small_batches(group_of_rows):
            rows = np.flatnonzero(alive[start : start + len(batch)])
            texts = Texts.from_array(batch.column("text").take(pa.array(rows)))
            here = passages.find(task.config, texts)
            found.append(dataclasses.replace(here, documents=(rows[here.documents] + start).astype(np.uint32)))
            start += len(batch)
    columns = ([getattr(each, field.name) for each in found] for field in dataclasses.fields(Passages))
    return Passages(*map(np.concatenate, columns))
