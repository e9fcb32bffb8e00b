"""Decompressed bytes of a file, in pieces of bounded size, and where in the file they come from."""

import zlib
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import zstandard

from data_pipelines.readers.items import DamagedError

Compression = Literal["gz", "zst"]

# So much is given to a decompressor at a time, and so much more can come out of it: 1,032 times of gzip, of zstandard
# 256 blocks of 128 KiB.
_FEED_BYTES = {"gz": 16 << 10, "zst": 1 << 10}


def pieces(
    chunks: Iterable[bytes], compression: Compression | None, *, start: int = 0, dictionary: bytes = b""
) -> Iterator[tuple[int, bytes]]:
    """Yields content, each piece with where in the file it begins or, compressed, where its stream begins.

    A file may be several streams one after another, as parallel compressors and web archives have them.

    Args:
      chunks: of the file, from the byte `start` on.
      compression: of the file.
      start: the place of the first chunk.
      dictionary: of a zstandard file.

    Raises:
      DamagedError: a stream is broken or ends early.
    """
    position = begins = start
    if compression is None:
        for chunk in chunks:
            yield position, chunk
            position += len(chunk)
        return
    decompressor, inside, feed = _decompressor(compression, dictionary), False, _FEED_BYTES[compression]
    for chunk in chunks:
        for first in range(0, len(chunk), feed):
            part = chunk[first : first + feed]
            position += len(part)
            while part:
                try:
                    content = decompressor.decompress(part)
                except (zlib.error, zstandard.ZstdError) as error:
                    raise DamagedError("damaged_compression", str(error), begins) from error
                if content:
                    yield begins, content
                part, inside = (decompressor.unused_data, False) if decompressor.eof else (b"", True)
                if not inside:
                    decompressor, begins = _decompressor(compression, dictionary), position - len(part)
    if inside:
        raise DamagedError("truncated_compression", f"the .{compression} stream ends early", begins)


def _decompressor(compression: Compression, dictionary: bytes) -> Any:
    if compression == "gz":
        return zlib.decompressobj(wbits=31)
    content = zstandard.ZstdCompressionDict(dictionary) if dictionary else None
    return zstandard.ZstdDecompressor(dict_data=content).decompressobj()
