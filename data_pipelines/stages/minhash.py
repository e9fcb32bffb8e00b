"""MinHash signatures (Broder 1997) of sets of word n-grams, and the hashes of their bands.

Permutation k maps a 32-bit hash x of an n-gram to x * a_k mod 2**32 with a_k odd: multiply-shift without the shift
(Dietzfelbinger et al. 1997), on hashes that are well mixed already.
"""

import functools

import numpy as np
import pyarrow as pa

from data_pipelines.stages import hashed_words
from data_pipelines.stages.texts import Texts
from slmjax.config import NearDedupConfig

# N-grams and permutations at a time, so that their products stay in a processor's cache.
_BLOCK, _PERMUTATIONS = 16384, 7


def measure(config: NearDedupConfig, texts: Texts) -> dict[str, pa.Array]:
    """Number of n-grams of each document, and a 64-bit hash of each band of its signature (0 where it has no words)."""
    grams, counts = ngrams(config, hashed_words.of(texts))
    signatures = sign(np.ascontiguousarray(grams.view(np.uint32)[1::2]), counts, _multipliers(config))
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
    in_limit = split.starts - np.repeat(split.texts.starts, split.counts) < config.signature_bytes
    if not in_limit.all():
        split = split.select(in_limit)
    hashes = hashed_words.runs(split.hashes, config.ngram)[hashed_words.run_starts(split.first, config.ngram)]
    counts = np.maximum(split.counts - config.ngram + 1, 0)
    for length in range(1, min(config.ngram, int(split.counts.max(initial=0)) + 1)):
        (short,) = np.nonzero(split.counts == length)
        if len(short):
            columns = [split.hashes[split.first[short] + i] for i in range(length)]
            together = hashed_words.runs(np.stack(columns, axis=1).reshape(-1), length)[::length]
            hashes = np.insert(hashes, np.concatenate([[0], np.cumsum(counts)])[short], together)
            counts[short] = 1
    return hashes, counts


def sign(hashes: np.ndarray, counts: np.ndarray, multipliers: np.ndarray) -> np.ndarray:
    """Least permuted hash of each document under each permutation, uint32[documents, permutations].

    Args:
      hashes: uint32, of all documents in order.
      counts: of each document; one without hashes has 2**32 - 1 everywhere.
      multipliers: uint32, odd.
    """
    signatures = np.full((len(counts), len(multipliers)), np.uint32(0xFFFFFFFF))
    filled = np.flatnonzero(counts)
    if len(filled) == 0:
        return signatures
    first = (np.cumsum(counts) - counts)[filled]
    pieces = np.union1d(first, np.arange(0, len(hashes), _BLOCK))  # of one document and one block
    least = np.empty((len(multipliers), len(pieces)), np.uint32)
    products = np.empty((_PERMUTATIONS, _BLOCK), np.uint32)
    for begin in range(0, len(hashes), _BLOCK):
        block = hashes[begin : begin + _BLOCK]
        low, high = np.searchsorted(pieces, [begin, begin + len(block)])
        for k in range(0, len(multipliers), _PERMUTATIONS):
            some = multipliers[k : k + _PERMUTATIONS, None]
            out = products[: len(some), : len(block)]
            np.multiply(some, block[None, :], out=out)
            least[k : k + len(some), low:high] = np.minimum.reduceat(out, pieces[low:high] - begin, axis=1)
    signatures[filled] = np.minimum.reduceat(least, np.searchsorted(pieces, first), axis=1).T
    return signatures


@functools.lru_cache(maxsize=8)
def _multipliers_of(number: int, seed: int) -> np.ndarray:
    rng = np.random.Generator(np.random.PCG64(seed))
    return rng.integers(0, 1 << 32, number, dtype=np.uint32) | np.uint32(1)


def _multipliers(config: NearDedupConfig) -> np.ndarray:
    return _multipliers_of(config.bands * config.rows, config.seed)
