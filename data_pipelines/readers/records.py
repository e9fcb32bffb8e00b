"""Records of one file: JSON lines and rows of tables as dictionaries, whole texts as strings; damage as rejects."""

from collections.abc import Collection, Iterable, Iterator
from typing import assert_never

import orjson

from data_pipelines.readers import tables
from data_pipelines.readers.compression import pieces
from data_pipelines.readers.inputs import InputFile
from data_pipelines.readers.items import EXCERPT_BYTES, DamagedError, Record, Records, Reject, excerpt, too_long

_BOM = b"\xef\xbb\xbf"


def read_text(file: InputFile, max_bytes: int) -> str | Reject:
    """The whole file as one text."""
    content = read_bytes(file, max_bytes)
    if isinstance(content, Reject):
        return content
    if not content:
        return Reject(0, "empty_file")
    try:
        return content.removeprefix(_BOM).decode()
    except UnicodeDecodeError as error:
        return Reject(0, "invalid_utf8", str(error), excerpt(content[max(0, error.start - 20) :]), error.start)


def read_bytes(file: InputFile, max_bytes: int) -> bytes | Reject:
    """The whole file, decompressed."""
    if file.format == "not_a_file":
        return no_file()
    parts, size = [], 0
    try:
        for _, content in pieces(file.read(), file.compression):
            parts.append(content)
            size += len(content)
            if size > max_bytes:
                return too_long(0, b"".join(parts), max_bytes)
    except DamagedError as error:
        return Reject(0, error.reason, error.detail)
    return b"".join(parts)


def read_records(file: InputFile, columns: Collection[str], max_bytes: int, *, needs: str | None = None) -> Records:
    """Numbered records of a jsonl file or a table.

    Args:
      file: to read.
      columns: of tables only these are read, as far as they are there; inner ones have dotted names.
      max_bytes: longer records are rejected.
      needs: the one of `columns` without which a table as a whole is rejected; by default any will do.
    """
    match file.format:
        case "jsonl":
            yield from _json_lines(file, max_bytes)
        case "parquet" | "arrow":
            yield from tables.rows(file, columns, max_bytes, needs=needs)
        case "not_a_file":
            yield no_file()
        case "warc":
            yield Reject(0, "unsupported_extension", "WarcSourceConfig reads web archives")
        case "text" | "unsupported":  # whole texts have no records: no conversations in them
            yield Reject(0, "unsupported_extension", "name the format in the source's config, or move the file away")
        case _:
            assert_never(file.format)


def no_file() -> Reject:
    """Of something in a directory that cannot be opened as a file."""
    return Reject(0, "not_a_file", "a link to nothing or to a directory, a pipe or a device; paths may name its target")


def _json_lines(file: InputFile, max_bytes: int) -> Records:
    number, begin, blank = 0, 0, True
    if file.span is not None:  # a file that is cut is not empty, though a span of it may be
        number, begin, blank = file.span.first_line - 1, file.span.start, False
    try:
        for line, size in _lines((content for _, content in pieces(file.read(), file.compression)), max_bytes):
            number, offset, begin = number + 1, begin, begin + size + 1
            line = line.removeprefix(_BOM) if number == 1 else line
            blank = blank and not line.strip()
            if size > max_bytes:
                yield too_long(number, line, max_bytes, offset)
            elif line.strip():
                yield _parse(number, line, offset)
    except DamagedError as error:
        yield Reject(number + 1, error.reason, error.detail, offset=begin)
        return
    if blank:
        yield Reject(0, "empty_file")


def _parse(number: int, line: bytes, offset: int) -> Record | Reject:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:
            line.decode()
        except UnicodeDecodeError as invalid:
            return Reject(number, "invalid_utf8", str(invalid), excerpt(line), offset)
        return Reject(number, "invalid_json", str(error), excerpt(line), offset)
    if not isinstance(record, dict):
        kind = type(record).__name__
        return Reject(number, "wrong_type", f"expected an object, got {kind}", excerpt(line), offset)
    return Record(number, record, offset)


def _lines(chunks: Iterable[bytes], max_bytes: int) -> Iterator[tuple[bytes, int]]:
    """Lines and their lengths; of a line longer than `max_bytes` only the beginning is kept in memory."""
    pending: list[bytes] = []
    size = 0
    for chunk in chunks:
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            size += len(end)
            yield b"".join([*pending, end]) if size <= max_bytes else b"".join([*pending, end])[:EXCERPT_BYTES], size
            pending, size = [], 0
        size += len(rest)
        pending.append(rest)
        if size > max_bytes:
            pending = [b"".join(pending)[:EXCERPT_BYTES]]
    if size:
        yield b"".join(pending), size
