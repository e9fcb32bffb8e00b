"""Words and word n-grams of texts as hashes, straight from the UTF-8 bytes in an Arrow array.

A word is a run of letters, digits, underscores and bytes beyond ASCII, or a run of ASCII punctuation, in lower case
(of ASCII letters). In Chinese, Japanese and Korean a word is a character. Bytes 65 and later of a word do not count.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa

# Part of every model's file: changes with whatever changes a hash.
FEATURE_VERSION = 1

# What numpy works on at one time: in the cache of a core this is twice as fast as 8 MB.
_PIECE_BYTES = 256 << 10
_MAX_WORD_BYTES = 64

_SPACE, _WORD, _PUNCTUATION, _CHARACTER = range(4)
_LOWER = bytes(range(256)).lower()
# Odd, so that multiplication loses nothing; the fraction of the golden ratio (Knuth, TAOCP 3, 6.4).
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_KEPT_BITS = np.array([(1 << 8 * length) - 1 for length in range(9)], np.uint64)


def _kind(byte: int) -> int:
    if 0xE3 <= byte <= 0xED:  # first byte of U+3000 to U+DFFF: Chinese, Japanese, Korean
        return _CHARACTER
    if byte >= 0x80 or chr(byte).isalnum() or byte == ord("_"):
        return _WORD
    return _PUNCTUATION if chr(byte).isprintable() and byte != ord(" ") else _SPACE


_KINDS = bytes(map(_kind, range(256)))


class Words(NamedTuple):
    """Words of some documents, one document after the other.

    Attributes:
      hashes: uint64 of every word.
      bounds: document d has the words [bounds[d], bounds[d + 1]); int64, documents + 1.
    """

    hashes: np.ndarray
    bounds: np.ndarray


class Grams(NamedTuple):
    """Hashed n-grams of some documents.

    Attributes:
      buckets: int32 (n, words): row n - 1 has the bucket of the n words from each word on, or the number of buckets
        itself where a document has fewer than n words left.
      bounds: as of `Words`.
    """

    buckets: np.ndarray
    bounds: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """How many n-grams, of all orders, each document has."""
        num_words = np.diff(self.bounds)
        return np.sum([(num_words - order).clip(min=0) for order in range(len(self.buckets))], axis=0)


def read_words(texts: pa.Array) -> Iterator[Words]:
    """Yields the words of neighbouring documents, all documents in order; what is yielded has at least one document."""
    offsets, content = _bytes_of(texts)
    first = 0
    while first < len(texts):
        last = int(np.searchsorted(offsets, offsets[first] + _PIECE_BYTES, side="right")) - 1
        last = max(first + 1, last)
        yield _words(content[offsets[first] : offsets[last]], offsets[first : last + 1] - offsets[first])
        first = last


def grams(words: Words, *, ngram: int, bits: int) -> Grams:
    """Hashes the n-grams of 1 to `ngram` words to 2 ** bits buckets. None crosses the end of a document."""
    hashes, bounds = words
    shift = np.uint64(64 - bits)
    buckets = np.full((ngram, len(hashes)), 1 << bits, np.int32)
    combined = hashes
    for order in range(min(ngram, len(hashes))):
        if order:
            combined = combined[:-1] * _MULTIPLIER + hashes[order:]
            # The last `order` words of every document begin no n-gram of this length.
        buckets[order, : len(combined)] = (combined * _MULTIPLIER) >> shift
        for back in range(1, order + 1):
            ends = bounds[1:] - back
            buckets[order, ends[ends >= bounds[:-1]]] = 1 << bits
    return Grams(buckets, bounds)


def sum_by_document(values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Sums values, one a word, over the words of each document; 0 where there are none."""
    sums = np.zeros(len(bounds) - 1, values.dtype)
    some = np.flatnonzero(np.diff(bounds))
    if len(some):
        sums[some] = np.add.reduceat(values, bounds[some])
    return sums


def _bytes_of(texts: pa.Array) -> tuple[np.ndarray, memoryview]:
    """Where each text begins, and last where they end, in the bytes of all."""
    if not pa.types.is_string(texts.type):
        raise ValueError(f"texts must be an Arrow array of strings, got {texts.type}")
    _, offsets, content = texts.buffers()
    if len(texts) == 0 or content is None:
        return np.zeros(len(texts) + 1, np.int64), memoryview(b"")
    begun = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    return begun.astype(np.int64), memoryview(content)


def _words(content: memoryview, offsets: np.ndarray) -> Words:
    raw = bytes(content)
    if not raw:
        return Words(np.zeros(0, np.uint64), np.zeros(len(offsets), np.int64))
    kinds = np.frombuffer(raw.translate(_KINDS), np.uint8)
    begins = np.empty(len(raw), bool)
    begins[0] = True
    np.not_equal(kinds[1:], kinds[:-1], out=begins[1:])
    if kinds.max() == _CHARACTER:  # the bytes that follow the first one of a character are part of it
        begins[1:] &= kinds[:-1] != _CHARACTER
    begins[offsets[offsets < len(raw)]] = True
    starts = np.flatnonzero(begins)
    lengths = np.diff(starts, append=len(raw))
    words = np.flatnonzero(kinds[starts])
    starts = starts[words]
    hashes = _hash(raw.translate(_LOWER), starts, lengths[words])
    return Words(hashes, np.searchsorted(starts, offsets))


def _hash(content: bytes, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """uint64 hash of each piece of `content`, eight bytes at a time."""
    eights = np.ndarray((len(content),), "<u8", content + bytes(8), strides=(1,))  # the 8 bytes from each byte on
    hashes = eights[starts] & _KEPT_BITS[np.minimum(lengths, 8)]
    hashes = _mixed(hashes ^ hashes >> np.uint64(29))
    longer = np.flatnonzero(lengths > 8)
    for begun in range(8, _MAX_WORD_BYTES, 8):
        left = lengths[longer] - begun
        piece = eights[starts[longer] + begun] & _KEPT_BITS[np.minimum(left, 8)]
        hashes[longer] = _mixed(hashes[longer] + piece)
        longer = longer[left > 8]
    return hashes


def _mixed(hashes: np.ndarray) -> np.ndarray:
    hashes = hashes * _MULTIPLIER
    return hashes ^ hashes >> np.uint64(32)
