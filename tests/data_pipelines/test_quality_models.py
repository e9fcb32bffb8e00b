"""Quality models on synthetic text of which the answer is known, and against plain references."""

import collections
import dataclasses
import io
import itertools
import json
import math

import numpy as np
import orjson
import pyarrow as pa
import pytest
from rich.console import Console

from data_pipelines.quality import linear, model_files
from data_pipelines.quality.examples import FeatureTable, digest_of, place_of
from data_pipelines.quality.features import Words, grams, read_words
from data_pipelines.quality.importance import count_buckets, divergence
from data_pipelines.quality.metrics import area_under_curve, rank_correlation, sigmoid
from data_pipelines.quality.ngram_model import NgramCounter, shuffled
from data_pipelines.quality.scorers import gumbel
from data_pipelines.quality.training import train
from slmjax.config import (
    FilesSourceConfig,
    PreferenceFilesSourceConfig,
    QualityTrainingConfig,
    ScoredFilesSourceConfig,
    TrainClassifierConfig,
    TrainImportanceConfig,
    TrainNgramModelConfig,
    TrainPreferenceConfig,
    TrainRegressionConfig,
)

VOCABULARY = [f"{a}{b}{c}" for a in "bdfgklmnpr" for b in "aeiou" for c in "lmnrst"]
QUIET = Console(file=io.StringIO())


