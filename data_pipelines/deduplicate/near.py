"""Near duplicates: documents that share a band are candidates, chains of these a cluster, where pairs are checked."""

import dataclasses
import time

import numpy as np

from data_pipelines import tasks
from data_pipelines.deduplicate import buckets, connect
from data_pipelines.deduplicate.corpus import GlobalStep, Phases, PhaseTask
from data_pipelines.deduplicate.exact import read_losses
from data_pipelines.deduplicate.members import living_bands, write_members
from data_pipelines.deduplicate.verify import verify
from data_pipelines.measuring import finish_verdicts
from data_pipelines.verdicts import Verdicts
from slmjax.config import NearDedupConfig

# The first document of a part with the hash of a band.
_ENTRY = np.dtype([("hash", "<u8"), ("document", "<u4")])


def decide(config: NearDedupConfig, step: GlobalStep) -> list[tasks.Done]:
    """Writes the verdicts of every shard."""
    phases = Phases(config, step, against=config.against)
    if phases.finished is not None:
        return phases.finished
    num_buckets = buckets.number(phases.num_documents * config.bands * _ENTRY.itemsize, step.worker_bytes)
    entries = phases.by_part("scatter", scatter, num_buckets=num_buckets)
    edges = phases.by_bucket("meet", meet, num_buckets=num_buckets, inputs=[entries])
    within = dataclasses.replace(entries, suffix=".edges")
    clusters = connect.clusters(phases, [within, edges])
    members = phases.by_part("members", write_members, num_buckets=num_buckets, inputs=[clusters])
    losses = phases.by_bucket("verify", verify, num_buckets=len(phases.parts), inputs=[members])
    return phases.verdicts(write_verdicts, inputs=[losses])


def scatter(task: PhaseTask) -> tasks.Done:
    """Writes the first document of a part with each band's hash, in buckets of hashes; and edges to it from others."""
    started = time.monotonic()
    assert isinstance(task.config, NearDedupConfig)
    assert task.part is not None
    rows, bands = living_bands(task)
    hashes = bands.reshape(-1)
    documents = np.repeat(task.part.start + rows, task.config.bands)
    order = np.lexsort((documents, hashes))
    entries = np.zeros(len(order), _ENTRY)
    entries["hash"], entries["document"] = hashes[order], documents[order]
    first = _first_of_runs(entries["hash"])
    kept = entries[first]
    buckets.write(task.output, kept, buckets.spread(kept["hash"], task.num_buckets), task.num_buckets)
    edges = task.output.with_suffix(".edges")
    connect.write_edges(edges, _to_first(entries, first), task.num_buckets)
    return tasks.finish(task, [task.output, edges], {}, started=started)


def meet(task: PhaseTask) -> tasks.Done:
    """Writes edges from every document to the first one of all parts with the same hash of a band."""
    started = time.monotonic()
    entries = task.read(_ENTRY)
    entries = entries[np.lexsort((entries["document"], entries["hash"]))]
    edges = _to_first(entries, _first_of_runs(entries["hash"]))
    connect.write_edges(task.output, edges, task.num_buckets)
    return task.finish({}, started=started)


def write_verdicts(task: PhaseTask) -> tasks.Done:
    """Writes the verdicts of a shard."""
    started = time.monotonic()
    assert task.part is not None
    assert task.part.shard is not None
    originals = np.full(task.part.documents, None, object)
    rules = np.full(task.part.documents, "", object)
    for row, keeper in read_losses(task).items():
        originals[row], rules[row] = keeper, "near_duplicate"
    verdicts = Verdicts.load(task.root, task.previous, task.part.shard).after(task.stage_name, rules, originals)
    return finish_verdicts(task, task.stage_name, task.part.shard, verdicts, started=started)


def _first_of_runs(values: np.ndarray) -> np.ndarray:
    """Whether each of some sorted values is the first of its kind."""
    first = np.ones(len(values), bool)
    first[1:] = values[1:] != values[:-1]
    return first


def _to_first(entries: np.ndarray, first: np.ndarray) -> np.ndarray:
    """An edge from every document to the first of its run."""
    return connect.join(entries["document"], entries["document"][np.flatnonzero(first)[np.cumsum(first) - 1]])
