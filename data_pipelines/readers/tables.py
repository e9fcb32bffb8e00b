"""Rows of parquet files and of Arrow files and streams, as `datasets` saves them; damage as rejects."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.readers.inputs import InputFile
from data_pipelines.readers.items import Record, Records, Reject, too_long
from data_pipelines.readers.spans import Span

_BATCH_ROWS = 1000
_BATCH_BYTES = 16 << 20
_ARROW_FILE_MAGIC = b"ARROW1"


class _Part(NamedTuple):
    """Rows that are lost together where one is damaged.

    Attributes:
      batches: reads them.
      rows: how many; None where that is not known before.
    """

    batches: Callable[[], Iterable[pa.RecordBatch]]
    rows: int | None


class _MissingError(Exception):
    pass


class _UnreadableError(Exception):
    pass


# Arrow reports damage also as OSError without an error number, and damaged names, sizes and dates as Python does.
_DAMAGE = (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError)


def rows(file: InputFile, columns: Collection[str], max_bytes: int, *, needs: str | None = None) -> Records:
    """Rows of the columns that the table has; see `read_records`."""
    if file.size == 0:
        yield Reject(0, "empty_file")
        return
    reason, before = f"damaged_{file.format}", file.span.first_line - 1 if file.span else 0
    number = before
    try:
        with file.open() as handle:
            of_file = functools.partial(_parquet, file.span) if file.format == "parquet" else _arrow
            for part in of_file(handle, columns, needs):
                first = number
                try:
                    for batch in part.batches():
                        for record in _values(batch):
                            number += 1
                            yield _checked(number, record, max_bytes)
                except _DAMAGE as error:
                    lost = "" if part.rows is None else f"; {first + part.rows - number} rows are lost"
                    yield Reject(number + 1, reason, _told(error) + lost)
                number = number if part.rows is None else first + part.rows
    except _MissingError as error:
        if before == 0:  # it is said once of a file
            yield Reject(0, "missing_field", str(error))
        return
    except _UnreadableError as error:
        raise ValueError(f"cannot read {file.address}: {error}") from error
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise ValueError(f"cannot read {file.address}: {error.strerror}") from error
        if number > before or before == 0:
            yield Reject(number, reason, str(error))
        return
    except Exception as error:  # file systems over the network have errors of their own
        raise ValueError(f"cannot read {file.address}: {error}") from error
    if number == 0 and file.span is None:
        yield Reject(0, "empty_file")


def cut(file: InputFile, span_bytes: int) -> list[InputFile]:
    """The spans of a parquet file, each of row groups that take at most `span_bytes` of it, or of a larger one.

    Only the file itself where there is nothing to cut, which is also what is empty or damaged: reading says so.
    """
    try:
        with file.open() as handle, pq.ParquetFile(handle) as table:
            groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
            rows, weights = ([getattr(each, name) for each in groups] for name in ("num_rows", "total_byte_size"))
    except _DAMAGE:
        return [file]
    if len(groups) < 2 or min(rows) < 1 or min(weights) < 1:
        return [file]
    bounds, filled = [0], 0.0
    sizes = [file.size * weight / sum(weights) for weight in weights]
    for i, size in enumerate(sizes):
        if i > bounds[-1] and filled + size > span_bytes:
            bounds.append(i)
            filled = 0.0
        filled += size
    if len(bounds) == 1:
        return [file]
    first = list(itertools.accumulate(rows, initial=1))
    return [
        dataclasses.replace(
            file, size=round(sum(sizes[start:stop])), span=Span(start=start, stop=stop, first_line=first[start])
        )
        for start, stop in itertools.pairwise([*bounds, len(groups)])
    ]


def _told(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        raise _UnreadableError(error.strerror) from error
    return str(error)


def _parquet(span: Span | None, handle: Any, columns: Collection[str], needs: str | None) -> Iterator[_Part]:
    with pq.ParquetFile(handle) as table:
        present = _present(table.schema_arrow, columns, needs)
        for group in range(span.start, span.stop) if span else range(table.num_row_groups):
            about = table.metadata.row_group(group)
            size = max(1, min(_BATCH_ROWS, _BATCH_BYTES * about.num_rows // max(about.total_byte_size, 1)))
            read = functools.partial(table.iter_batches, size, [group], present, use_threads=False)
            yield _Part(read, about.num_rows)


def _arrow(handle: Any, columns: Collection[str], needs: str | None) -> Iterator[_Part]:
    is_file = handle.read(len(_ARROW_FILE_MAGIC)) == _ARROW_FILE_MAGIC
    handle.seek(0)
    with (pa.ipc.open_file if is_file else pa.ipc.open_stream)(handle) as reader:
        present = _present(reader.schema, columns, needs)
        chosen = [name for name in reader.schema.names if name in present or _is_outer(name, present)]
        if isinstance(reader, pa.ipc.RecordBatchFileReader):
            for i in range(reader.num_record_batches):
                yield _Part(lambda i=i: [_sound(reader.get_batch(i).select(chosen))], None)
        else:
            yield _Part(lambda: (_sound(batch.select(chosen)) for batch in reader), None)


def _present(schema: pa.Schema, columns: Collection[str], needs: str | None) -> list[str]:
    present = [name for name in columns if _has(schema, name)]
    if not present or (needs is not None and needs not in present):
        wanted = " or ".join(columns) if needs is None else needs
        raise _MissingError(f"no column {wanted}, only {schema.names}")
    return present


def _has(fields: pa.Schema | pa.StructType, name: str) -> bool:
    if name in fields.names:
        return True
    outer, _, inner = name.partition(".")
    if not inner or outer not in fields.names:
        return False
    kind = fields.field(outer).type
    return pa.types.is_struct(kind) and _has(kind, inner)


def _is_outer(name: str, paths: Iterable[str]) -> bool:
    return any(path.startswith(f"{name}.") for path in paths)


def _sound(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Refuses a batch whose offsets point outside of it, which Arrow would follow; text that is not UTF-8 may stay."""
    for column in batch.columns:
        if pa.types.is_string(column.type):
            column = column.cast(pa.binary())
        elif pa.types.is_large_string(column.type):
            column = column.cast(pa.large_binary())
        column.validate(full=True)
    return batch


def _values(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """The rows, as far as they have values; the error for one with text that is not UTF-8."""
    names = batch.schema.names
    try:
        columns = [column.to_pylist() for column in batch.columns]
    except UnicodeDecodeError:
        yield from (_value(batch, row) for row in range(batch.num_rows))
        return
    for row in zip(*columns, strict=True):
        yield {name: value for name, value in zip(names, row, strict=True) if value is not None}


def _value(batch: pa.RecordBatch, row: int) -> dict[str, Any] | UnicodeDecodeError:
    try:
        values = {name: batch.column(i)[row].as_py() for i, name in enumerate(batch.schema.names)}
    except UnicodeDecodeError as error:
        return error
    return {name: value for name, value in values.items() if value is not None}


def _checked(number: int, record: dict[str, Any] | UnicodeDecodeError, max_bytes: int) -> Record | Reject:
    if isinstance(record, UnicodeDecodeError):
        return Reject(number, "invalid_utf8", str(record))
    if _size(record) > max_bytes:
        return too_long(number, "", max_bytes)
    return Record(number, record)


def _size(value: Any) -> int:
    """Characters and bytes in a value of any depth."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 0
