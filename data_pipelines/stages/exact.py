"""Exact duplicates, by a 128-bit hash of the text without letter case and white space."""

import hashlib
import string

import numpy as np
import pyarrow as pa

from data_pipelines.stages.texts import Texts

_WHITE_SPACE = string.whitespace.encode()
_SMALL = bytes(range(256)).lower()
# What else str.isspace knows.
_OTHER_SPACES = (
    "\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029"
    "\u202f\u205f\u3000"
)


def measure(texts: Texts) -> dict[str, pa.Array]:
    """The hash of each document."""
    digests = b"".join(map(_digest, texts.strings))
    return {"digest": pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(texts), [None, pa.py_buffer(digests)])}


def halves(digests: pa.Array) -> np.ndarray:
    """Digests as two uint64 each."""
    both = np.frombuffer(digests.buffers()[1], "<u8").reshape(-1, 2)
    return both[digests.offset : digests.offset + len(digests)]


def _digest(text: str) -> bytes:
    if not text.isascii():
        text = text.lower()
    for space in _OTHER_SPACES:
        if space in text:
            text = text.replace(space, "")
    plain = text.encode().translate(_SMALL, _WHITE_SPACE)
    return hashlib.blake2b(plain, digest_size=16).digest()
