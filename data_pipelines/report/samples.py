"""Which documents a report shows: those with the least hashes of their ids, so the same ones whatever the shards."""

import hashlib
import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from data_pipelines.stages import hashed_words

# Of each kind.
_SHOWN = {"dropped": 3, "changed": 2, "kept": 1}


class Kind(NamedTuple):
    """Of samples.

    Attributes:
      fate: "dropped" by the stage's rule, "changed" by it and kept, or "kept".
      stage: its name.
      rule: "" but for what is dropped.
    """

    fate: str
    stage: str
    rule: str = ""


class Sample(NamedTuple):
    """A document: those with the least hashes are shown. `part` is the number of its shard."""

    hash: int
    part: int
    row: int


def choose(kind: Kind, part: int, rows: np.ndarray, hashes: np.ndarray) -> list[Sample]:
    """The samples among some rows of a shard; `hashes` are those of the ids of the shard's documents."""
    mixed = hashed_words.mix(hashes[rows] ^ _salt(kind))
    first = np.argsort(mixed, kind="stable")[: _SHOWN[kind.fate]]
    return [
        Sample(*each) for each in zip(mixed[first].tolist(), itertools.repeat(part), rows[first].tolist(), strict=False)
    ]


def merge(kind: Kind, samples: Iterable[Sample]) -> list[Sample]:
    """The samples among those of several shards."""
    return sorted(samples)[: _SHOWN[kind.fate]]


def _salt(kind: Kind) -> np.uint64:
    """Another for each kind: not every stage shows the same documents."""
    digest = hashlib.blake2b("\0".join(kind).encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))
