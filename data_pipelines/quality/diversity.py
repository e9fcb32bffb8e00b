"""An order of documents in which every next one is unlike those chosen before, as files of scores.

Vectors are rounded to 16-bit integers, whose products and sums are exact in float64: the order is the same on every
machine, and with any amount of memory.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from rich.console import Console

from data_pipelines import tasks
from data_pipelines.documents import parquet_writer
from data_pipelines.engines.local import LocalEngine
from data_pipelines.progress import Reporter
from data_pipelines.quality import document_vectors
from data_pipelines.quality.document_vectors import FARTHEST
from data_pipelines.quality.model_files import expand
from data_pipelines.quality.scorers import read_scores
from slmjax import files
from slmjax.config import DiversityConfig
from slmjax.data.exclusive import only_user

_SCHEMA = pa.schema([("id", pa.string()), ("order", pa.int64()), ("distance", pa.float64())])


class Chosen(NamedTuple):
    """Of every document its place in the order, from 1, and its distance to the nearest one chosen before.

    What is not chosen has the place after the last one. `number` is how many are.
    """

    order: np.ndarray
    distance: np.ndarray
    number: int


def write_order(config: DiversityConfig, *, console: Console | None = None) -> None:
    """Writes <output_dir>/<shard>.parquet with id, order and distance for each file of the documents.

    Raises:
      ValueError: there are no documents, or not a vector or a score for each; another process writes there.
    """
    documents, output = expand(config.documents), expand(config.output_dir)
    found = sorted(documents.glob("*.parquet"))
    if not found:
        raise ValueError(f"{documents} has no parquet files; give the documents/ of a pipeline's output_dir")
    if output.resolve() in {documents.resolve(), expand(config.embeddings or "").resolve()}:
        raise ValueError(f"output_dir {output} must be a directory of its own")
    inputs = [files.sha256(path) for path in found]
    for directory in filter(None, (config.embeddings, config.scores and config.scores.path)):
        inputs += [files.sha256(path) for path in sorted(expand(directory).glob("*.parquet"))]
    settings = {name: getattr(config, name) for name in _SETTINGS}

    def choose_all(task: tasks.Task) -> tasks.Done:
        started = time.monotonic()
        ids = document_vectors.read_ids(found)
        with document_vectors.of_documents(config, found, ids, output / "work" / "vectors") as vectors:
            if config.method == "k_centre":
                chosen = k_centre(vectors, max_documents=config.max_documents, min_distance=config.min_distance)
            else:
                assert config.scores is not None
                scores = _scores(config, found, ids)
                chosen = by_score(vectors, scores, max_documents=config.max_documents, min_distance=config.min_distance)
        written = list(_write(chosen, found, ids, output))
        return tasks.finish(task, written, {"chosen": chosen.number}, started=started)

    with only_user(output):
        files.remove_partial(output)
        task = tasks.Task(
            root=output, step="diversity", name="order", fingerprint=tasks.fingerprint(settings, config.scores, inputs)
        )
        with Reporter(console or Console(), output / "timings.json").step("diversity", 1) as step:
            tasks.run_tasks(LocalEngine(1), choose_all, [task], advance=step.advance)


_SETTINGS = ("embeddings", "text", "method", "max_documents", "min_distance", "dimensions")


def k_centre(vectors: document_vectors.Vectors, *, max_documents: int | None, min_distance: float) -> Chosen:
    """Chooses the document nearest to the mean of all, then always the one farthest from all chosen ones.

    Between equals the first row is chosen. The greedy algorithm needs at most twice the radius of the best choice
    (Gonzalez 1985).
    """
    number = len(vectors)
    most = number if max_documents is None else min(max_documents, number)
    nearest = np.full(number, FARTHEST)
    order, distance = np.zeros(number, np.int64), np.zeros(number)
    to_mean = np.where(vectors.is_zero, np.inf, vectors.distances(vectors.mean()))
    new = int(np.argmin(to_mean)) if number else -1
    far = FARTHEST
    for place in range(1, most + 1):
        order[new], distance[new] = place, far
        np.minimum(nearest, vectors.distances(vectors.row(new)), out=nearest)
        nearest[order > 0] = -1.0
        new = int(np.argmax(nearest))
        far = float(nearest[new])
        if far < min_distance:
            break
    return _finished(order, distance, nearest)


def by_score(
    vectors: document_vectors.Vectors, scores: np.ndarray, *, max_documents: int | None, min_distance: float
) -> Chosen:
    """Goes by falling scores, and chooses what is at least `min_distance` from all chosen ones."""
    number = len(vectors)
    most = number if max_documents is None else min(max_documents, number)
    nearest = np.full(number, FARTHEST)
    order, distance = np.zeros(number, np.int64), np.zeros(number)
    passed = np.zeros(number, bool)
    place = 0
    for row in np.lexsort((np.arange(number), -scores)).tolist():
        if place == most:
            break
        distance[row], passed[row] = nearest[row], True
        if nearest[row] >= min_distance:
            place += 1
            order[row] = place
            np.minimum(nearest, vectors.distances(vectors.row(row)), out=nearest)
    return _finished(order, distance, np.where(passed, distance, nearest))


def _finished(order: np.ndarray, distance: np.ndarray, nearest: np.ndarray) -> Chosen:
    left, number = order == 0, int(order.max(initial=0))
    return Chosen(np.where(left, number + 1, order), np.where(left, nearest, distance), number)


def _scores(config: DiversityConfig, paths: Sequence[Path], ids: document_vectors.Ids) -> np.ndarray:
    assert config.scores is not None
    found = np.full(len(ids.names), np.nan)
    for path, rows in zip(paths, ids.rows, strict=True):
        names = pa.array([ids.names[row] for row in rows.tolist()], pa.string())
        found[rows] = read_scores(config.scores, names, path.stem)
    if np.isnan(found).any():
        first = ids.names[int(np.flatnonzero(np.isnan(found))[0])]
        raise ValueError(
            f"{int(np.isnan(found).sum())} documents have no score in {config.scores.path}, the first one {first}"
        )
    return found


def _write(chosen: Chosen, paths: Sequence[Path], ids: document_vectors.Ids, output: Path) -> Iterator[Path]:
    for path, rows in zip(paths, ids.rows, strict=True):
        columns = [[ids.names[row] for row in rows.tolist()], chosen.order[rows], chosen.distance[rows]]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
        with parquet_writer(output / path.name, _SCHEMA) as writer:
            writer.write_batch(pa.record_batch(arrays, schema=_SCHEMA))
        yield output / path.name
