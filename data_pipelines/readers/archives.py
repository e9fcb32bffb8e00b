"""Records of web archives, framed so that reading goes on after damage: each whole, or rejected with its offset."""

import collections
import functools
import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import zstandard

from data_pipelines.readers.compression import Compression, pieces
from data_pipelines.readers.inputs import InputFile
from data_pipelines.readers.items import DamagedError, Reject, Skip, excerpt, too_long

_CHUNK_BYTES = 64 << 10
_HEADER_BYTES = 64 << 10
_HEADER_END = b"\r\n\r\n"
_VERSION = b"WARC/"
_BLANK = re.compile(rb"[\r\n]*")
# How a record of a file, or a stream of a compressed one, begins.
_STARTS: dict[Compression | None, bytes] = {None: b"\nWARC/1.", "gz": b"\x1f\x8b\x08", "zst": b"\x28\xb5\x2f\xfd"}
_DICTIONARY_FRAME = (0x184D2A5D).to_bytes(4, "little")
_DICTIONARY_BYTES = 16 << 20
_TYPES = frozenset(["warcinfo", "response", "resource", "request", "metadata", "revisit", "conversion", "continuation"])


class ArchiveRecord(NamedTuple):
    """A record as it stands in the archive.

    Attributes:
      number: from 1, damaged ones included.
      offset: as in Reject.
      header: names in lower case.
      content: header and block.
    """

    number: int
    offset: int
    header: dict[str, str]
    content: bytes


def read_archive(file: InputFile, types: Collection[str], max_bytes: int) -> Iterator[ArchiveRecord | Reject | Skip]:
    """Yields the records of the given types in order; of the others one Skip each.

    Damage costs the record that it is in, and of a compressed stream what follows in it: reading goes on where the next
    record, or the next stream with records, begins.
    """
    if file.size == 0:
        yield Reject(0, "empty_file")
        return
    number, start = 0, 0
    try:
        with file.open() as handle:
            dictionary = _dictionary(handle) if file.compression == "zst" else b""
            open_at = functools.partial(_Content, handle, file.compression, dictionary)
            while start is not None:
                content = open_at(start)
                try:
                    while content.at_record():
                        number += 1
                        yield _record(content, number, types, max_bytes, file)
                    start = None
                except DamagedError as error:
                    number += content.offset is None  # the beginning of a record could not be read
                    begin = (error.offset or 0) if content.offset is None else content.offset
                    yield Reject(number, error.reason, error.detail, content.beginning, begin)
                    candidates = _find(handle, begin + 1, _STARTS[file.compression])
                    if file.compression is None:
                        start = next((place + 1 for place in candidates), None)
                    else:
                        start = next((place for place in candidates if open_at(place, 1 << 10).has_records()), None)
    except Exception as error:  # file systems over the network have errors of their own
        raise ValueError(f"cannot read {file.address}: {getattr(error, 'strerror', None) or error}") from error
    if number == 0:
        yield Reject(0, "empty_file")


def _record(
    content: "_Content", number: int, types: Collection[str], max_bytes: int, file: InputFile
) -> ArchiveRecord | Reject | Skip:
    """Reads the record that `content` is at."""
    offset = content.begin()
    if content.peek(len(_VERSION)) != _VERSION:
        raise DamagedError("damaged_warc", f"a record begins with {_VERSION.decode()}1.0 or 1.1")
    end = content.find(_HEADER_END, _HEADER_BYTES)
    if end < 0:
        raise DamagedError("damaged_warc", f"no end of the record's header within {_HEADER_BYTES} bytes")
    header = _header(content.peek(end))
    length = header.get("content-length", "")
    if not (length.isascii() and length.isdecimal() and len(length) < 19):
        raise DamagedError("damaged_warc", f"Content-Length is {length[:50]!r}")
    kind, whole = header.get("warc-type", "").lower(), end + len(_HEADER_END) + int(length)
    keep = kind in types and int(length) <= max_bytes
    fits = file.compression is not None or offset + whole <= file.size
    block = content.take(whole) if keep and fits else b""
    if not fits or (len(block) if keep else content.skip(whole)) < whole:
        raise DamagedError("truncated_warc", f"the file ends before the Content-Length of {length} bytes")
    if not content.at_end_of_record():
        raise DamagedError("wrong_length", f"no record ends after the Content-Length of {length} bytes")
    content.offset = None
    if keep:
        return ArchiveRecord(number, offset, header, block)
    if kind in types:
        return too_long(number, header.get("warc-target-uri", ""), max_bytes, offset)
    return Skip(f"record_type_{kind if kind in _TYPES else 'unknown'}")


