"""Deduplication finds what was planted, keeps the first, and nothing else goes."""

import sys

import numpy as np
import pyarrow as pa
import pytest

from data_pipelines import stages
from data_pipelines.stages import exact, minhash
from slmjax.config import ExactDedupConfig, NearDedupConfig


def attributes(config, texts: list[str]) -> pa.RecordBatch:
    return stages.measure(config, pa.record_batch({"id": [str(i) for i in range(len(texts))], "text": texts}))


def near_first(texts: list[str], config: NearDedupConfig | None = None) -> list[int]:
    config = config or NearDedupConfig()
    batch = attributes(config, texts)
    return minhash.first_of_each(batch.column(f"band_{i:02d}").to_numpy() for i in range(config.bands)).tolist()


def random_text(rng: np.random.Generator, num_words: int = 400) -> list[str]:
    return [f"w{word}" for word in rng.integers(0, 5000, num_words)]


def test_exact_duplicates_differ_in_case_and_white_space_only():
    texts = ["One two", "three", "one  TWO\n", "one two.", "three"]
    assert exact.first_of_each(attributes(ExactDedupConfig(), texts).column("digest")).tolist() == [0, 1, 0, 3, 1]


def test_near_duplicates_join_the_first_and_strangers_stay():
    rng = np.random.default_rng(1)
    originals = [random_text(rng) for _ in range(40)]
    edited = []
    for words in originals:
        words = list(words)
        words[int(rng.integers(len(words)))] = "edited"  # one word in 400 touches five of about 396 5-grams
        edited.append(words)
    first = near_first([" ".join(words) for words in originals + edited])
    assert first[:40] == list(range(40))
    assert first[40:] == list(range(40))


def test_punctuation_and_case_do_not_matter():
    rng = np.random.default_rng(2)
    words = random_text(rng, 100)
    assert near_first([" ".join(words), ", ".join(words).upper() + "!"]) == [0, 0]


def test_recall_follows_the_banding_curve():
    """Pairs of Jaccard similarity s meet with probability 1 - (1 - s^8)^14."""
    rng = np.random.default_rng(3)
    num_pairs, num_words = 150, 300
    texts = []
    for _ in range(num_pairs):
        words = random_text(rng, num_words)
        changed = list(words)
        # A block of new words: (n - k) shared and 2k different 5-grams at the ends of it.
        block = 44
        changed[:block] = [f"x{i}" for i in range(block)]
        texts += [" ".join(words), " ".join(changed)]
    shared = num_words - 4 - block
    similarity = shared / (2 * (num_words - 4) - shared)
    expected = 1 - (1 - similarity**8) ** 14
    first = near_first(texts)
    met = sum(first[i] == first[i + 1] for i in range(0, len(texts), 2)) / num_pairs
    deviation = (expected * (1 - expected) / num_pairs) ** 0.5
    assert 0.5 < expected < 0.95
    assert abs(met - expected) < 4 * deviation


def test_a_chain_of_equal_bands_is_one_cluster_with_the_first_as_its_root():
    bands = [np.array([1, 2, 3, 2, 9]), np.array([5, 6, 5, 5, 8])]
    assert minhash.first_of_each(iter(bands)).tolist() == [0, 0, 0, 0, 4]


def test_short_documents_meet_only_their_equals():
    assert near_first(["a b", "a b", "a c", "", " "]) == [0, 0, 2, 3, 3]


def test_only_the_beginning_of_a_long_document_is_read():
    config = NearDedupConfig(signature_bytes=50)
    same, other = "same words here " * 4, "quite other text "
    assert near_first([same + other * 30, same + "end"], config) == [0, 0]


def test_without_rensa_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(ValueError, match=r"NearDedupConfig needs the package rensa: pip install -e '\.\[data\]' -c"):
        minhash.check_installed()
