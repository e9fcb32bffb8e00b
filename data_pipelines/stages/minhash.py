"""MinHash signatures (Broder 1997) of sets of word n-grams, and the hashes of their bands.

Permutation k maps a 32-bit hash x of an n-gram to x * a_k mod 2**32 with a_k odd: multiply-shift without the shift
(Dietzfelbinger et al. 1997), on hashes that are well mixed already.
"""

import functools

import numpy as np
import pyarrow as pa

from data_pipelines.stages import hashed_words
from data_pipelines.stages.compiled import compiled
from data_pipelines.stages.texts import Texts
from slmjax.config import NearDedupConfig

_HALF = np.uint64(32)


def measure(config: NearDedupConfig, texts: Texts) -> dict[str, pa.Array]:
    """Number of n-grams of each document, and a 64-bit hash of each band of its signature (0 where it has no words)."""
    grams, counts = ngrams(config, hashed_words.of(texts))
    signatures = sign((grams >> _HALF).astype(np.uint32), counts, _multipliers(config))
    bands = signatures.reshape(len(texts), config.bands, config.rows).astype(np.uint64)
    hashes = np.arange(1, config.bands + 1, dtype=np.uint64) + np.zeros((len(texts), 1), np.uint64)
    for row in range(config.rows):
        hashes = hashes * hashed_words.MULTIPLIER + bands[:, :, row]
    hashes = hashed_words.mix(hashes)
    hashes[counts == 0] = 0
    return {
        "ngrams": pa.array(counts, pa.int64()),
        "bands": pa.FixedSizeListArray.from_arrays(pa.array(hashes.reshape(-1), pa.uint64()), config.bands),
    }


def ngrams(config: NearDedupConfig, split: hashed_words.Words) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the n-grams of all documents, and how many each has: of fewer words than n, all together are one."""
    limits = np.searchsorted(split.starts, split.texts.starts + config.signature_bytes)
    return hashed_words.runs_within(split.hashes, split.first[:-1], np.minimum(split.first[1:], limits), config.ngram)


@compiled
def sign(hashes: np.ndarray, counts: np.ndarray, multipliers: np.ndarray) -> np.ndarray:
    """Least permuted hash of each document under each permutation, uint32[documents, permutations].

    Args:
      hashes: uint32, of all documents in order.
      counts: of each document; one without hashes has 2**32 - 1 everywhere.
      multipliers: uint32, odd.
    """
    signatures, end = np.empty((len(counts), len(multipliers)), np.uint32), 0
    for document, count in enumerate(counts):
        start, end = end, end + count
        some = hashes[start:end]
        for k, multiplier in enumerate(multipliers):
            least = np.uint32(0xFFFFFFFF)
            for i in range(len(some)):
                least = min(least, np.uint32(some[i] * multiplier))
            signatures[document, k] = least
    return signatures


@functools.lru_cache(maxsize=8)
def _multipliers_of(number: int, seed: int) -> np.ndarray:
    rng = np.random.Generator(np.random.PCG64(seed))
    return rng.integers(0, 1 << 32, number, dtype=np.uint32) | np.uint32(1)


def _multipliers(config: NearDedupConfig) -> np.ndarray:
    return _multipliers_of(config.bands * config.rows, config.seed)
