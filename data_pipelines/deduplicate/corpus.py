"""The corpus as a stage over all of it sees it: numbered documents in parts, and tasks that pass files to each other.

A stage is a few phases. A phase is a task for every part of the corpus or for every bucket that the phase before wrote,
so that none needs more memory in a larger corpus. What passes between phases is removed once the stage is done.
"""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines import stages, tasks
from data_pipelines.deduplicate import buckets
from data_pipelines.documents import Shard, column, read_batches
from data_pipelines.engines import Engine
from data_pipelines.measuring import measure_path
from data_pipelines.progress import Step
from data_pipelines.reading import shard_path
from data_pipelines.verdicts import Verdicts
from slmjax.config.dedup import CorpusStageConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlobalStep:
    """Where and on what a stage over the whole corpus works.

    Attributes:
      root: the pipeline's output directory.
      engine: runs its tasks.
      name: of the stage.
      shards: of the corpus, in order.
      previous: name of the stage before, None for the first.
      fingerprint: of the config and of everything about the corpus that the verdicts depend on.
      worker_bytes: as in PipelineConfig.
      shown: what people see of the stage.
    """

    root: Path
    engine: Engine
    name: str
    shards: tuple[Shard, ...]
    previous: str | None
    fingerprint: str
    worker_bytes: int
    shown: Step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A parquet file of documents: of a shard of the corpus, or of an earlier corpus, whose documents are always kept.

    Attributes:
      path: of the file.
      documents: in it.
      bytes: of their text, more or less for an earlier corpus.
      start: number of its first document among those of all parts.
      shard: None for an earlier corpus.
    """

    path: Path
    documents: int
    bytes: int
    start: int
    shard: Shard | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A finished phase.

    Attributes:
      directory: where the files are that its tasks passed on.
      num_files: one for each task.
      num_buckets: in each file.
      results: what the tasks had to say.
      suffix: of the files; tasks may pass on more than one.
    """

    directory: Path
    num_files: int
    num_buckets: int
    results: tuple[dict[str, Any], ...] = ()
    suffix: str = ".bin"

    @property
    def paths(self) -> Iterator[Path]:
        """The files, in order."""
        return (self.directory / f"{number:06d}{self.suffix}" for number in range(self.num_files))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseTask(tasks.Task):
    """A task of one phase.

    Attributes:
      config: of the stage.
      stage_name: its name.
      previous: name of the stage before, None for the first.
      number: of the part or of the bucket.
      part: of the corpus; None where the task is for a bucket.
      starts: number of the first document of every part, and the number of documents; for a bucket.
      num_earlier: how many parts are of earlier corpora; they come first.
      inputs: what earlier phases passed on.
      num_buckets: to write.
      worker_bytes: as in PipelineConfig.
    """

    config: CorpusStageConfig
    stage_name: str
    previous: str | None
    number: int
    part: Part | None
    starts: np.ndarray | None
    num_earlier: int
    inputs: tuple[Phase, ...]
    num_buckets: int
    worker_bytes: int

    @property
    def extent(self) -> tasks.Extent:
        """The part; of buckets it is not known what they hold."""
        return tasks.Extent(self.part.bytes, self.part.documents) if self.part else tasks.Extent()

    @property
    def output(self) -> Path:
        """The file that passes on what the task found."""
        return self.root / "work" / self.step / f"{self.name}.bin"

    def readers(self, dtype: np.dtype) -> Iterator[buckets.Reader]:
        """The inputs, one after the other."""
        for phase in self.inputs:
            for path in phase.paths:
                yield buckets.Reader(path, dtype, phase.num_buckets)

    def read(self, dtype: np.dtype) -> np.ndarray:
        """The bucket with the task's number, of all inputs together."""
        return np.concatenate([reader.records(self.number) for reader in self.readers(dtype)])

    def part_of(self, documents: np.ndarray) -> np.ndarray:
        """Which part each of some numbered documents is in."""
        assert self.starts is not None
        return np.searchsorted(self.starts, documents, side="right") - 1

    def living(self) -> np.ndarray:
        """Rows of the part's documents that no stage has dropped."""
        assert self.part is not None
        if self.part.shard is None:
            return np.arange(self.part.documents)
        return np.flatnonzero(Verdicts.load(self.root, self.previous, self.part.shard).alive)

    def attributes(self, names: Sequence[str]) -> list[pa.Array]:
        """What the stage measured of the part's documents; those of an earlier corpus are measured now."""
        assert self.part is not None
        if self.part.shard is not None:
            path = measure_path(self.root, self.stage_name, self.part.shard)
            return [column(path, name) for name in names]
        assert isinstance(self.config, stages.StageConfig)
        measured = [stages.measure(self.config, batch) for batch in read_batches(self.part.path, ["id", "text"])]
        return [pa.concat_arrays([batch.column(name) for batch in measured]) for name in names]

    def finish(self, result: dict[str, Any], *, started: float) -> tasks.Done:
        """Writes the marker; the outputs are in place."""
        return tasks.finish(self, [self.output], result, started=started)


Function = Callable[[PhaseTask], tasks.Done]


