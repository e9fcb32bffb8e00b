"""How well scores do on texts that a model was not trained on."""

from typing import Any

import numpy as np

_BINS = 10


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def area_under_curve(scores: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive scores higher than a negative, ties counting half: the area under the ROC curve.

    Raises:
      ValueError: there are only positives, or only negatives.
    """
    num_positive = int(positive.sum())
    pairs = num_positive * (len(positive) - num_positive)
    if pairs == 0:
        raise ValueError(f"{num_positive} of {len(positive)} held-out texts are positive; both kinds are needed")
    above = _ranks(scores)[positive].sum() - num_positive * (num_positive + 1) / 2
    return float(above / pairs)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's correlation; 0 where all of either are equal."""
    a, b = (ranks - ranks.mean() for ranks in (_ranks(a), _ranks(b)))
    scale = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / scale) if scale > 0 else 0.0


def reliability(predicted: np.ndarray, observed: np.ndarray) -> list[dict[str, Any]]:
    """Mean prediction and mean observation in bins of equally many examples, from low predictions to high."""
    parts = np.array_split(np.argsort(predicted, kind="stable"), _BINS)
    return [
        {"count": len(part), "predicted": float(predicted[part].mean()), "observed": float(observed[part].mean())}
        for part in parts
        if len(part)
    ]


def calibration_error(predicted: np.ndarray, observed: np.ndarray) -> float:
    """Mean difference between prediction and observation over the bins of `reliability`."""
    bins = reliability(predicted, observed)
    return sum(each["count"] * abs(each["predicted"] - each["observed"]) for each in bins) / len(predicted)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing their mean."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]
