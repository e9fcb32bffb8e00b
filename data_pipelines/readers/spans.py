"""Spans of a large file, so that several workers read it: whole lines or row groups, which know their numbers."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """The bytes [start, stop), of whole lines, or the row groups [start, stop) of a parquet file.

    `first_line` is the number of the first line or row, from 1.
    """

    start: int
    stop: int
    first_line: int


class Lines(NamedTuple):
    """The lines that begin in some bytes of a file.

    Attributes:
      number: of them.
      first: where the first one begins; of no account where there is none.
      blank: whether these bytes are nothing but white space.
    """

    number: int
    first: int
    blank: bool


def cut(size: int, span_bytes: int) -> list[tuple[int, int]]:
    """Start and stop of equal pieces of at most `span_bytes`, wherever these fall."""
    number = -(-size // span_bytes)
    return list(itertools.pairwise(size * i // number for i in range(number + 1)))


def count_lines(file: BinaryIO, start: int, stop: int, chunk_bytes: int = 1 << 20) -> Lines:
    """The lines that begin in [start, stop)."""
    number, first, blank, ends = int(start == 0), 0, True, False
    position = max(start - 1, 0)  # a line begins where the one before ends
    file.seek(position)
    while chunk := file.read(min(chunk_bytes, stop - position)):
        if number == 0:
            first = position + chunk.find(b"\n") + 1
        number += chunk.count(b"\n")
        blank = blank and not chunk.strip()
        ends = chunk.endswith(b"\n")
        position += len(chunk)
    return Lines(number - ends, first, blank)


def spans(counted: Sequence[Lines], size: int) -> list[Span]:
    """The spans of a file of `size` bytes, one for each of its pieces in which a line begins."""
    begun = [lines for lines in counted if lines.number]
    numbers = itertools.accumulate((lines.number for lines in begun), initial=1)
    bounds = itertools.pairwise([*(lines.first for lines in begun), size])
    return [Span(start=start, stop=stop, first_line=line) for (start, stop), line in zip(bounds, numbers, strict=False)]


def read_span(file: BinaryIO, span: Span, chunk_bytes: int) -> Iterator[bytes]:
    """Yields the bytes of a span."""
    file.seek(span.start)
    left = span.stop - span.start
    while left > 0 and (chunk := file.read(min(chunk_bytes, left))):
        yield chunk
        left -= len(chunk)
