"""Data in a text that is not for reading: base64, hexadecimal bytes, escapes (StarCoder2, arXiv:2402.19173)."""

import re
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from data_pipelines.stages.ranges import share
from data_pipelines.stages.texts import Texts

_BASE64_CHARS = 64
_BASE64 = bytes(255 * (chr(byte).isascii() and (chr(byte).isalnum() or chr(byte) in "+/=\n")) for byte in range(256))
_HEX = re.compile(rb"(?:\b(?:0x|\\x)?[0-9a-fA-F]{2}(?:,|\b\s*)){8,}")
_HEX_CHARS = 16
_HEX_BYTES = bytes(255 * (chr(byte) in "0123456789abcdefABCDEFx\\, \t\n\r\x0b\x0c") for byte in range(256))
_UNICODE = re.compile(rb"(?:\\u[0-9a-fA-F]{4}){8,}")


def measure(texts: Texts) -> dict[str, pa.Array]:
    """Characters in the longest such part of each document, and the share of all such parts."""
    found = [*_rows(texts, _BASE64, _BASE64_CHARS), *_hexadecimal(texts), *_escapes(texts)]
    spans = np.array(found, np.int64).reshape(-1, 2)
    document = np.searchsorted(texts.starts, spans[:, 0], side="right") - 1
    sizes = spans[:, 1] - spans[:, 0]
    longest = np.zeros(len(texts), np.int64)
    np.maximum.at(longest, document, sizes)
    total = np.bincount(document, sizes, len(texts))
    return {
        "encoded_chars": pa.array(longest),
        "encoded_share": pa.array(np.minimum(1.0, share(total, texts.num_chars))),
    }


def _hexadecimal(texts: Texts) -> Iterator[tuple[int, int]]:
    for start, end in _rows(texts, _HEX_BYTES, _HEX_CHARS):
        # One more byte tells whether the last one ends a word; it may not be the line feed after a document.
        end += texts.raw[end] != ord("\n")
        yield from (found.span() for found in _HEX.finditer(texts.raw, start, end))


def _escapes(texts: Texts) -> Iterator[tuple[int, int]]:
    start = texts.raw.find(b"\\u")
    while start >= 0:
        found = _UNICODE.match(texts.raw, start)
        if found:
            yield found.span()
        start = texts.raw.find(b"\\u", found.end() if found else start + 1)


def _rows(texts: Texts, table: bytes, size: int) -> Iterator[tuple[int, int]]:
    """Starts and ends of at least `size` bytes in a row of one document that `table` maps to something."""
    flags = np.frombuffer(texts.raw.translate(table), bool)
    full = flags.copy()
    full[0] = False
    full[texts.ends] = False  # the line feeds between documents
    row, length = full, 1
    while length < size:
        row, length = row[:-length] & row[length:], 2 * length
    edges = np.flatnonzero(row[1:] != row[:-1]) + 1
    return zip(edges[0::2].tolist(), (edges[1::2] + size - 1).tolist(), strict=True)
