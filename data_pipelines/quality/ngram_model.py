"""A language model of words in hashed counts: how likely a document's words are after the words before them."""

import dataclasses
import functools
from typing import ClassVar

import numpy as np
import pyarrow as pa

from data_pipelines.quality.features import Words, grams, read_words, sum_by_document


@dataclasses.dataclass(frozen=True, kw_only=True)
class NgramModel:
    """Orders 1 to `ngram`, interpolated by Witten & Bell 1991.

    p_n(w | c) = (count(c w) + types(c) p_{n-1}(w | c')) / (count(c) + types(c)), where types(c) is how many kinds of
    words follow c, c' is c without its first word and p_0 = 1 / 2 ** bits. Buckets are shared by the n-grams that hash
    to them, so that probabilities of the words after a context do not quite add up to one.

    Attributes:
      counts: uint32 (ngram, buckets), of the n-grams of each order.
      types: uint32 (ngram - 1, buckets), of the kinds of words after contexts of 1 to ngram - 1 words.
    """

    kind: ClassVar[str] = "ngram"

    ngram: int
    bits: int
    counts: np.ndarray
    types: np.ndarray

    def score(self, texts: pa.Array) -> np.ndarray:
        """float64 mean of -log p(word) of every text, nats; that of p_0 where it has no words."""
        return np.concatenate([np.zeros(0), *map(self.score_words, read_words(texts))])

    def score_words(self, words: Words) -> np.ndarray:
        """Scores of documents of which the words are known."""
        buckets, bounds = grams(words, ngram=self.ngram, bits=self.bits)
        uniform = 1.0 / (1 << self.bits)
        total, kinds = self._totals
        likely = (self.counts[0][buckets[0]] + kinds * uniform) / (total + kinds)
        for order in range(1, min(self.ngram, len(words.hashes))):
            last = len(words.hashes) - order
            inside = buckets[order, :last] < 1 << self.bits  # of one document
            context, whole = (np.minimum(buckets[row, :last], (1 << self.bits) - 1) for row in (order - 1, order))
            seen = self.counts[order - 1].take(context).astype(np.float64)
            kinds_after = self.types[order - 1].take(context).astype(np.float64)
            # A context's count is at least that of what follows it, unless others share its bucket.
            count = np.minimum(self.counts[order].take(whole), seen)
            known = inside & (kinds_after > 0)
            mixed = (count + kinds_after * likely[order:]) / np.where(known, seen + kinds_after, 1.0)
            likely[order:] = np.where(known, mixed, likely[order:])
        num_words = np.diff(bounds)
        means = sum_by_document(-np.log(likely), bounds) / num_words.clip(min=1)
        return np.where(num_words > 0, means, -np.log(uniform))

    @functools.cached_property
    def _totals(self) -> tuple[int, int]:
        """Words, and kinds of words, that were counted."""
        return int(self.counts[0].sum(dtype=np.int64)), int(np.count_nonzero(self.counts[0]))


class NgramCounter:
    """Counts texts one piece after another, in memory that does not grow."""

    def __init__(self, *, ngram: int, bits: int):
        self._ngram, self._bits = ngram, bits
        self._counts = np.zeros((ngram, 1 << bits), np.uint32)
        self._types = np.zeros((ngram - 1, 1 << bits), np.uint32)

    def add(self, words: Words) -> None:
        """Counts the n-grams of some documents."""
        buckets = grams(words, ngram=self._ngram, bits=self._bits).buckets
        for order in range(min(self._ngram, len(words.hashes))):
            inside = buckets[order] < 1 << self._bits
            whole, first, times = np.unique(buckets[order][inside], return_index=True, return_counts=True)
            if order:
                new = self._counts[order][whole] == 0
                contexts = buckets[order - 1][inside][first[new]]
                np.add.at(self._types[order - 1], contexts, np.uint32(1))
            self._counts[order][whole] += times.astype(np.uint32)

    def model(self) -> NgramModel:
        """The model of everything counted so far."""
        return NgramModel(ngram=self._ngram, bits=self._bits, counts=self._counts, types=self._types)


def shuffled(words: Words, *, seed: int) -> Words:
    """The same documents with the words of each in a random order."""
    keys = np.random.PCG64(seed).random_raw(len(words.hashes))
    documents = np.repeat(np.arange(len(words.bounds) - 1), np.diff(words.bounds))
    return Words(words.hashes[np.lexsort((keys, documents))], words.bounds)
