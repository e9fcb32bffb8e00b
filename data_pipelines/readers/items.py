"""What reading gives: records, rejects for what is malformed, and what is passed over on purpose."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

EXCERPT_BYTES = 200


class Reject(NamedTuple):
    """Something that could not be used.

    Attributes:
      record: number of the line, row or record, from 1; 0 is the file as a whole.
      reason: one of a small number of words, to be counted.
      detail: for people.
      excerpt: how it begins.
      offset: where it begins, in bytes, of a jsonl file after decompression; of a web archive on disk, where the
        compressed stream begins that holds it. None in files that are not read from their beginning on.
    """

    record: int
    reason: str
    detail: str = ""
    excerpt: str = ""
    offset: int | None = None


class Skip(NamedTuple):
    """Something sound that the source does not want: counted by its reason, and not written down."""

    reason: str


class Record(NamedTuple):
    """A JSON line or a row of a table; number and offset as in Reject."""

    number: int
    fields: dict[str, Any]
    offset: int | None = None


Records = Iterator[Record | Reject]


class DamagedError(Exception):
    """A file is broken from here on; `offset` as in Reject, where it is known."""

    def __init__(self, reason: str, detail: str, offset: int | None = None):
        super().__init__(detail)
        self.reason, self.detail, self.offset = reason, detail, offset


def excerpt(content: bytes | str) -> str:
    """The beginning, as text whatever it holds."""
    if isinstance(content, str):
        content = content[:EXCERPT_BYTES].encode(errors="replace")
    return content[:EXCERPT_BYTES].decode(errors="replace")


def too_long(record: int, content: bytes | str, max_bytes: int, offset: int | None = None) -> Reject:
    """Of a record of more than `max_bytes`, of which `content` is the beginning."""
    return Reject(record, "too_long", f"more than max_record_bytes = {max_bytes}", excerpt(content), offset)


def field(record: Mapping[str, Any], name: str) -> Any:
    """The value of a field, or with a dotted name of one inside another; None where there is none."""
    if name in record or "." not in name:
        return record.get(name)
    value: Any = record
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
