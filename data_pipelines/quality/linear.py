"""Scores that are linear in the mean (or sum) of a document's hashed n-grams, and how they are learned."""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa

from data_pipelines.quality.features import Grams, Words, grams, read_words, sum_by_document
from data_pipelines.quality.metrics import sigmoid

# From scores and targets of some examples (E, documents of an example) to the derivative of the loss by each score.
Gradient = Callable[[np.ndarray, np.ndarray], np.ndarray]

_BATCH_EXAMPLES = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearModel:
    """weights . counts + bias.

    Attributes:
      weights: float32, one for each bucket.
      per: "ngram" divides a document's counts by their sum.
      link: "logit" makes a probability of the score.
    """

    kind: ClassVar[str] = "linear"

    ngram: int
    bits: int
    bias: float
    per: Literal["ngram", "document"]
    link: Literal["identity", "logit"]
    weights: np.ndarray

    def score(self, texts: pa.Array) -> np.ndarray:
        """float64 score of every text, each from nothing but its own words; the bias where it has none."""
        return np.concatenate([np.zeros(0), *map(self.score_words, read_words(texts))])

    def score_words(self, words: Words) -> np.ndarray:
        """Scores of documents of which the words are known."""
        scores = _sums(self._padded, grams(words, ngram=self.ngram, bits=self.bits), self.per) + self.bias
        return sigmoid(scores) if self.link == "logit" else scores

    @functools.cached_property
    def _padded(self) -> np.ndarray:
        return np.append(self.weights.astype(np.float64), 0.0)


def raw_scores(weights: np.ndarray, bias: float, features: Grams) -> np.ndarray:
    """Scores, before any link, of documents whose n-grams are counted already."""
    return _sums(np.append(weights, 0.0), features, "ngram") + bias


def logistic(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Gradient of the log loss of one document's probability."""
    return sigmoid(scores) - targets[:, None]


def squared(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Gradient of half the squared error of one document's score."""
    return scores - targets[:, None]


def bradley_terry(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Gradient of the log loss of P(first is better than second) = sigmoid(difference of the scores)."""
    error = sigmoid(scores[:, 0] - scores[:, 1]) - targets
    return np.stack([error, -error], axis=1)


def fit(
    features: Grams,
    examples: np.ndarray,
    targets: np.ndarray,
    gradient: Gradient,
    *,
    bits: int,
    epochs: int,
    learning_rate: float,
    seed: int,
) -> tuple[np.ndarray, float]:
    """Learns weights and a bias with AdaGrad (Duchi et al. 2011), whose steps do not depend on how rare a bucket is.

    Args:
      features: n-grams of all documents.
      examples: documents of every example, int64 (examples, 1) or, of pairs, (examples, 2).
      targets: one number for every example.
      gradient: of the loss.
      bits: of the hash.
      epochs: passes over the examples, each in another order.
      learning_rate: of AdaGrad.
      seed: of the order.
    """
    weights, squares = np.zeros((1 << bits) + 1), np.full((1 << bits) + 1, 1e-12)
    bias = bias_squares = 0.0
    for epoch in range(epochs):
        # A bit generator's raw stream is the part of numpy's random numbers that never changes between versions.
        order = np.argsort(np.random.PCG64([seed, epoch]).random_raw(len(examples)), kind="stable")
        for start in range(0, len(order), _BATCH_EXAMPLES):
            rows = order[start : start + _BATCH_EXAMPLES]
            part = _documents(features, examples[rows].ravel())
            scores = _sums(weights, part, "ngram") + bias
            slopes = gradient(scores.reshape(len(rows), -1), targets[rows]).ravel() / len(rows)
            shares = np.repeat(slopes / part.counts.clip(min=1), np.diff(part.bounds))
            slope_of_weights = np.bincount(
                part.buckets.ravel(), np.tile(shares, len(part.buckets)), minlength=len(weights)
            )
            slope_of_weights[-1] = 0.0  # where a document has no further n-gram
            squares += slope_of_weights**2
            weights -= learning_rate * slope_of_weights / np.sqrt(squares)
            bias_squares += slopes.sum() ** 2
            bias -= learning_rate * slopes.sum() / max(bias_squares**0.5, 1e-6)
    return weights[:-1], float(bias)


def calibrate(columns: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Coefficients of a logistic regression of `targets` on a few columns (Platt 1999), by Newton's method.

    Targets are drawn towards a half by half an example of each side, so that separable ones have an answer, too.
    """
    targets = (targets * len(targets) + 0.5) / (len(targets) + 1)
    coefficients = np.zeros(columns.shape[1])
    for _ in range(100):
        predicted = sigmoid(columns @ coefficients)
        slope = columns.T @ (predicted - targets)
        curvature = (columns * (predicted * (1 - predicted))[:, None]).T @ columns
        step = np.linalg.solve(curvature + 1e-9 * np.eye(len(slope)), slope)
        coefficients -= step * min(1.0, 1.0 / np.abs(step).max(initial=1e-12))
        if np.abs(step).max() < 1e-9:
            break
    return coefficients


def _sums(padded: np.ndarray, features: Grams, per: Literal["ngram", "document"]) -> np.ndarray:
    sums = sum_by_document(padded[features.buckets].sum(axis=0), features.bounds)
    return sums / features.counts.clip(min=1) if per == "ngram" else sums


def _documents(features: Grams, documents: np.ndarray) -> Grams:
    """The n-grams of some documents, in their order."""
    sizes = np.diff(features.bounds)[documents]
    bounds = np.append(0, np.cumsum(sizes))
    words = np.arange(bounds[-1]) + np.repeat(features.bounds[documents] - bounds[:-1], sizes)
    return Grams(features.buckets[:, words], bounds)