def _header(content: bytes) -> dict[str, str]:
    fields = (line.partition(":") for line in content.decode(errors="replace").split("\r\n")[1:])
    return {name.strip().lower(): value.strip() for name, _, value in fields}


class _Content:
    """Content of a file from a place on, and where in the file it comes from.

    Attributes:
      offset: of the record being read, as in Reject; None between records.
      beginning: of that record, for people.
    """

    def __init__(
        self,
        handle: Any,
        compression: Compression | None,
        dictionary: bytes,
        start: int,
        chunk_bytes: int = _CHUNK_BYTES,
    ):
        handle.seek(start)
        chunks = iter(functools.partial(handle.read, chunk_bytes), b"")
        self._pieces = pieces(chunks, compression, start=start, dictionary=dictionary)
        self._plain = compression is None
        self._buffer, self._position = bytearray(), 0
        self._places: collections.deque[tuple[int, int]] = collections.deque()  # position of a piece, its offset
        self._error: DamagedError | None = None
        self.offset: int | None = None
        self.beginning = ""

    def at_record(self) -> bool:
        """Whether there is more, after empty lines."""
        self._skip_blank()
        return bool(self._buffer)

    def has_records(self) -> bool:
        """Whether records begin here."""
        try:
            return self.at_record() and self.peek(len(_VERSION)) == _VERSION
        except DamagedError:
            return False

    def begin(self) -> int:
        """Notes that a record begins here."""
        while len(self._places) > 1 and self._places[1][0] <= self._position:
            self._places.popleft()
        position, offset = self._places[0]
        self.offset = offset + (self._position - position if self._plain else 0)
        self.beginning = excerpt(bytes(self._buffer[:200]))
        return self.offset

    def at_end_of_record(self) -> bool:
        """Whether two line ends, another record or nothing follows."""
        try:
            if self.peek(len(_HEADER_END)) == _HEADER_END:
                return True
            self._skip_blank()
            return self.peek(len(_VERSION)) in (b"", _VERSION)
        except DamagedError:  # of the next stream, which is told when it is read
            return True

    def find(self, what: bytes, within: int) -> int:
        """How far away `what` is, -1 if further than `within`."""
        while (place := self._buffer.find(what, 0, within)) < 0 and len(self._buffer) < within and self._more():
            pass
        return place

    def peek(self, size: int) -> bytes:
        """The next bytes, fewer at the end."""
        while len(self._buffer) < size and self._more():
            pass
        return bytes(self._buffer[:size])

    def take(self, size: int) -> bytes:
        """The next bytes, which are then behind."""
        content = self.peek(size)
        self._drop(len(content))
        return content

    def skip(self, size: int) -> int:
        """Leaves so many bytes behind, fewer at the end; returns how many."""
        left = size
        while left and (self._buffer or self._more()):
            left -= self._drop(min(left, len(self._buffer)))
        return size - left

    def _skip_blank(self) -> None:
        while self._buffer or self._more():
            self._drop(_BLANK.match(self._buffer).end())  # pyright: ignore[reportOptionalMemberAccess]
            if self._buffer:
                return

    def _drop(self, size: int) -> int:
        del self._buffer[:size]
        self._position += size
        return size

    def _more(self) -> bool:
        """Gets another piece; False at the end."""
        if self._error is not None:
            raise self._error
        try:
            offset, content = next(self._pieces)
        except StopIteration:
            return False
        except DamagedError as error:
            self._error = error
            raise
        self._places.append((self._position + len(self._buffer), offset))
        self._buffer += content
        return True


def _find(handle: Any, start: int, what: bytes) -> Iterator[int]:
    """Yields every place of `what` in a file from `start` on."""
    overlap = b""
    while True:
        handle.seek(start)
        chunk = handle.read(_CHUNK_BYTES)
        if not chunk:
            return
        content, first = overlap + chunk, start - len(overlap)
        place = content.find(what)
        while place >= 0:
            yield first + place
            place = content.find(what, place + 1)
        start, overlap = start + len(chunk), content[-(len(what) - 1) :]


def _dictionary(handle: Any) -> bytes:
    """The dictionary in the first frame of a zstandard file, compressed itself or not; empty if there is none."""
    head = handle.read(8)
    size = int.from_bytes(head[4:], "little")
    if head[:4] != _DICTIONARY_FRAME or size > _DICTIONARY_BYTES:
        return b""
    content = handle.read(size)
    if not content.startswith(_STARTS["zst"]):
        return content
    try:
        return zstandard.ZstdDecompressor().decompress(content, max_output_size=_DICTIONARY_BYTES)
    except zstandard.ZstdError:
        return b""
