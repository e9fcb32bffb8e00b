"""Learns scores by counting n-grams: the language model of words, and importance weights."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipelines.quality import metrics
from data_pipelines.quality.examples import DataHash, Reader, digest_of, grouped_words, place_of
from data_pipelines.quality.features import Words, read_words
from data_pipelines.quality.importance import count_buckets, divergence, importance_model
from data_pipelines.quality.linear import LinearModel
from data_pipelines.quality.ngram_model import NgramCounter, NgramModel, shuffled
from slmjax.config import QualityTrainingConfig, TrainImportanceConfig, TrainNgramModelConfig
from slmjax.config.sources import TextSourceConfig

# Held-out texts are in memory; those beyond this are counted with the others.
_HELD_OUT_BYTES = 16 << 20


def train_ngram_model(
    config: QualityTrainingConfig, model: TrainNgramModelConfig, reader: Reader, data: DataHash
) -> tuple[NgramModel, dict[str, Any]]:
    """Counts; returns the model, and how likely held-out text is as it is and with its words in a random order."""
    texts = _Texts(config, reader, data)
    counter = NgramCounter(ngram=model.ngram, bits=model.bits)
    for words in grouped_words(texts.training("text", model.sources)):
        counter.add(words)
    fitted = counter.model()
    held_out = texts.held_out("text")
    real = np.concatenate([fitted.score_words(words) for words in held_out])
    mixed = np.concatenate([fitted.score_words(shuffled(words, seed=config.seed)) for words in held_out])
    return fitted, {
        **texts.sizes,
        "nats_per_word": float(real.mean()),
        "nats_per_word_shuffled": float(mixed.mean()),
        "area_under_curve": metrics.area_under_curve(
            np.append(mixed, real), np.repeat([True, False], [len(mixed), len(real)])
        ),
    }


def train_importance(
    config: QualityTrainingConfig, model: TrainImportanceConfig, reader: Reader, data: DataHash
) -> tuple[LinearModel, dict[str, Any]]:
    """Counts; returns the model, how far the raw texts are from the target, and how well the score tells them apart."""
    texts = _Texts(config, reader, data)
    counts = {
        kind: count_buckets(grouped_words(texts.training(kind, sources)), ngram=model.ngram, bits=model.bits)
        for kind, sources in (("target", model.target), ("raw", model.raw))
    }
    fitted = importance_model(counts["target"], counts["raw"], model)
    scores = {kind: np.concatenate(list(map(fitted.score_words, texts.held_out(kind)))) for kind in counts}
    return fitted, {
        **texts.sizes,
        "divergence_of_raw": divergence(counts["target"], counts["raw"]),
        "area_under_curve": metrics.area_under_curve(
            np.append(scores["target"], scores["raw"]),
            np.repeat([True, False], [len(scores["target"]), len(scores["raw"])]),
        ),
    }


class _Texts:
    """Texts of several kinds, read once: those to count are passed on, a share of them is kept to measure with."""

    def __init__(self, config: QualityTrainingConfig, reader: Reader, data: DataHash):
        self._config, self._reader, self._data = config, reader, data
        self._held_out: dict[str, list[str]] = {}
        self._num_training: dict[str, int] = {}

    def training(self, kind: str, sources: Sequence[TextSourceConfig]) -> Iterator[str]:
        """Yields the texts of one kind that are not held out."""
        held_out = self._held_out[kind] = []
        self._num_training[kind] = held_out_bytes = 0
        for text in self._reader.texts(sources):
            self._data.add(kind, text)
            if place_of(digest_of(text)) < self._config.held_out_fraction and held_out_bytes < _HELD_OUT_BYTES:
                held_out.append(text)
                held_out_bytes += len(text)
            else:
                self._num_training[kind] += 1
                yield text
        if not held_out or not self._num_training[kind]:
            raise ValueError(
                f"too few texts ({kind}): {self._num_training[kind]} to train on and {len(held_out)} to measure with; "
                f"add texts, or change held_out_fraction = {self._config.held_out_fraction}"
            )

    def held_out(self, kind: str) -> list[Words]:
        """The others, once all are read."""
        return list(read_words(pa.array(self._held_out[kind], pa.string())))

    @property
    def sizes(self) -> dict[str, int]:
        """How many texts there are of every kind."""
        training = {f"{kind}_training_texts": number for kind, number in self._num_training.items()}
        return training | {f"{kind}_measured_texts": len(texts) for kind, texts in self._held_out.items()}
