"""Learns linear scores: from two kinds of text, from scored texts, from pairs of which one is better."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from data_pipelines.quality import linear, metrics
from data_pipelines.quality.examples import DataHash, FeatureTable, Reader
from data_pipelines.quality.linear import LinearModel
from slmjax.config import (
    QualityTrainingConfig,
    TrainClassifierConfig,
    TrainPreferenceConfig,
    TrainRegressionConfig,
)

_LinearConfig = TrainClassifierConfig | TrainRegressionConfig | TrainPreferenceConfig


class _Part(NamedTuple):
    """Some of the examples: scores (E, documents of an example) and targets (E,)."""

    scores: np.ndarray
    targets: np.ndarray


class _Fitted(NamedTuple):
    """What was learned from the training part, and the scores that it gives to all parts."""

    config: _LinearConfig
    weights: np.ndarray
    bias: float
    training: _Part
    calibration: _Part
    measured: _Part

    @property
    def sizes(self) -> dict[str, int]:
        return {
            f"{name}_examples": len(part.targets)
            for name, part in (
                ("training", self.training),
                ("calibration", self.calibration),
                ("measured", self.measured),
            )
        }

    def model(self, *, link: Literal["identity", "logit"], scale: float, shift: float) -> LinearModel:
        """The model whose score, before the link, is scale * (learned score) + shift."""
        return LinearModel(
            ngram=self.config.ngram,
            bits=self.config.bits,
            bias=float(scale * self.bias + shift),
            per="ngram",
            link=link,
            weights=(scale * self.weights).astype(np.float32),
        )


def train_classifier(
    config: QualityTrainingConfig, model: TrainClassifierConfig, reader: Reader, data: DataHash
) -> tuple[LinearModel, dict[str, Any]]:
    """Logistic regression, its probabilities calibrated on texts of their own; returns it and its held-out scores."""
    table = _table(config, model)
    examples, targets = [], []
    for label, sources in ((1.0, model.positive), (0.0, model.negative)):
        for text in reader.texts(sources):
            data.add(text, label)
            examples.append([table.add(text)])
            targets.append(label)
    fitted = _fit(config, model, table, examples, targets, linear.logistic)
    logits, truth = fitted.calibration
    scale, shift = linear.calibrate(np.column_stack([logits[:, 0], np.ones(len(logits))]), truth)
    logits, truth = fitted.measured
    predicted = metrics.sigmoid(scale * logits[:, 0] + shift)
    return fitted.model(link="logit", scale=scale, shift=shift), {
        **fitted.sizes,
        "area_under_curve": metrics.area_under_curve(predicted, truth == 1),
        "calibration_error": metrics.calibration_error(predicted, truth),
        "reliability": metrics.reliability(predicted, truth),
    }


def train_regression(
    config: QualityTrainingConfig, model: TrainRegressionConfig, reader: Reader, data: DataHash
) -> tuple[LinearModel, dict[str, Any]]:
    """Least squares; returns the model and its held-out scores."""
    table = _table(config, model)
    examples, targets = [], []
    for text, score in reader.scored(model.sources):
        data.add(text, score)
        examples.append([table.add(text)])
        targets.append(score)
    # The steps of AdaGrad suit scores of the size of a logit, so the targets are brought to that size.
    mean, spread = (float(np.mean(targets)), float(np.std(targets)) or 1.0) if targets else (0.0, 1.0)
    standard = [(target - mean) / spread for target in targets]
    fitted = _fit(config, model, table, examples, standard, linear.squared)
    predicted, truth = (spread * column + mean for column in (fitted.measured.scores[:, 0], fitted.measured.targets))
    variation = ((truth - truth.mean()) ** 2).sum()
    return fitted.model(link="identity", scale=spread, shift=mean), {
        **fitted.sizes,
        "r_squared": float(1 - ((predicted - truth) ** 2).sum() / variation) if variation > 0 else 0.0,
        "rank_correlation": metrics.rank_correlation(predicted, truth),
        "mean_absolute_error": float(np.abs(predicted - truth).mean()),
        "reliability": metrics.reliability(predicted, truth),
    }


def train_preference(
    config: QualityTrainingConfig, model: TrainPreferenceConfig, reader: Reader, data: DataHash
) -> tuple[LinearModel, dict[str, Any]]:
    """Bradley & Terry's model, with calibrated differences; returns it and its held-out scores."""
    table = _table(config, model)
    examples, targets = [], []
    for first, second, probability in reader.pairs(model.sources):
        data.add(first, second, probability)
        examples.append([table.add(first), table.add(second)])
        targets.append(probability)
    fitted = _fit(config, model, table, examples, targets, linear.bradley_terry)
    scores, truth = fitted.calibration
    (scale,) = linear.calibrate(scores[:, :1] - scores[:, 1:], truth)
    scores, truth = fitted.measured
    differences = scale * (scores[:, 0] - scores[:, 1])
    decided = truth != 0.5
    right = np.sign(differences[decided]) * np.sign(truth[decided] - 0.5)
    # Files often have the better text first; each pair counts in both orders.
    predicted, observed = metrics.sigmoid(np.append(differences, -differences)), np.append(truth, 1 - truth)
    # Only differences are learned; the mean document gets 0.
    shift = -scale * float(fitted.training.scores.mean())
    return fitted.model(link="identity", scale=scale, shift=shift), {
        **fitted.sizes,
        "accuracy": float((right + 1).mean() / 2) if decided.any() else 0.5,
        "calibration_error": metrics.calibration_error(predicted, observed),
        "reliability": metrics.reliability(predicted, observed),
    }


def _table(config: QualityTrainingConfig, model: _LinearConfig) -> FeatureTable:
    return FeatureTable(
        ngram=model.ngram,
        bits=model.bits,
        document_bytes=model.document_bytes,
        held_out_fraction=config.held_out_fraction,
    )


def _fit(
    config: QualityTrainingConfig,
    model: _LinearConfig,
    table: FeatureTable,
    examples: Sequence[Sequence[int]],
    targets: Sequence[float],
    gradient: linear.Gradient,
) -> _Fitted:
    documents = np.array(examples, np.int64).reshape(len(examples), -1)
    values = np.array(targets, np.float64)
    features = table.features()
    # A pair is held out where one of its texts is, so that no text that was trained on is alone what is measured.
    place = table.held_out()[documents].max(axis=1, initial=0)
    parts = [np.flatnonzero(place == number) for number in range(3)]
    if min(map(len, parts)) == 0:
        raise ValueError(
            f"{type(model).__name__}: {len(values)} examples are too few: {len(parts[0])} to train on, "
            f"{len(parts[1])} to calibrate and {len(parts[2])} to measure with; add texts, or change "
            f"held_out_fraction = {config.held_out_fraction}"
        )
    weights, bias = linear.fit(
        features,
        documents[parts[0]],
        values[parts[0]],
        gradient,
        bits=model.bits,
        epochs=model.epochs,
        learning_rate=model.learning_rate,
        seed=config.seed,
    )
    weights = weights.astype(np.float32).astype(np.float64)  # what is measured is what is saved
    scores = linear.raw_scores(weights, bias, features)
    return _Fitted(model, weights, bias, *(_Part(scores[documents[part]], values[part]) for part in parts))
