"""Spans of a large file of lines, so that several workers read it: a span has the lines that begin in its bytes."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import BinaryIO


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """The lines that begin in the bytes [start, stop); `first_line` is the number of the first of them, from 1."""

    start: int
    stop: int
    first_line: int


def cut(size: int, span_bytes: int) -> list[tuple[int, int]]:
    """Start and stop of equal spans of at most `span_bytes`."""
    number = -(-size // span_bytes)
    bounds = [size * i // number for i in range(number + 1)]
    return list(itertools.pairwise(bounds))


def count_lines(file: BinaryIO, start: int, stop: int, chunk_bytes: int = 1 << 20) -> tuple[int, bool]:
    """How many lines begin in [start, stop), and whether there is nothing but white space in it."""
    lines, blank, last = int(start == 0), True, b""
    position = max(start - 1, 0)  # a line begins where the one before ends
    file.seek(position)
    while chunk := file.read(min(chunk_bytes, stop - position)):
        position += len(chunk)
        lines += chunk.count(b"\n")
        blank = blank and not chunk.strip()
        last = chunk[-1:]
    return lines - (last == b"\n"), blank


def read_lines(file: BinaryIO, span: Span, chunk_bytes: int = 1 << 16) -> Iterator[bytes]:
    """Yields the bytes of the lines that begin in a span, to the end of the last one."""
    position, begun = max(span.start - 1, 0), span.start == 0
    file.seek(position)
    while chunk := file.read(chunk_bytes):
        if not begun:
            end = chunk.find(b"\n")
            position += len(chunk) if end < 0 else end + 1
            if position >= span.stop:
                return
            chunk, begun = chunk[end + 1 :], end >= 0
            if not begun:
                continue
        if position + len(chunk) >= span.stop:
            end = chunk.find(b"\n", max(0, span.stop - 1 - position))
            if end >= 0:
                yield chunk[: end + 1]
                return
        position += len(chunk)
        yield chunk