def write_texts(rng, count, *, lean, words=80):
    """Texts of a Zipf vocabulary, of which a share `lean` comes from the odd words, the others from the even ones.

    `lean` is one number for all texts or one for each.
    """
    ranks = 1 / np.arange(2, len(VOCABULARY) // 2 + 2)
    leans = np.broadcast_to(lean, count)
    odd = rng.uniform(size=(count, words)) < leans[:, None]
    drawn = 2 * rng.choice(len(ranks), (count, words), p=ranks / ranks.sum()) + odd
    return [" ".join(VOCABULARY[word] for word in row) for row in drawn]


def save(path, rows):
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return str(path)


def files_of(path, texts):
    return (FilesSourceConfig(paths=(save(path, [{"text": text} for text in texts]),)),)


def train_on(root, model, *, name="model", **fields):
    config = QualityTrainingConfig(output_dir=str(root / name), model=model, **fields)
    return train(config, console=QUIET)["held_out"], model_files.load(root / name)


def words_of(texts):
    (words,) = read_words(pa.array(texts))
    return words


@pytest.fixture(scope="module")
def leaning(tmp_path_factory):
    """Two corpora whose words differ in frequency but not in kind, and a config of a classifier between them."""
    root, rng = tmp_path_factory.mktemp("leaning"), np.random.default_rng(0)
    good, bad = (write_texts(rng, 400, lean=lean) for lean in (0.65, 0.35))
    return root, TrainClassifierConfig(
        positive=files_of(root / "good.jsonl", good), negative=files_of(root / "bad.jsonl", bad), bits=14
    )


def test_a_classifier_separates_two_corpora_and_its_probabilities_are_calibrated(leaning):
    root, config = leaning
    held_out, model = train_on(root, config, held_out_fraction=0.3)
    assert held_out["area_under_curve"] > 0.95
    rng = np.random.default_rng(1)
    texts = write_texts(rng, 600, lean=np.repeat([0.65, 0.35], 300))
    scores = model.score(pa.array(texts))
    assert area_under_curve(scores, np.arange(600) < 300) > 0.95
    assert scores.min() >= 0
    assert scores.max() <= 1
    sure = (scores > 0.9) | (scores < 0.1)
    assert sure.mean() > 0.5
    assert ((scores > 0.5) == (np.arange(600) < 300))[sure].mean() > 0.9
    assert held_out["calibration_error"] < 0.1


def test_training_again_gives_the_same_bytes_and_another_seed_others(leaning):
    root, config = leaning
    about = []
    for name, seed in (("first", 0), ("second", 0), ("third", 1)):
        train_on(root, config, name=name, seed=seed)
        about.append(json.loads((root / name / "model.json").read_text()))
    assert (root / "first/model.npz").read_bytes() == (root / "second/model.npz").read_bytes()
    assert about[0] == about[1]
    assert about[0]["data_sha256"] == about[2]["data_sha256"]
    assert about[0]["arrays_sha256"] != about[2]["arrays_sha256"]
    assert about[0]["held_out"]["training_examples"] + about[0]["held_out"]["measured_examples"] < 800


@pytest.mark.parametrize("gradient", [linear.logistic, linear.bradley_terry])
def test_the_fit_is_that_of_dense_counts(gradient):
    """The sparse steps of AdaGrad against the same steps on a matrix of documents and buckets."""
    rng, bits = np.random.default_rng(2), 8
    features = grams(words_of([*write_texts(rng, 30, lean=0.5, words=12), "one"]), ngram=2, bits=bits)
    per = 2 if gradient is linear.bradley_terry else 1
    examples, targets = rng.integers(0, 31, (100, per)), rng.uniform(size=100).round()
    weights, bias = linear.fit(features, examples, targets, gradient, bits=bits, epochs=3, learning_rate=0.5, seed=7)
    dense = np.zeros((31, 1 << bits))
    for document, (first, end) in enumerate(itertools.pairwise(features.bounds)):
        for bucket in features.buckets[:, first:end].ravel():
            if bucket < 1 << bits:
                dense[document, bucket] += 1 / features.counts[document]
    expected, squares, expected_bias, bias_squares = np.zeros(1 << bits), np.full(1 << bits, 1e-12), 0.0, 0.0
    for epoch in range(3):
        order = np.argsort(np.random.PCG64([7, epoch]).random_raw(100), kind="stable")
        for rows in (order[:64], order[64:]):
            scores = dense[examples[rows]] @ expected + expected_bias
            slopes = gradient(scores, targets[rows]) / len(rows)
            slope = np.einsum("ek,ekb->b", slopes, dense[examples[rows]])
            squares += slope**2
            expected -= 0.5 * slope / np.sqrt(squares)
            bias_squares += slopes.sum() ** 2
            expected_bias -= 0.5 * slopes.sum() / max(bias_squares**0.5, 1e-6)
    np.testing.assert_allclose(weights, expected, atol=1e-9)
    assert bias == pytest.approx(expected_bias, abs=1e-9)


def test_calibration_finds_planted_coefficients_and_stops_at_separable_ones():
    rng = np.random.default_rng(3)
    x = rng.normal(size=40_000)
    observed = (rng.uniform(size=len(x)) < sigmoid(2 * x - 1)).astype(float)
    assert linear.calibrate(np.column_stack([x, np.ones(len(x))]), observed) == pytest.approx([2, -1], abs=0.08)
    scale = linear.calibrate(np.array([[1.0], [2.0], [-3.0]]), np.array([1.0, 1.0, 0.0]))
    assert 0.5 < scale[0] < 50


def test_a_regression_recovers_the_scores_that_made_the_texts(tmp_path):
    rng = np.random.default_rng(4)
    lean = rng.uniform(size=900)
    rows = [
        {"body": text, "stars": 5 * float(share)}
        for text, share in zip(write_texts(rng, 900, lean=lean), lean, strict=True)
    ]
    source = ScoredFilesSourceConfig(
        paths=(save(tmp_path / "scored.jsonl", rows),), text_field="body", score_field="stars"
    )
    held_out, model = train_on(tmp_path, TrainRegressionConfig(sources=(source,), bits=14), held_out_fraction=0.2)
    assert held_out["r_squared"] > 0.8
    assert held_out["rank_correlation"] > 0.9
    scores = model.score(pa.array(write_texts(rng, 3, lean=[0.1, 0.5, 0.9], words=500)))
    assert scores == pytest.approx([0.5, 2.5, 4.5], abs=0.7)


@pytest.mark.parametrize("votes", [None, "share"])
def test_preferences_recover_a_planted_order(tmp_path, votes):
    rng = np.random.default_rng(5)
    lean = rng.uniform(size=300)
    texts = write_texts(rng, 300, lean=lean)
    rows = []
    for a, b in rng.integers(0, 300, (2500, 2)).tolist():
        likely = float(sigmoid(8 * (lean[a] - lean[b])))
        if votes is None:
            a, b = (a, b) if rng.uniform() < likely else (b, a)
        rows.append({"preferred": texts[a], "other": texts[b], "share": likely})
    source = PreferenceFilesSourceConfig(paths=(save(tmp_path / "pairs.jsonl", rows),), probability_field=votes)
    held_out, model = train_on(tmp_path, TrainPreferenceConfig(sources=(source,), bits=14), held_out_fraction=0.2)
    assert held_out["accuracy"] > 0.75  # by the planted order itself, which the votes of one judge follow in 4 of 5
    new = rng.uniform(size=300)
    assert rank_correlation(model.score(pa.array(write_texts(rng, 300, lean=new))), new) > 0.9
    assert held_out["calibration_error"] < 0.1


def test_the_ngram_model_is_that_of_witten_and_bell_counted_by_hand():
    texts = ["a b a b c", "b c a", "c"]
    counter = NgramCounter(ngram=3, bits=20)
    for text in texts:  # one after another, as pieces come
        counter.add(words_of([text]))
    counts = [
        collections.Counter(
            tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)
        )
        for n in (1, 2, 3)
    ]

    def probability(words):
        if not words:
            return 2**-20
        gram, context = tuple(words), tuple(words[:-1])
        if context:
            seen = counts[len(context) - 1][context]
            kinds = len({longer for longer in counts[len(gram) - 1] if longer[:-1] == context})
        else:
            seen, kinds = sum(counts[0].values()), len(counts[0])
        lower = probability(words[1:])
        return (counts[len(gram) - 1][gram] + kinds * lower) / (seen + kinds) if kinds else lower

    for text in ("a b c a b", "c a unseen b a", "b", "c c c c"):
        words = text.split()
        nats = [-math.log(probability(words[max(0, i - 2) : i + 1])) for i in range(len(words))]
        assert counter.model().score(pa.array([text, ""])) == pytest.approx([np.mean(nats), 20 * math.log(2)])


