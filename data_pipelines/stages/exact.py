"""Exact duplicates, by a 128-bit hash of the text without letter case and white space."""

import hashlib
import itertools
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
    lower = texts.array if texts.is_ascii else pc.call_function("utf8_lower", [texts.array])
    offsets = np.frombuffer(lower.buffers()[1], np.int32)[lower.offset : lower.offset + len(lower) + 1].tolist()
    content = memoryview(lower.buffers()[2] or b"")
    parts = [bytes(content[start:end]) for start, end in itertools.pairwise(offsets)]
    for document in _with_other_spaces(texts):
        parts[document] = "".join(parts[document].decode().split()).encode()
    return {"digest": digests(part.translate(_SMALL, _WHITE_SPACE) for part in parts)}


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


def _with_other_spaces(texts: Texts) -> list[int]:
    """Which documents have white space beyond ASCII."""
    if texts.beyond is None:
        return []
    known = len(alphabet.KINDS.all) - 1
    spaces = (alphabet.KINDS.all[np.minimum(texts.beyond.points, known)] & alphabet.SPACE) != 0
    return np.unique(np.searchsorted(texts.starts, texts.beyond.positions[spaces], side="right") - 1).tolist()
