"""Connected components of a graph that need not fit into memory: large-star and small-star (Kiveris et al. 2014).

An edge joins two numbered documents. A round brings all edges of a document together and replaces them by edges to the
least document among them, until every edge leads from a document to the least one of its component.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipelines import tasks
from data_pipelines.deduplicate import buckets
from data_pipelines.deduplicate.corpus import Phase, Phases, PhaseTask
from data_pipelines.stages.hashed_words import mix

# An edge is one number, its key in the upper half and the other document in the lower one: numbers sort fast.
EDGE = np.dtype("<u8")
# A document of a component of more than one, and the least of them.
LABEL = np.dtype([("document", "<u4"), ("cluster", "<u4")])
_HALF = np.uint64(32)
_LOWER = np.uint64(0xFFFFFFFF)


def clusters(phases: Phases, edges: Sequence[Phase]) -> Phase:
    """Returns labels in buckets of parts. The edges stand in the buckets of both of their ends, by `write_edges`."""
    num_buckets = edges[0].num_buckets
    before, number = None, 0
    while True:
        number += 1
        large = phases.by_bucket(f"large_star_{number}", large_star, num_buckets=num_buckets, inputs=edges)
        small = phases.by_bucket(f"small_star_{number}", small_star, num_buckets=num_buckets, inputs=[large])
        now = [sum(result[name] for result in small.results) % 2**64 for name in ("edges", "sum")]
        edges = [small]
        if now == before:  # a further round would change nothing
            return phases.by_bucket("label", label, num_buckets=len(phases.parts), inputs=edges)
        before = now


def join(keys: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Edges from two columns of documents, each once; none from a document to itself."""
    keys, others = keys.astype(np.uint64), others.astype(np.uint64)
    return buckets.distinct((keys << _HALF | others)[keys != others])


def write_edges(path: Path, edges: np.ndarray, num_buckets: int) -> None:
    """Writes edges in the buckets of both ends."""
    _write(path, np.concatenate([edges, edges << _HALF | edges >> _HALF]), num_buckets)


def large_star(task: PhaseTask) -> tasks.Done:
    """Connects every greater neighbour of a document to the least document among it and its neighbours."""
    started = time.monotonic()
    edges = buckets.distinct(task.read(EDGE))
    keys, others = edges >> _HALF, edges & _LOWER
    greater = others > keys
    _write(task.output, join(others[greater], np.minimum(_least(keys, others), keys)[greater]), task.num_buckets)
    return task.finish({}, started=started)


def small_star(task: PhaseTask) -> tasks.Done:
    """Connects a document and its neighbours, all of which are less, to the least of these."""
    started = time.monotonic()
    edges = buckets.distinct(task.read(EDGE))
    keys, others = edges >> _HALF, edges & _LOWER
    written = join(np.concatenate([keys, others]), np.tile(_least(keys, others), 2))
    write_edges(task.output, written, task.num_buckets)
    return task.finish({"edges": len(written), "sum": int(mix(written).sum())}, started=started)


def label(task: PhaseTask) -> tasks.Done:
    """Writes the labels of documents, the least of a component included, in buckets of parts."""
    started = time.monotonic()
    edges = buckets.distinct(task.read(EDGE))
    keys, others = edges >> _HALF, edges & _LOWER
    inner = others < keys
    least = buckets.distinct(keys[~inner])
    labels = np.zeros(int(inner.sum()) + len(least), LABEL)
    labels["document"] = np.concatenate([keys[inner], least])
    labels["cluster"] = np.concatenate([others[inner], least])
    buckets.write(task.output, labels, task.part_of(labels["document"]), task.num_buckets)
    return task.finish({"documents": len(labels)}, started=started)


def _write(path: Path, edges: np.ndarray, num_buckets: int) -> None:
    buckets.write(path, edges, buckets.spread(mix(edges >> _HALF), num_buckets), num_buckets)


def _least(keys: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The least neighbour of the key of each edge; the edges are sorted."""
    starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])[: len(keys)])
    return np.repeat(others[starts], np.diff(np.append(starts, len(keys))))
