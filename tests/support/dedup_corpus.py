"""A corpus on disk in which stages over all of it can run, without the rest of a pipeline."""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from data_pipelines import deduplicate, filtering, stages, tasks
from data_pipelines.deduplicate import GlobalStep
from data_pipelines.documents import Document, Shard, column, write_shards
from data_pipelines.engines.local import LocalEngine
from data_pipelines.measuring import measure_path
from data_pipelines.progress import Reporter
from data_pipelines.verdicts import Verdicts
from slmjax import files


class Verdict(NamedTuple):
    reason: str
    duplicate_of: str | None
    left: str  # of the text, after the cuts


def write_corpus(root: Path, texts: Sequence[str] | Mapping[str, str], *, shard_bytes: int = 1000) -> list[Shard]:
    """Writes documents, called 0, 1, ... or as they are in the mapping, to shards."""
    named = texts if isinstance(texts, Mapping) else {str(i): text for i, text in enumerate(texts)}
    documents = (Document(id=name, key=name, text=text) for name, text in named.items())
    directory = root / "work" / "read"
    return list(write_shards(documents, directory, prefix="00000", source="test", shard_bytes=shard_bytes))


@contextlib.contextmanager
def global_step(
    root: Path,
    shards: Sequence[Shard],
    name: str,
    *,
    previous: str | None = None,
    fingerprint: str = "",
    worker_bytes: int = 1 << 29,
    num_workers: int = 1,
) -> Iterator[GlobalStep]:
    """The surroundings of a stage."""
    reporter = Reporter(Console(file=io.StringIO()), root / "timings.json")
    with LocalEngine(num_workers) as engine, reporter.step(name, len(shards)) as shown:
        yield GlobalStep(
            root=root,
            engine=engine,
            name=name,
            shards=tuple(shards),
            previous=previous,
            fingerprint=fingerprint,
            worker_bytes=worker_bytes,
            shown=shown,
        )


def decide(
    root: Path,
    shards: Sequence[Shard],
    named: Mapping[str, object],
    *,
    worker_bytes: int = 1 << 29,
    num_workers: int = 1,
) -> list[Verdict]:
    """Runs stages one after the other, and returns the verdicts after the last, in the order of the documents."""
    hashes = {shard.name: files.sha256(root / "work" / "read" / f"{shard.name}.parquet") for shard in shards}
    measured = {name: stage for name, stage in named.items() if stages.is_measured(stage)}
    with global_step(root, shards, "measure", num_workers=num_workers) as step:
        filtering.measure(step.engine, step.shown, root, measured, shards, hashes)
    previous, before = None, ""
    for name, stage in named.items():
        before = tasks.fingerprint(before, stage, hashes)
        with global_step(
            root,
            shards,
            name,
            previous=previous,
            fingerprint=before,
            worker_bytes=worker_bytes,
            num_workers=num_workers,
        ) as step:
            deduplicate.decide(stage, step)
        previous = name
    return read_verdicts(root, shards, previous)


def read_verdicts(root: Path, shards: Sequence[Shard], step: str | None) -> list[Verdict]:
    """The verdicts after a step, in the order of the documents."""
    found = []
    for shard in shards:
        verdicts = Verdicts.load(root, step, shard)
        texts = column(root / "work" / "read" / f"{shard.name}.parquet", "text").to_pylist()
        rows = zip(verdicts.reasons, verdicts.duplicate_of, range(len(texts)), texts, strict=True)
        found += [Verdict(reason, original, verdicts.cuts.apply(row, text)) for reason, original, row, text in rows]
    return found


def earlier_corpus(root: Path, texts: dict[str, str]) -> str:
    """What a finished pipeline leaves: documents/."""
    for i, (name, text) in enumerate(texts.items()):
        path = root / "documents" / f"{i:05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"id": [name], "text": [text], "bytes": [len(text.encode())]}), path)
    return str(root)


def write_scores(root: Path, shards: Sequence[Shard], scores: list[float | None]) -> None:
    """What a stage called "rating" would have measured."""
    values = iter(scores)
    for shard in shards:
        path = measure_path(root, "rating", shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        column = pa.array([next(values) for _ in range(shard.documents)], pa.float32())
        pq.write_table(pa.table({"score": column}), path)
