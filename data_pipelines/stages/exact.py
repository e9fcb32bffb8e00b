"""Exact duplicates, by a 128-bit hash of the text without letter case and white space."""

import functools
import hashlib
import itertools
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipelines.stages import alphabet
from data_pipelines.stages.compiled import compiled
from data_pipelines.stages.texts import Texts

_DROPPED, _CAPITAL = -1, -2


def measure(texts: Texts) -> dict[str, pa.Array]:
    """The hash of each document."""
    parts, capitals = _parts(texts)
    if len(capitals):
        lower = pc.call_function("utf8_lower", [texts.array.take(pa.array(capitals))])
        for document, part in zip(capitals.tolist(), _parts(Texts.from_array(lower))[0], strict=True):
            parts[document] = part
    return {"digest": digests(parts)}


def questions(batch: pa.RecordBatch) -> pa.Array:
    """The hash of all turns of the user of each conversation."""
    if "messages" not in batch.schema.names:
        raise ValueError("by = 'question' needs conversations, here and in `against`; these documents have no messages")
    lists = batch.column("messages").to_pylist()
    asked = ["\n".join(turn["content"] for turn in turns if turn["role"] == "user") for turns in lists]
    return measure(Texts.of(asked))["digest"]


def digests(contents: Iterable[bytes | memoryview]) -> pa.Array:
    """The first half of SHA-256 of each."""
    halves = [hashlib.sha256(content).digest()[:16] for content in contents]
    return pa.array(halves, pa.binary(16))


def halves(digests: pa.Array) -> np.ndarray:
    """Digests as two uint64 each."""
    both = np.frombuffer(digests.buffers()[1], "<u8").reshape(-1, 2)
    return both[digests.offset : digests.offset + len(digests)]


def _parts(texts: Texts) -> tuple[list[memoryview], np.ndarray]:
    """The bytes of each document without white space and capitals, and which have capitals beyond ASCII left."""
    squeezed, edges, capitals = _squeeze(texts.data, texts.starts, texts.ends, _characters())
    return [squeezed.data[start:end] for start, end in itertools.pairwise(edges.tolist())], np.flatnonzero(capitals)


@compiled
def _squeeze(
    data: np.ndarray, starts: np.ndarray, ends: np.ndarray, characters: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    squeezed, edges = np.empty(len(data), np.uint8), np.zeros(len(starts) + 1, np.int64)
    capitals, number, unknown = np.zeros(len(starts), np.bool_), np.uint64(0), len(characters) - 1
    for document in range(len(starts)):
        some, kept = data[starts[document] : ends[document]], True
        for i in range(len(some)):
            byte = some[i]
            squeezed[number] = byte
            if byte < 0x80:
                squeezed[number] = characters[byte]
                kept = characters[byte] != _DROPPED
            elif byte >= 0xC0:
                size = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2
                point = np.int64(byte) & (0x7F >> size)
                for k in range(1, size):
                    point = point << 6 | np.int64(some[i + k]) & 0x3F
                character = characters[min(point, unknown)]
                kept = character != _DROPPED
                capitals[document] |= character == _CAPITAL
            number += np.uint64(kept)
        edges[document + 1] = number
    return squeezed, edges, capitals


@functools.cache
def _characters() -> np.ndarray:
    """Of every code point whether it is white space or a capital; of the others of ASCII what they become."""
    kinds = alphabet.KINDS.all
    points = [point for point in range(len(kinds) - 1) if not 0xD800 <= point < 0xE000]
    characters = pa.array(list(map(chr, points)), pa.string())
    changes = pc.call_function("not_equal", [pc.call_function("utf8_lower", [characters]), characters])
    found = np.zeros(len(kinds), np.int16)
    found[points] = np.where(changes.to_numpy(zero_copy_only=False), _CAPITAL, 0)
    found[:0x80] = np.frombuffer(bytes(range(0x80)).lower(), np.uint8)
    found[(kinds & alphabet.SPACE) != 0] = _DROPPED
    return found