def test_words_in_a_random_order_are_less_likely(tmp_path):
    """Sentences of a grammar: the order of words carries what the words themselves do not."""
    rng = np.random.default_rng(6)
    following = {word: rng.choice(VOCABULARY, 3).tolist() for word in VOCABULARY}

    def sentences():
        words = [str(rng.choice(VOCABULARY))]
        for _ in range(60):
            words.append(following[words[-1]][rng.integers(3)])
        return " ".join(words)

    texts = [sentences() for _ in range(300)]
    held_out, model = train_on(tmp_path, TrainNgramModelConfig(sources=files_of(tmp_path / "a.jsonl", texts), bits=16))
    assert held_out["area_under_curve"] > 0.99
    assert held_out["nats_per_word"] < math.log(3) + 0.5 < held_out["nats_per_word_shuffled"]
    mixed = [" ".join(rng.permutation(text.split())) for text in texts]
    real, random = (model.score(pa.array(group)) for group in (texts, mixed))
    assert (real < random).all()


def test_shuffling_keeps_the_words_of_every_document():
    words = words_of(["a b c d e f", "g h i j", "k"])
    mixed = shuffled(words, seed=0)
    for first, end in itertools.pairwise(words.bounds):
        assert sorted(mixed.hashes[first:end]) == sorted(words.hashes[first:end])
    assert mixed.hashes[:10].tolist() != words.hashes[:10].tolist()


