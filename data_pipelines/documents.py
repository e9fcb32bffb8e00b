"""Documents as Arrow batches and as parquet shards, the form in which every step reads and writes them."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from slmjax import files

# A row group is what is in memory at one time.
_GROUP_BYTES = 8 << 20
_GROUP_DOCUMENTS = 2000
_SMALL_BYTES = 1 << 20  # of less numpy's calls take the time, of more what is found no longer fits into a cache

_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
TEXT_SCHEMA = pa.schema([("id", pa.string()), ("key", pa.string()), ("bytes", pa.int64()), ("text", pa.string())])
CONVERSATION_SCHEMA = TEXT_SCHEMA.append(pa.field("messages", pa.list_(_MESSAGE)))


class Document(NamedTuple):
    """A text, or a conversation together with all of its turns as one text, which is what filters see.

    `id` is unique in the corpus; `key` decides the side of the split.
    """

    id: str
    key: str
    text: str
    messages: Sequence[Any] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """A parquet file of documents of one source: `<name>.parquet` in the directory of every step.

    `directory`, in work, has its texts: "read", or "text" where stages changed them.
    """

    name: str
    source: str
    documents: int
    bytes: int
    directory: str = "read"


def write_shards(
    documents: Iterable[Document], directory: Path, *, prefix: str, source: str, shard_bytes: int
) -> Iterator[Shard]:
    """Writes <prefix>-NNNN.parquet, a new one whenever one holds `shard_bytes` of text; yields each when whole."""
    pending = iter(documents)
    document = next(pending, None)
    number = 0
    while document is not None:
        name = f"{prefix}-{number:04d}"
        schema = TEXT_SCHEMA if document.messages is None else CONVERSATION_SCHEMA
        num_documents = num_bytes = group_bytes = 0
        group: list[tuple] = []
        with parquet_writer(directory / f"{name}.parquet", schema, compression="none") as writer:
            while document is not None and num_bytes < shard_bytes:
                size = len(document.text) if document.text.isascii() else len(document.text.encode())
                group.append((document.id, document.key, size, document.text, document.messages))
                num_documents, num_bytes, group_bytes = num_documents + 1, num_bytes + size, group_bytes + size
                if group_bytes >= _GROUP_BYTES or len(group) == _GROUP_DOCUMENTS:
                    writer.write_batch(_batch(group, schema))
                    group, group_bytes = [], 0
                document = next(pending, None)
            if group:
                writer.write_batch(_batch(group, schema))
        yield Shard(name=name, source=source, documents=num_documents, bytes=num_bytes)
        number += 1


def _batch(rows: list[tuple], schema: pa.Schema) -> pa.RecordBatch:
    columns = list(zip(*rows, strict=True))[: len(schema)]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.record_batch(arrays, schema=schema)


@contextlib.contextmanager
def parquet_writer(
    path: Path, schema: pa.Schema, *, compression: Literal["zstd", "lz4", "none"] = "lz4"
) -> Iterator[pq.ParquetWriter]:
    """A writer of a whole file or none; every `write_batch` makes a row group.

    What only passes from one step to the next is not compressed where it is large, which would take longer than a
    filter, and by lz4 where it is small; what is kept is compressed by zstd.
    """
    # Dictionaries of ids and numbers, which hardly ever repeat, cost a third of the speed of writing and of reading.
    with (
        files.replacing(path) as partial,
        pq.ParquetWriter(partial, schema, compression=compression, use_dictionary=False) as writer,
    ):
        yield writer


def read_batches(path: Path, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Yields the row groups of a parquet file, one batch each."""
    with pq.ParquetFile(path, pre_buffer=False) as file:
        for group in range(file.num_row_groups):
            # In this thread: waiting for another one costs more than what two could save.
            table = file.read_row_group(group, columns=columns, use_threads=False)
            chunks = [
                column.chunks[0] if column.num_chunks == 1 else column.combine_chunks() for column in table.columns
            ]
            yield pa.record_batch(chunks, schema=table.schema)


def small_batches(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Slices of a batch with the column bytes, each with about 1 MB of text and at least one document."""
    ends = batch.column("bytes").to_numpy().cumsum()
    first = 0
    while first < len(batch):
        begin = ends[first - 1] if first else 0
        last = max(int(ends.searchsorted(begin + _SMALL_BYTES, side="right")), first + 1)
        yield batch.slice(first, last - first)
        first = last


def columns(path: Path, names: Sequence[str]) -> list[pa.Array]:
    """Some whole columns of a parquet file."""
    with pq.ParquetFile(path, pre_buffer=False) as file:
        table = file.read(list(names), use_threads=False).select(list(names))  # KeyError where there is none of a name
    return [column.combine_chunks() for column in table.columns]


def column(path: Path, name: str) -> pa.Array:
    """One whole column of a parquet file."""
    return columns(path, [name])[0]
