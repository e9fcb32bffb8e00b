"""Hashed words and n-grams against plain Python, and the numbers by which scores are judged."""

import itertools
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.quality import features, metrics
from data_pipelines.quality.features import Words, grams, read_words, sum_by_document
from data_pipelines.quality.quantiles import order_statistics

MULTIPLIER, MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1
texts_of = st.lists(
    st.text(st.sampled_from("aZ9_ .,-\n\t\x7f\u00e9\u00df\u65e5\u672c\U0001f600"), max_size=30), max_size=8
)


def plain_words(text: str) -> list[bytes]:
    """Words by the rules of the module's docstring, a byte at a time."""
    words, before = [], "space"
    for letter in text:
        content = letter.encode().lower()
        if len(content) == 3 and 0xE3 <= content[0] <= 0xED:
            kind = "character"
        elif len(content) > 1 or letter.isalnum() or letter == "_":
            kind = "word"
        else:
            kind = "punctuation" if letter.isprintable() and letter != " " else "space"
        if kind == "character" or (kind != "space" and kind != before):
            words.append(b"")
        if kind != "space":
            words[-1] += content
        before = "word" if kind == "character" else kind
    return words


def plain_hash(word: bytes) -> int:
    first = int.from_bytes(word[:8], "little")
    value = mixed(first ^ first >> 29)
    for start in range(8, min(len(word), 64), 8):
        value = mixed(value + int.from_bytes(word[start : start + 8], "little") & MASK)
    return value


def mixed(value: int) -> int:
    value = value * MULTIPLIER & MASK
    return value ^ value >> 32


def all_words(texts: list[str]) -> Words:
    pieces = list(read_words(pa.array(texts, pa.string())))
    bounds = np.append(0, np.cumsum(np.concatenate([[], *(np.diff(piece.bounds) for piece in pieces)]).astype(int)))
    return Words(np.concatenate([np.zeros(0, np.uint64), *(piece.hashes for piece in pieces)]), bounds)


@settings(max_examples=200, deadline=None)
@given(texts=texts_of)
def test_words_are_those_of_the_plain_rules(texts):
    words = all_words(texts)
    expected = [[plain_hash(word) for word in plain_words(text)] for text in texts]
    assert np.diff(words.bounds).tolist() == [len(each) for each in expected]
    assert words.hashes.tolist() == list(itertools.chain(*expected))


@settings(max_examples=50, deadline=None)
@given(texts=texts_of, ngram=st.integers(1, 4))
def test_ngrams_are_those_of_a_loop_over_words(texts, ngram):
    words = all_words(texts)
    found = grams(words, ngram=ngram, bits=9)
    for order in range(1, ngram + 1):
        for first, end in itertools.pairwise(words.bounds.tolist()):
            for i in range(first, end):
                value, *others = words.hashes[i : i + order].tolist()
                for word in others:
                    value = (value * MULTIPLIER + word) & MASK
                bucket = (value * MULTIPLIER & MASK) >> 55 if i + order <= end else 1 << 9
                assert found.buckets[order - 1, i] == bucket
    sizes = np.diff(words.bounds)
    assert found.counts.tolist() == [sum(max(size - order, 0) for order in range(ngram)) for size in sizes]


def test_what_a_text_gives_depends_neither_on_its_neighbours_nor_on_the_array_that_holds_it(monkeypatch):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["alpha", "beta,", "gamma"], rng.integers(0, 30))) for _ in range(50)]
    alone = [all_words([text]).hashes.tolist() for text in texts]
    monkeypatch.setattr(features, "_PIECE_BYTES", 300)  # several documents a piece, and some longer than one
    together = all_words(texts)
    assert [together.hashes[a:b].tolist() for a, b in itertools.pairwise(together.bounds)] == alone
    sliced = list(read_words(pa.array(["x", *texts, "y"]).slice(1, len(texts))))
    assert len(sliced) > 1
    assert np.concatenate([piece.hashes for piece in sliced]).tolist() == list(itertools.chain(*alone))


def test_hashes_stay_what_they_are():
    """Models are kept: whoever changes a hash must raise FEATURE_VERSION, and then the numbers here."""
    words = all_words(["Hello, world! internationalisation \u65e5\u672c"])
    assert features.FEATURE_VERSION == 1
    assert len(words.hashes) == 7
    assert [int(word) for word in grams(words, ngram=2, bits=18).buckets[:, 0]] == PINNED


PINNED = [98478, 18420]


def test_texts_must_be_strings():
    with pytest.raises(ValueError, match="array of strings, got int64"):
        list(read_words(pa.array([1])))


def test_sums_by_document_with_empty_ones():
    assert sum_by_document(np.arange(5.0), np.array([0, 0, 2, 2, 5, 5])).tolist() == [0, 1, 0, 9, 0]


@settings(max_examples=50, deadline=None)
@given(scored=st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=30))
def test_area_under_the_curve_counts_pairs(scored):
    positives = [score for score, positive in scored if positive]
    negatives = [score for score, positive in scored if not positive]
    scores, positive = (np.array(column) for column in zip(*scored, strict=True))
    if not positives or not negatives:
        with pytest.raises(ValueError, match="both kinds are needed"):
            metrics.area_under_curve(scores, positive)
        return
    pairs = [(a > b) + (a == b) / 2 for a in positives for b in negatives]
    assert metrics.area_under_curve(scores, positive) == pytest.approx(sum(pairs) / len(pairs))


def test_calibration_and_ranks():
    rng = np.random.default_rng(0)
    predicted = rng.uniform(size=20_000)
    observed = (rng.uniform(size=20_000) < predicted).astype(float)
    assert metrics.calibration_error(predicted, observed) < 0.015  # ten bins of 2,000: 0.01 each by chance
    assert metrics.calibration_error(np.full(20_000, 0.9), observed) == pytest.approx(0.4, abs=0.01)
    assert metrics.rank_correlation(np.array([1, 5, 9]), np.array([2, 3, 70])) == pytest.approx(1)
    assert metrics.rank_correlation(np.array([1, 5, 9]), np.array([3, 3, 3])) == 0
    assert metrics.sigmoid(np.array([-800.0, 0, 800])).tolist() == [0, 0.5, 1]


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.floats(allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, -1.0]), min_size=1, max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=3),
    data=st.data(),
)
def test_order_statistics_are_those_of_sorting(values, cuts, data):
    ranks = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=3))
    pieces = np.split(np.array(values), sorted(min(cut, len(values)) for cut in cuts))
    found = order_statistics(lambda: iter(pieces), ranks)
    assert found == [sorted(values)[rank] for rank in ranks]
    assert not any(math.isnan(value) for value in found)