def test_importance_resampling_moves_the_ngrams_towards_the_target(tmp_path):
    rng = np.random.default_rng(7)
    lean = rng.choice([0.2, 0.5, 0.8], 2000, p=[0.6, 0.2, 0.2])  # a fifth of the raw texts is like the target
    target, raw = write_texts(rng, 300, lean=0.8), write_texts(rng, 2000, lean=lean)
    config = TrainImportanceConfig(
        target=files_of(tmp_path / "target.jsonl", target), raw=files_of(tmp_path / "raw.jsonl", raw), bits=12
    )
    held_out, model = train_on(tmp_path, config)
    weights = model.score(pa.array(raw))
    keys = weights + np.array([gumbel(0, str(i)) for i in range(len(raw))])
    chosen, random = np.argsort(keys)[-300:], rng.choice(2000, 300, replace=False)

    def counts(texts):
        return count_buckets(read_words(pa.array(texts)), ngram=1, bits=12)

    before, after = (divergence(counts(target), counts([raw[i] for i in part])) for part in (random, chosen))
    floor = divergence(counts(target), counts(write_texts(rng, 300, lean=0.8)))  # of two samples of one distribution
    assert after - floor < (before - floor) / 10
    assert (lean[chosen] == 0.8).mean() > 0.95
    assert held_out["divergence_of_raw"] > 0.05
    assert held_out["area_under_curve"] > 0.6
    # The weight is a ratio of likelihoods: by hand, from the same counts.
    split = [[text for text in texts if not is_measured(text)] for texts in (target, raw)]
    p, q = (count_buckets(read_words(pa.array(texts)), ngram=2, bits=12) + 1 for texts in split)
    (words,) = read_words(pa.array(raw[:1]))
    buckets = grams(words, ngram=2, bits=12).buckets.ravel()[:-1]
    ratios = np.log(p / p.sum()) - np.log(q / q.sum())
    assert weights[0] == pytest.approx(ratios[buckets].sum(), rel=1e-5)
    mean = dataclasses.replace(model, per="ngram").score(pa.array(raw[:1]))
    assert mean == pytest.approx(ratios[buckets].mean(), rel=1e-5)


def is_measured(text):
    return place_of(digest_of(text)) < 0.1


def test_scores_do_not_depend_on_the_batch(leaning):
    root, config = leaning
    texts = pa.array([*write_texts(np.random.default_rng(8), 40, lean=0.5), "", "!"])
    models = [
        train_on(root, config, name="alone")[1],
        train_on(root, TrainNgramModelConfig(sources=config.positive, bits=14), name="ngram")[1],
    ]
    for model in models:
        together = model.score(texts)
        alone = np.concatenate([model.score(texts.slice(i, 1)) for i in range(len(texts))])
        assert together.tolist() == alone.tolist()
        assert np.isfinite(together).all()
        assert model.score(texts.slice(0, 0)).tolist() == []


BROKEN = [
    b"not json",
    b'["a list"]',
    b'{"text": null, "score": 1}',
    b'{"score": 1}',
    b'{"text": 7, "score": 1}',
    b'{"text": "  ", "score": 1}',
    b'{"text": "fine", "score": "high"}',
    b'{"text": "fine", "score": true}',
    b'{"text": "fine", "score": NaN}',
    b'{"text": "fine", "score": 1e999}',
    b'{"text": "bad \xff byte", "score": 1}',
]


def test_records_that_cannot_be_used_are_counted(tmp_path):
    rng = np.random.default_rng(9)
    good = [orjson.dumps({"text": text, "score": i % 5}) for i, text in enumerate(write_texts(rng, 60, lean=0.5))]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*good[:30], *BROKEN, *good[30:]]))
    source = ScoredFilesSourceConfig(paths=(str(tmp_path / "a.jsonl"),))
    model = TrainRegressionConfig(sources=(source,), bits=10)
    about = train(
        QualityTrainingConfig(output_dir=str(tmp_path / "m"), model=model, held_out_fraction=0.4), console=QUIET
    )
    assert sum(about["rejected"].values()) == len(BROKEN)
    assert about["rejected"]["missing_field"] == 2
    assert about["rejected"]["wrong_type"] == 4
    sizes = [about["held_out"][f"{part}_examples"] for part in ("training", "calibration", "measured")]
    assert sum(sizes) == 60