class Phases:
    """Runs the phases of one stage.

    Attributes:
      parts: of earlier corpora, then of this one.
      num_documents, num_bytes: in all of them.
      finished: what the stage did, where an earlier run has finished it; else None.
    """

    def __init__(self, config: CorpusStageConfig, step: GlobalStep, *, against: Sequence[str]):
        earlier = _earlier_files(step.root, against)
        self._config = config
        self._step = step
        self._fingerprint = tasks.fingerprint(step.fingerprint, [_identity(path) for path in earlier])
        self._num_earlier = len(earlier)
        self.parts: list[Part] = []
        self.num_documents = 0
        files = [(path, None) for path in earlier] + [(shard_path(step.root, shard), shard) for shard in step.shards]
        for path, shard in files:
            documents, num_bytes = (shard.documents, shard.bytes) if shard else _size(path)
            part = Part(path=path, documents=documents, bytes=num_bytes, start=self.num_documents, shard=shard)
            self.parts.append(part)
            self.num_documents += documents
        if self.num_documents >= 1 << 32:
            raise ValueError(
                f"{step.name} can number 2**32 documents, got {self.num_documents}; split the corpus in two and name "
                "the output of the first in `against` of the second"
            )
        self.num_bytes = sum(part.bytes for part in self.parts)
        self._starts = np.array([*(part.start for part in self.parts), self.num_documents])
        done = [tasks.load_finished(task) for task in self._verdict_tasks(())]
        self.finished = [task for task in done if task is not None]
        if len(self.finished) < len(done):
            self.finished = None
        else:  # what a run left that was killed after its last task
            self._clear()

    def by_part(self, name: str, function: Function, *, num_buckets: int, inputs: Sequence[Phase] = ()) -> Phase:
        """Runs a phase with a task for every part; of its inputs a part reads the bucket of its number."""
        return self._run(name, function, self.parts, num_buckets, inputs)

    def by_bucket(self, name: str, function: Function, *, num_buckets: int, inputs: Sequence[Phase]) -> Phase:
        """Runs a phase with a task for every bucket of its inputs, which all have the same number of buckets."""
        return self._run(name, function, [None] * inputs[0].num_buckets, num_buckets, inputs)

    def verdicts(self, function: Function, *, inputs: Sequence[Phase]) -> list[tasks.Done]:
        """Runs the last phase, which writes the verdicts of every shard, and removes what the others passed on."""
        planned = self._verdict_tasks(inputs)
        self._step.shown.phase("verdicts", planned)
        done = tasks.run_tasks(self._step.engine, function, planned, advance=self._step.shown.advance)
        self._clear()
        return done

    def _verdict_tasks(self, inputs: Sequence[Phase]) -> list[PhaseTask]:
        return [
            self._task(f"verdicts/{self._step.name}", part.shard.name, number, part, 0, inputs, self._fingerprint)
            for number, part in enumerate(self.parts)
            if part.shard is not None
        ]

    def _run(
        self,
        name: str,
        function: Function,
        parts: Sequence[Part | None],
        num_buckets: int,
        inputs: Sequence[Phase],
    ) -> Phase:
        step = f"shuffle/{self._step.name}/{name}"
        fingerprint = tasks.fingerprint(self._fingerprint, name, len(parts), num_buckets)
        planned = [
            self._task(step, f"{number:06d}", number, part, num_buckets, inputs, fingerprint)
            for number, part in enumerate(parts)
        ]
        self._step.shown.phase(name, planned)
        done = tasks.run_tasks(self._step.engine, function, planned, advance=self._step.shown.advance)
        return Phase(
            directory=self._step.root / "work" / step,
            num_files=len(planned),
            num_buckets=num_buckets,
            results=tuple(dict(task.result) for task in done),
        )

    def _task(
        self,
        step: str,
        name: str,
        number: int,
        part: Part | None,
        num_buckets: int,
        inputs: Sequence[Phase],
        fingerprint: str,
    ) -> PhaseTask:
        return PhaseTask(
            root=self._step.root,
            step=step,
            name=name,
            fingerprint=fingerprint,
            config=self._config,
            stage_name=self._step.name,
            previous=self._step.previous,
            number=number,
            part=part,
            starts=None if part else self._starts,
            num_earlier=self._num_earlier,
            inputs=tuple(dataclasses.replace(phase, results=()) for phase in inputs),
            num_buckets=num_buckets,
            worker_bytes=self._step.worker_bytes,
        )

    def _clear(self) -> None:
        for parent in (self._step.root / "work" / "shuffle", self._step.root / "work" / "markers" / "shuffle"):
            shutil.rmtree(parent / self._step.name, ignore_errors=True)
            with contextlib.suppress(OSError):  # a later stage's phases are there, which go on where they were
                parent.rmdir()


def _earlier_files(root: Path, against: Sequence[str]) -> list[Path]:
    """The selected documents of earlier pipelines, in order."""
    found: list[Path] = []
    for name in against:
        directory = Path(os.path.expandvars(name)).expanduser()
        paths = sorted((directory / "documents").glob("*.parquet"))
        if not paths or directory.resolve() == root.resolve():
            raise ValueError(
                f"against names {name}, which must be the output directory of another pipeline that has finished: "
                f"{directory / 'documents'} holds {len(paths)} parquet files"
            )
        found += paths
    return found


def _size(path: Path) -> tuple[int, int]:
    """Documents in a parquet file, and about how many bytes of text."""
    metadata = pq.read_metadata(path)
    return metadata.num_rows, sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))


def _identity(path: Path) -> list[str | int]:
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns]
