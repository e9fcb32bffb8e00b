"""Words and word n-grams as 64-bit hashes, the same in every process and on every machine."""

import functools
import hashlib
from collections.abc import Sequence

import numpy as np

# Odd, so that multiplication loses nothing; the fraction of the golden ratio (Knuth, TAOCP 3, 6.4).
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def word_hashes(words: list[str]) -> np.ndarray:
    """uint64 hash of each word."""
    return np.fromiter(map(_hash, words), np.uint64, len(words))


@functools.lru_cache(maxsize=1 << 18)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def ngram_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """uint64 hash of every n words in a row; of all words where there are fewer."""
    n = min(n, len(hashes))
    count = len(hashes) - n + 1
    return combine([hashes[i : i + count] for i in range(n)]) if n else hashes


def combine(columns: Sequence[np.ndarray]) -> np.ndarray:
    """uint64 hash of each row of equally long uint64 columns; their order matters."""
    combined = columns[0]
    for column in columns[1:]:
        combined = combined * _MULTIPLIER + column
    return combined
