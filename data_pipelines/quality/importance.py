"""Importance weights for resampling, DSIR (Xie et al. 2023, arXiv:2302.03169): what makes raw text like a target."""

from collections.abc import Iterable

import numpy as np

from data_pipelines.quality.features import Words, grams
from data_pipelines.quality.linear import LinearModel
from slmjax.config import TrainImportanceConfig


def count_buckets(pieces: Iterable[Words], *, ngram: int, bits: int) -> np.ndarray:
    """How often every bucket occurs, float64; in memory that does not grow with the texts."""
    counts = np.zeros((1 << bits) + 1, np.int64)
    for words in pieces:
        counts += np.bincount(grams(words, ngram=ngram, bits=bits).buckets.ravel(), minlength=len(counts))
    return counts[:-1].astype(np.float64)


def divergence(p_counts: np.ndarray, q_counts: np.ndarray) -> float:
    """KL(p || q) in nats of two distributions of n-grams, each with one added to every count."""
    p, q = _smoothed(p_counts), _smoothed(q_counts)
    return float((p * np.log(p / q)).sum())


def importance_model(target: np.ndarray, raw: np.ndarray, config: TrainImportanceConfig) -> LinearModel:
    """The model whose score is log p_target(document) - log p_raw(document), by the counts of both."""
    weights = np.log(_smoothed(target)) - np.log(_smoothed(raw))
    return LinearModel(
        ngram=config.ngram,
        bits=config.bits,
        bias=0.0,
        per=config.per,
        link="identity",
        weights=weights.astype(np.float32),
    )


def _smoothed(counts: np.ndarray) -> np.ndarray:
    return (counts + 1.0) / (counts.sum() + len(counts))
