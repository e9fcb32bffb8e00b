"""Exact duplicates, by a 128-bit hash of the text without letter case and white space."""

import functools
import hashlib
import string
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipelines.stages import alphabet
from data_pipelines.stages.texts import Texts

# What str.isspace knows among ASCII.
_WHITE_SPACE = string.whitespace.encode() + b"\x1c\x1d\x1e\x1f"
_SMALL = bytes(range(256)).lower()


def measure(texts: Texts) -> dict[str, pa.Array]:
    """The hash of each document."""
    edges = zip(texts.starts.tolist(), texts.ends.tolist(), strict=True)
    parts = [texts.raw[start:end].translate(_SMALL, _WHITE_SPACE) for start, end in edges]
    capitals, spaces = _with(texts, _capitals()), _with(texts, _spaces())
    if len(capitals):
        lower = pc.call_function("utf8_lower", [texts.array.take(pa.array(capitals))])
        for document, text in zip(capitals.tolist(), lower.to_pylist(), strict=True):
            parts[document] = text.encode().translate(_SMALL, _WHITE_SPACE)
    for document in spaces.tolist():
        parts[document] = "".join(parts[document].decode().split()).encode()
    return {"digest": digests(parts)}


def questions(batch: pa.RecordBatch) -> pa.Array:
    """The hash of all turns of the user of each conversation."""
    if "messages" not in batch.schema.names:
        raise ValueError("by = 'question' needs conversations, here and in `against`; these documents have no messages")
    lists = batch.column("messages").to_pylist()
    asked = ["\n".join(turn["content"] for turn in turns if turn["role"] == "user") for turns in lists]
    return measure(Texts.of(asked))["digest"]


def digests(contents: Iterable[bytes]) -> pa.Array:
    """The first half of SHA-256 of each."""
    halves = [hashlib.sha256(content).digest()[:16] for content in contents]
    return pa.array(halves, pa.binary(16))


def halves(digests: pa.Array) -> np.ndarray:
    """Digests as two uint64 each."""
    both = np.frombuffer(digests.buffers()[1], "<u8").reshape(-1, 2)
    return both[digests.offset : digests.offset + len(digests)]


def _with(texts: Texts, flags: np.ndarray) -> np.ndarray:
    """Which documents have characters beyond ASCII with a flag, of those of all code points."""
    if texts.beyond is None:
        return np.zeros(0, np.int64)
    positions = texts.beyond.positions[flags[np.minimum(texts.beyond.points, len(flags) - 1)]]
    return np.flatnonzero(np.bincount(texts.starts.searchsorted(positions, side="right") - 1, minlength=len(texts)))


@functools.cache
def _spaces() -> np.ndarray:
    """Whether each code point of the alphabet is white space."""
    return (alphabet.KINDS.all & alphabet.SPACE) != 0


@functools.cache
def _capitals() -> np.ndarray:
    """Whether each code point of the alphabet changes in lower case."""
    points = [point for point in range(0x80, len(alphabet.KINDS.all) - 1) if not 0xD800 <= point < 0xE000]
    characters = pa.array(map(chr, points), pa.string())
    changes = pc.call_function("not_equal", [pc.call_function("utf8_lower", [characters]), characters])
    flags = np.zeros(len(alphabet.KINDS.all), bool)
    flags[points] = changes.to_numpy(zero_copy_only=False)
    return flags
