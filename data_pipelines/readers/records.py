"""Records of one file: JSON lines and parquet rows as dictionaries, whole text files as strings; damage as rejects."""

import zlib
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple, assert_never

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from data_pipelines.readers.inputs import InputFile

_EXCERPT_BYTES = 200

Records = Iterator["tuple[int, dict[str, Any]] | Reject"]


class Reject(NamedTuple):
    """Something that could not be used.

    Attributes:
      record: number of the line or row, from 1; 0 is the file as a whole.
      reason: one of a small number of words, to be counted.
      detail: for people.
      excerpt: how it begins.
    """

    record: int
    reason: str
    detail: str = ""
    excerpt: str = ""


class _DamagedError(Exception):
    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def read_text(file: InputFile, max_bytes: int) -> str | Reject:
    """The whole file as one text."""
    pieces, size = [], 0
    try:
        for chunk in _chunks(file):
            pieces.append(chunk)
            size += len(chunk)
            if size > max_bytes:
                return _too_long(0, b"".join(pieces), max_bytes)
    except _DamagedError as error:
        return Reject(0, error.reason, error.detail)
    content = b"".join(pieces)
    if not content:
        return Reject(0, "empty_file")
    try:
        return content.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as error:
        return Reject(0, "invalid_utf8", str(error), excerpt(content[max(0, error.start - 20) :]))


def read_records(file: InputFile, columns: Collection[str], max_bytes: int) -> Records:
    """Numbered records of a jsonl or parquet file; of a parquet file only those of `columns` that it has."""
    match file.format:
        case "jsonl":
            yield from _json_lines(file, max_bytes)
        case "parquet":
            yield from _parquet_rows(file, columns, max_bytes)
        case "text" | "unsupported":  # whole texts have no records: no conversations in them
            yield Reject(0, "unsupported_extension", "name the format in the source's config, or move the file away")
        case _:
            assert_never(file.format)


def excerpt(content: bytes | str) -> str:
    """The beginning, as text whatever it holds."""
    if isinstance(content, str):
        content = content[:_EXCERPT_BYTES].encode(errors="replace")
    return content[:_EXCERPT_BYTES].decode(errors="replace")


def _too_long(record: int, content: bytes, max_bytes: int) -> Reject:
    return Reject(record, "too_long", f"more than max_record_bytes = {max_bytes}", excerpt(content))


def _json_lines(file: InputFile, max_bytes: int) -> Records:
    number, blank = 0, True
    if file.span is not None:  # a file that is cut is not empty, though a span of it may be
        number, blank = file.span.first_line - 1, False
    try:
        for line, size in _lines(_chunks(file), max_bytes):
            number += 1
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            blank = blank and not line.strip()
            if size > max_bytes:
                yield _too_long(number, line, max_bytes)
            elif line.strip():
                yield _parse(number, line)
    except _DamagedError as error:
        yield Reject(number + 1, error.reason, error.detail)
        return
    if blank:
        yield Reject(0, "empty_file")


def _parse(number: int, line: bytes) -> tuple[int, dict[str, Any]] | Reject:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:
            line.decode()
        except UnicodeDecodeError as invalid:
            return Reject(number, "invalid_utf8", str(invalid), excerpt(line))
        return Reject(number, "invalid_json", str(error), excerpt(line))
    if not isinstance(record, dict):
        return Reject(number, "wrong_type", f"expected an object, got {type(record).__name__}", excerpt(line))
    return number, record


def _lines(chunks: Iterable[bytes], max_bytes: int) -> Iterator[tuple[bytes, int]]:
    """Lines and their lengths; of a line longer than `max_bytes` only the beginning is kept in memory."""
    pending: list[bytes] = []
    size = 0
    for chunk in chunks:
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            size += len(end)
            yield b"".join([*pending, end]) if size <= max_bytes else b"".join([*pending, end])[:_EXCERPT_BYTES], size
            pending, size = [], 0
        size += len(rest)
        pending.append(rest)
        if size > max_bytes:
            pending = [b"".join(pending)[:_EXCERPT_BYTES]]
    if size:
        yield b"".join(pending), size


def _chunks(file: InputFile) -> Iterator[bytes]:
    """Decompressed bytes. Raises _DamagedError where the compressed stream is broken or ends early."""
    if file.compression is None:
        yield from file.read()
        return
    decompressor, inside = _decompressor(file), False
    for chunk in file.read():
        while chunk:
            try:
                content = decompressor.decompress(chunk)
            except (zlib.error, zstandard.ZstdError) as error:
                raise _DamagedError("damaged_compression", str(error)) from error
            yield content
            # A file may be several streams one after another, as parallel compressors write them.
            chunk, inside = (decompressor.unused_data, False) if decompressor.eof else (b"", True)
            if not inside:
                decompressor = _decompressor(file)
    if inside:
        raise _DamagedError("truncated_compression", f"the .{file.compression} stream ends early")


def _decompressor(file: InputFile) -> Any:
    if file.compression == "gz":
        return zlib.decompressobj(wbits=31)
    return zstandard.ZstdDecompressor().decompressobj()


def _parquet_rows(file: InputFile, columns: Collection[str], max_bytes: int) -> Records:
    if file.size == 0:
        yield Reject(0, "empty_file")
        return
    number = 0
    try:
        with file.open() as handle, pq.ParquetFile(handle) as parquet:
            names = parquet.schema_arrow.names
            present = [name for name in columns if name in names]
            if parquet.metadata.num_rows == 0:
                yield Reject(0, "empty_file")
            elif not present:
                yield Reject(0, "missing_field", f"no column {' or '.join(columns)}, only {names}")
                return
            for batch in parquet.iter_batches(batch_size=1000, columns=present):
                for row in range(batch.num_rows):
                    number += 1
                    yield _row(number, batch, row, max_bytes)
    except pa.ArrowInvalid as error:
        yield Reject(number, "damaged_parquet", str(error))
    except OSError as error:
        # Arrow reports some damage as OSError without an error number.
        if error.errno is not None:
            raise ValueError(f"cannot read {file.address}: {error.strerror}") from error
        yield Reject(number, "damaged_parquet", str(error))


def _row(number: int, batch: pa.RecordBatch, row: int, max_bytes: int) -> tuple[int, dict[str, Any]] | Reject:
    try:
        record = {name: batch.column(i)[row].as_py() for i, name in enumerate(batch.schema.names)}
    except UnicodeDecodeError as error:
        return Reject(number, "invalid_utf8", str(error))
    size = sum(len(value) for value in record.values() if isinstance(value, str | bytes))
    if size > max_bytes:
        return Reject(number, "too_long", f"more than max_record_bytes = {max_bytes}")
    return number, {name: value for name, value in record.items() if value is not None}