def test_too_little_to_learn_from_is_said_with_numbers(tmp_path):
    texts = write_texts(np.random.default_rng(10), 40, lean=0.5)
    few, many, none = (files_of(tmp_path / f"{name}.jsonl", part) for name, part in
                       (("few", texts[:2]), ("many", texts), ("none", [])))  # fmt: skip
    with pytest.raises(ValueError, match=r"4 examples are too few: \d to train on"):
        train_on(tmp_path, TrainClassifierConfig(positive=few, negative=few))
    with pytest.raises(ValueError, match=r"0 of .* held-out texts are positive; both kinds are needed"):
        train_on(tmp_path, TrainClassifierConfig(positive=none, negative=many), held_out_fraction=0.5)
    with pytest.raises(ValueError, match=r"too few texts \(text\): \d to train on and 0 to measure with"):
        train_on(tmp_path, TrainNgramModelConfig(sources=few), held_out_fraction=1e-9)
    with pytest.raises(ValueError, match="matches no file"):
        train_on(tmp_path, TrainNgramModelConfig(sources=(FilesSourceConfig(paths=(str(tmp_path / "absent"),)),)))


def test_damaged_models_are_refused(leaning, tmp_path):
    root, config = leaning
    train_on(root, config, name="whole")
    about = json.loads((root / "whole/model.json").read_text())
    npz = (root / "whole/model.npz").read_bytes()

    def load(npz=npz, **changes):
        (tmp_path / "model.npz").write_bytes(npz)
        (tmp_path / "model.json").write_text(json.dumps(about | changes))
        return model_files.load(tmp_path)

    assert load().ngram == 2
    with pytest.raises(ValueError, match=r"not the file that model.json describes"):
        load(npz[:-1])
    with pytest.raises(ValueError, match=r"format and feature versions \(1, 0\).*train the model again"):
        load(feature_version=0)
    for changes in ({"kind": "forest"}, {"fields": {"ngram": 2}}, {"fields": 3}):
        with pytest.raises(ValueError, match="is damaged, train it again"):
            load(**changes)
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(ValueError, match="is no quality model"):
        model_files.load(tmp_path)
    (tmp_path / "model.json").write_text("[]")
    with pytest.raises(ValueError, match="must be an object"):
        model_files.load(tmp_path)
    with pytest.raises(ValueError, match=r"model.json cannot be read"):
        model_files.load(tmp_path / "absent")


def test_no_text_of_a_pair_to_train_on_is_held_out(tmp_path, monkeypatch):
    texts = write_texts(np.random.default_rng(11), 60, lean=0.5)
    rows = [{"preferred": texts[i], "other": texts[(7 * i + 3) % 60]} for i in range(60)]
    source = PreferenceFilesSourceConfig(paths=(save(tmp_path / "pairs.jsonl", rows),))
    trained_on = []

    def fit(features, examples, *args, **kwargs):
        trained_on.extend(examples.ravel().tolist())
        return linear_fit(features, examples, *args, **kwargs)

    linear_fit = linear.fit
    monkeypatch.setattr(linear, "fit", fit)
    train_on(tmp_path, TrainPreferenceConfig(sources=(source,), bits=8), held_out_fraction=0.3)
    numbered = list(dict.fromkeys(text for row in rows for text in row.values()))
    held_out = {number for number, text in enumerate(numbered) if place_of(digest_of(text)) < 0.3}
    assert trained_on
    assert held_out
    assert not held_out & set(trained_on)


def test_training_reads_the_start_of_a_text_and_each_text_once():
    table = FeatureTable(ngram=1, bits=8, document_bytes=3, held_out_fraction=0.5)
    assert [table.add(text) for text in ("a b", "c d", "a b", "e \u00e9 f")] == [0, 1, 0, 2]
    assert table.features().counts.tolist() == [2, 2, 1]  # the third byte of the last is half a character


def test_words_of_hand_made_counts():
    words = Words(np.array([1, 2, 1], np.uint64), np.array([0, 3]))
    counter = NgramCounter(ngram=2, bits=8)
    counter.add(words)
    model = counter.model()
    assert model.counts.sum(axis=1).tolist() == [3, 2]
    assert model.types.sum() == 2
