"""Signatures are what a plain loop finds; they estimate similarity, and bands make candidates, as the theory says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.stages import hashed_words, minhash
from data_pipelines.stages.texts import Texts
from slmjax.config import NearDedupConfig

fuzzed = settings(deadline=None, max_examples=60)


def bands(texts: list[str], config: NearDedupConfig | None = None) -> np.ndarray:
    config = config or NearDedupConfig()
    return minhash.measure(config, Texts.of(texts))["bands"].flatten().to_numpy().reshape(len(texts), -1)


def meet(texts: list[str], config: NearDedupConfig | None = None) -> bool:
    one, other = bands(texts, config)
    return bool((one == other).any())


def ngrams(config: NearDedupConfig, texts: list[str]) -> list[set[int]]:
    hashes, counts = minhash.ngrams(config, hashed_words.of(Texts.of(texts)))
    return [set(part.tolist()) for part in np.split(hashes, np.cumsum(counts)[:-1])]


@fuzzed
@given(
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=8),
    permutations=st.integers(1, 20),
    seed=st.integers(0, 2**32),
)
def test_signatures_are_those_of_a_plain_loop(counts, permutations, seed):
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**32, sum(counts), dtype=np.uint32)
    multipliers = rng.integers(0, 2**32, permutations, dtype=np.uint32) | np.uint32(1)
    expected = []
    for document in np.split(hashes, np.cumsum(counts)[:-1]):
        products = [[x * a % 2**32 for x in document.tolist()] for a in multipliers.tolist()]
        expected.append([min(row, default=2**32 - 1) for row in products])
    assert minhash.sign(hashes, np.array(counts), multipliers).tolist() == expected


def test_ngrams_are_words_in_a_row_and_all_words_of_a_shorter_document():
    config = NearDedupConfig(ngram=3)
    first, second, short, same, other, empty = ngrams(config, ["a b c d", "B, c. D! e", "a b", "A... b", "b a", " - "])
    assert len(first) == len(second) == 2
    assert len(first & second) == 1
    assert short == same != other
    assert len(other) == 1
    assert empty == set()


def test_ngrams_longer_than_every_document_cost_nothing():
    first, second = ngrams(NearDedupConfig(ngram=2**31), ["a b c d", "e"])
    assert len(first) == len(second) == 1


def test_signatures_estimate_similarity_without_bias_and_with_the_error_of_theory():
    rng = np.random.default_rng(0)
    multipliers = minhash._multipliers(NearDedupConfig())
    errors, variances = [], []
    for size in [10, 50, 200, 1000] * 60:
        shared = int(rng.integers(size))
        union = rng.integers(0, 2**32, 2 * size - shared, dtype=np.uint32)
        one, other = minhash.sign(
            np.concatenate([union[:size], union[size - shared :]]), np.array([size, size]), multipliers
        )
        similarity = shared / len(union)
        errors.append((one == other).mean() - similarity)
        variances.append(similarity * (1 - similarity) / len(multipliers))
    deviation = np.sqrt(np.mean(variances))
    # Four standard errors of the mean, and of the root mean square, of 240 draws.
    assert abs(np.mean(errors)) < 4 * deviation / np.sqrt(len(errors))
    assert abs(np.sqrt(np.mean(np.square(errors))) / deviation - 1) < 4 / np.sqrt(2 * len(errors))


@pytest.mark.parametrize("replaced", [20, 44, 60, 80])
def test_candidates_follow_the_banding_curve(replaced):
    """Pairs of Jaccard similarity s share a band with probability 1 - (1 - s^8)^14."""
    rng = np.random.default_rng(replaced)
    num_pairs, num_words = 250, 300
    texts = []
    for _ in range(num_pairs):
        words = [f"w{word}" for word in rng.integers(0, 5000, num_words)]
        # New words at the start: the n-grams are shared but for the first `replaced`.
        changed = [f"x{word}" for word in rng.integers(0, 10**6, replaced)] + words[replaced:]
        texts += [" ".join(words), " ".join(changed)]
    grams = num_words - 4
    similarity = (grams - replaced) / (grams + replaced)
    expected = 1 - (1 - similarity**8) ** 14
    values = bands(texts)
    met = (values[::2] == values[1::2]).any(axis=1).mean()
    assert 0.05 < expected < 0.999
    assert abs(met - expected) < 4 * np.sqrt(expected * (1 - expected) / num_pairs) + 1 / num_pairs


def test_punctuation_case_and_white_space_do_not_matter():
    words = [f"word{i}" for i in range(100)]
    assert (bands([" ".join(words)]) == bands([",\n".join(words).upper() + "!"])).all()


def test_documents_of_other_seeds_bands_and_ngrams_do_not_compare():
    text = " ".join(f"word{i}" for i in range(50))
    usual = bands([text])
    assert not (bands([text], NearDedupConfig(seed=1)) == usual).any()
    assert not (bands([text], NearDedupConfig(ngram=4)) == usual).any()
    assert bands([text], NearDedupConfig(bands=3)).shape == (1, 3)
    assert len(set(usual[0].tolist())) == 14  # bands of one document never meet each other


def test_only_the_beginning_of_a_long_document_is_read():
    config = NearDedupConfig(signature_bytes=50)
    same, other = "same words here " * 4, "quite other text "
    assert meet([same + other * 30, same + "end"], config)
    assert not meet([same + other * 30, same + "end"], NearDedupConfig())
    assert not meet(["prefix " + same, same], NearDedupConfig(signature_bytes=10))


def test_a_document_without_words_has_no_ngrams():
    measured = minhash.measure(NearDedupConfig(), Texts.of(["", "...", "one", "one two three four five six"]))
    assert measured["ngrams"].to_pylist() == [0, 0, 1, 2]
