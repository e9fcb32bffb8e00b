"""The first step: input files to shards of normalised documents; what is malformed goes to quarantine, counted."""

import collections
import dataclasses
import functools
import time
from collections.abc import Iterator
from pathlib import Path

import orjson

from data_pipelines import files, tasks
from data_pipelines.documents import Document, Shard, write_shards
from data_pipelines.readers.inputs import InputFile, SourceConfig, list_inputs, units
from data_pipelines.readers.records import Reject
from data_pipelines.readers.sources import read_documents
from data_pipelines.stages.normalise import normalise
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


def plan(config: PipelineConfig, root: Path) -> list[ReadTask]:
    """Lists the inputs of every source. Raises ValueError for a path that matches nothing."""
    planned: list[ReadTask] = []
    for source in config.sources:
        inputs = [file for file in list_inputs(source) if not Path(file.address).is_relative_to(root.absolute())]
        for unit in units(inputs, config.shard_bytes):
            identity = [(file.name, file.size, file.version, file.format) for file in unit]
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
                    else:
                        reasons[item.reason] += 1
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
    if reasons:
        outputs.append(quarantine)
    else:
        quarantine.unlink()
    result = {
        "shards": [dataclasses.asdict(shard) for shard in shards],
        "quarantined": dict(sorted(reasons.items())),
        "changes": dict(sorted(changes.items())),
        "bytes": sum(shard.bytes for shard in shards),
        "documents": sum(shard.documents for shard in shards),
    }
    return tasks.finish(task, outputs, result, started=started)


def _line(source: str, file: InputFile, reject: Reject) -> bytes:
    return orjson.dumps({"source": source, "file": file.name, **reject._asdict()}) + b"\n"
