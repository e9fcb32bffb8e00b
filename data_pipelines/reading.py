"""The first step: input files to shards of normalised documents; what is malformed goes to quarantine, counted."""

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

from data_pipelines import tasks
from data_pipelines.documents import Document, Shard, write_shards
from data_pipelines.readers.inputs import InputFile, SourceConfig, check_read_once, list_inputs, units
from data_pipelines.readers.items import Reject, Skip
from data_pipelines.readers.sources import read_documents
from data_pipelines.readers.spans import Lines, count_lines, cut, spans
from data_pipelines.readers.tables import cut as cut_table
from data_pipelines.stages.normalise import normalise
from slmjax import files
from slmjax.config import NormaliseConfig, PipelineConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadTask(tasks.Task):
    """Reads a unit of input files of one source; `name` begins the names of its shards."""

    source: SourceConfig
    normalise: NormaliseConfig | None
    unit: tuple[InputFile, ...]
    shard_bytes: int

    @property
    def extent(self) -> tasks.Extent:
        """The files, as they are on disk."""
        return tasks.Extent(sum(file.size for file in self.unit))


def shard_path(root: Path, shard: Shard) -> Path:
    """Where the documents of a shard are, as they were read or, in the directory "text", as stages left them."""
    return root / "work" / shard.directory / f"{shard.name}.parquet"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CountTask(tasks.Task):
    """Counts the lines that begin in the bytes [start, stop) of a file."""

    file: InputFile
    start: int
    stop: int

    @property
    def extent(self) -> tasks.Extent:
        """The span, as it is on disk."""
        return tasks.Extent(self.stop - self.start)


RunStep = Callable[[str, Callable[[Any], tasks.Done], Sequence[tasks.Task]], list[tasks.Done]]


def plan(config: PipelineConfig, root: Path, run_step: RunStep) -> list[ReadTask]:
    """Lists the inputs of every source, large files of lines and parquet files cut into spans.

    `run_step` runs the tasks of a step. Raises ValueError for a path that matches nothing, or a file of two sources.
    """
    outputs = root.resolve()
    found = [
        [file for file in list_inputs(source) if not Path(file.real_address).is_relative_to(outputs)]
        for source in config.sources
    ]
    check_read_once(config.sources, found)
    for source, inputs in zip(config.sources, found, strict=True):
        if not inputs:
            raise ValueError(f"source {source.name}: all its files lie in output_dir, {root}, where none is read")
    pieces = _cut([file for inputs in found for file in inputs], config.shard_bytes, root, run_step)
    planned: list[ReadTask] = []
    for source, inputs in zip(config.sources, found, strict=True):
        for unit in units((piece for file in inputs for piece in pieces.get(file, [file])), config.shard_bytes):
            identity = [(file.name, file.size, file.version, file.format, file.span) for file in unit]
            planned.append(
                ReadTask(
                    root=root,
                    step="read",
                    name=f"{len(planned):05d}",
                    fingerprint=tasks.fingerprint(source, config.normalise, identity, config.shard_bytes),
                    source=source,
                    normalise=config.normalise,
                    unit=unit,
                    shard_bytes=config.shard_bytes,
                )
            )
    return planned


def _cut(
    inputs: Sequence[InputFile], span_bytes: int, root: Path, run_step: RunStep
) -> dict[InputFile, list[InputFile]]:
    """The spans of every file that is larger than one and can be cut, as files of their own."""
    cuttable = dict.fromkeys(file for file in inputs if file.can_be_cut and file.size > span_bytes)
    tables = {file: cut_table(file, span_bytes) for file in cuttable if file.format == "parquet"}
    large = [file for file in cuttable if file not in tables]
    planned = [
        CountTask(
            root=root,
            step="lines",
            name=f"{number:05d}-{part:04d}",
            fingerprint=tasks.fingerprint(file.name, file.size, file.version, start, stop),
            file=file,
            start=start,
            stop=stop,
        )
        for number, file in enumerate(large)
        for part, (start, stop) in enumerate(cut(file.size, span_bytes))
    ]
    if not planned:  # markers of an earlier config
        files.remove_others(root / "work" / "markers" / "lines", set())
        return tables
    counted: dict[InputFile, list[Lines]] = {file: [] for file in large}
    for task, done in zip(planned, run_step("lines", count_piece, planned), strict=True):
        counted[task.file].append(Lines(**done.result["lines"]))
    return tables | {
        file: [dataclasses.replace(file, size=span.stop - span.start, span=span) for span in spans(pieces, file.size)]
        for file, pieces in counted.items()
        if not all(lines.blank for lines in pieces)  # a file without records is read at once
    }


def count_piece(task: CountTask) -> tasks.Done:
    """Counts the lines of a piece of a file."""
    started = time.monotonic()
    try:
        with task.file.open() as file:
            lines = count_lines(file, task.start, task.stop)
    except OSError as error:
        raise ValueError(f"cannot read {task.file.address}: {error.strerror or error}") from error
    return tasks.finish(task, [], {"lines": lines._asdict(), "bytes": task.stop - task.start}, started=started)


def read_unit(task: ReadTask) -> tasks.Done:
    """Reads one unit; the result holds its shards, records in quarantine by reason, texts by what was changed."""
    started = time.monotonic()
    quarantine = task.root / "quarantine" / f"{task.name}.jsonl"
    reasons: collections.Counter[str] = collections.Counter()
    changes: collections.Counter[str] = collections.Counter()
    clean = functools.partial(normalise, task.normalise, changes=changes)
    with files.replacing(quarantine) as partial, open(partial, "wb") as rejects:

        def documents() -> Iterator[Document]:
            for file in task.unit:
                for item in read_documents(task.source, file, clean):
                    if isinstance(item, Document):
                        yield item
                        continue
                    reasons[item.reason] += 1
                    if not isinstance(item, Skip):
                        rejects.write(_line(task.source.name, file, item))

        shards = list(
            write_shards(
                documents(),
                task.root / "work" / "read",
                prefix=task.name,
                source=task.source.name,
                shard_bytes=task.shard_bytes,
            )
        )
    outputs = [shard_path(task.root, shard) for shard in shards]
    if quarantine.stat().st_size:
        outputs.append(quarantine)
    else:
        quarantine.unlink()
    result = {
        "shards": [dataclasses.asdict(shard) for shard in shards],
        "quarantined": dict(sorted(reasons.items())),
        "changes": dict(sorted(changes.items())),
        "bytes": sum(shard.bytes for shard in shards),
        "documents": sum(shard.documents for shard in shards),
        "files": [[file.name, file.span and dataclasses.asdict(file.span)] for file in task.unit],
    }
    return tasks.finish(task, outputs, result, started=started)


def _line(source: str, file: InputFile, reject: Reject) -> bytes:
    return orjson.dumps({"source": source, "file": file.name, **reject._asdict()}) + b"\n"


def first_reject(quarantine: Path) -> str:
    """The first line of the quarantine, for an error message; "" if there is none."""
    for path in sorted(quarantine.glob("*.jsonl")):
        with open(path, "rb") as file:
            reject = orjson.loads(file.readline())
        return (
            f". The first: {reject['file']}, record {reject['record']}: {reject['reason']} {reject['detail']}".rstrip()
        )
    return ""
