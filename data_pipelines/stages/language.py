"""In which language a document is, from a sample of it: the naive Bayes model of `py3langid`, a whole batch at once.

Lui and Baldwin 2012 (langid.py): byte n-grams are found by an automaton.
"""

import dataclasses
import functools
import itertools
import unicodedata

import numpy as np
import pyarrow as pa

from data_pipelines.stages.compiled import compiled
from data_pipelines.stages.texts import Texts
from slmjax.config.filters import LanguageFilterConfig

UNKNOWN = "und"  # ISO 639-2: undetermined


@dataclasses.dataclass(frozen=True)
class _Model:
    """Of `py3langid`.

    Attributes:
      languages: of each class.
      aliases: pairs of classes of one language, whose probabilities are added.
      next_states: for each row and byte.
      rows: of each state, times 256.
      features: that are found on reaching each state; -1 for none.
      weights: log-probability of each feature in each class.
      priors: log-probability of each class.
    """

    languages: list[str]
    aliases: list[tuple[int, int]]
    next_states: np.ndarray
    rows: np.ndarray
    features: np.ndarray
    weights: np.ndarray
    priors: np.ndarray


def check_installed() -> None:
    """Raises ValueError with the command to run where `py3langid` is absent."""
    try:
        import py3langid  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "LanguageFilterConfig needs the package py3langid: pip install -e '.[data]' -c constraints.txt, or leave "
            "the filter out"
        ) from error


def measure(config: LanguageFilterConfig, texts: Texts) -> dict[str, pa.Array]:
    """The most likely language of each document, as its ISO 639 code, and its probability."""
    model = _model()
    samples = [sample.encode() for sample in take_samples(config, texts)]
    counted = _count_features(model, samples)
    logits = np.zeros((len(samples), len(model.languages)), np.float32)
    for row, (features, counts) in zip(logits, counted, strict=True):
        np.add(np.log1p(counts, dtype=np.float32) @ model.weights.take(features, axis=0), model.priors, out=row)
    # The model's own temperature, by which long samples are not surer than they should be.
    logits /= np.sqrt([[max(len(sample), 1)] for sample in samples]).reshape(-1, 1)
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    for first, again in model.aliases:
        probabilities[:, first] += probabilities[:, again]
        probabilities[:, again] = 0.0
    known = np.array([len(features) > 0 for features, _ in counted], bool)
    best = probabilities.argmax(axis=1)
    languages = [model.languages[i] if found else UNKNOWN for i, found in zip(best.tolist(), known, strict=True)]
    scores = np.where(known, probabilities[np.arange(len(best)), best], 0.0).astype(np.float64)
    return {"language": pa.array(languages, pa.string()), "language_score": pa.array(scores)}


def take_samples(config: LanguageFilterConfig, texts: Texts) -> list[str]:
    """Of each document all, where it is short, or parts from all over it, as the model wants them."""
    size = config.sample_bytes // config.sample_parts
    samples = []
    for start, end in zip(texts.starts.tolist(), texts.ends.tolist(), strict=True):
        if end - start <= config.sample_bytes:
            sample = texts.raw[start:end].decode()
        else:
            step = (end - start - size) // max(config.sample_parts - 1, 1)
            parts = [texts.raw[at : at + size] for at in range(start, end, max(step, 1))][: config.sample_parts]
            sample = "\n".join(part.decode(errors="ignore") for part in parts)
        samples.append(unicodedata.normalize("NFC", sample.lower() if sample.isupper() else sample))
    return samples


@functools.cache
def _model() -> _Model:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    loaded = LanguageIdentifier.from_model_file(MODEL_FILE)
    languages = list(loaded.nb_classes)
    return _Model(
        languages=languages,
        aliases=[(languages.index(language), i) for i, language in enumerate(languages) if language in languages[:i]],
        next_states=np.asarray(loaded.tk_nextmove),
        rows=np.asarray(loaded.tk_row).astype(np.int64) << 8,
        features=np.asarray(loaded.tk_output, np.int32),
        weights=loaded.nb_ptc.astype(np.float32),
        priors=loaded.nb_pc.astype(np.float32),
    )


def _count_features(model: _Model, samples: list[bytes]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The features of each sample, and how often each occurs."""
    sizes = np.array([len(sample) for sample in samples], np.int64)
    data = np.frombuffer(b"".join(samples), np.uint8)
    keys = _find(data, np.cumsum(sizes) - sizes, sizes, model.next_states, model.rows, model.features)
    keys, counts = np.unique(keys, return_counts=True)
    edges = np.searchsorted(keys, np.arange(len(samples) + 1, dtype=np.uint64) << np.uint64(32)).tolist()
    features = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
    return [(features[a:b], counts[a:b]) for a, b in itertools.pairwise(edges)]


@compiled
def _find(
    data: np.ndarray,
    starts: np.ndarray,
    sizes: np.ndarray,
    next_states: np.ndarray,
    rows: np.ndarray,
    features: np.ndarray,
) -> np.ndarray:
    """The features in samples of so many bytes: numbers of the sample and, in the lower half, the feature."""
    found, number = np.empty(len(data), np.uint64), np.uint64(0)
    states, longest = np.zeros(len(sizes), np.uint32), 0
    for size in sizes:
        longest = max(longest, size)
    for step in range(longest):  # of all samples, since every state waits for memory
        for sample in range(len(sizes)):
            if step < sizes[sample]:
                state = next_states[rows[states[sample]] + data[starts[sample] + step]]
                states[sample] = state
                found[number] = np.uint64(sample) << np.uint64(32) | np.uint64(features[state])
                number += np.uint64(features[state] >= 0)
    return found[:number]
