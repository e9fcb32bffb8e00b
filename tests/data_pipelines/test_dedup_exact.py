"""Exact duplicates are found across shards, the right one is kept and named, whatever the pieces are."""

import hashlib
import tempfile
from pathlib import Path

import numpy as np
import pytest
from dedup_corpus import decide, earlier_corpus, write_corpus, write_scores
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import deduplicate
from data_pipelines.deduplicate import buckets
from data_pipelines.documents import Document, write_shards
from data_pipelines.stages import exact
from data_pipelines.stages.texts import Texts
from slmjax.config import ExactDedupConfig, LengthFilterConfig

fuzzed = settings(deadline=None, max_examples=40)
fuzzed_on_disk = settings(deadline=None, max_examples=10)


def kept(texts: list[str], **config) -> list[int | None]:
    """For each document the number of the one kept instead."""
    with tempfile.TemporaryDirectory() as folder:
        shards = write_corpus(Path(folder), texts, shard_bytes=config.pop("shard_bytes", 40))
        found = decide(Path(folder), shards, {"exact_dedup": ExactDedupConfig(**config)}, worker_bytes=2000)
    assert all((row.reason == "") == (row.duplicate_of is None) for row in found)
    return [None if row.duplicate_of is None else int(row.duplicate_of) for row in found]


@fuzzed_on_disk
@given(
    texts=st.lists(st.text("aAbB \n\tÄä\u3000🙂", max_size=4), min_size=1, max_size=30),
    survivor=st.sampled_from(["first", "longest"]),
    shard_bytes=st.integers(10, 60),
)
def test_one_of_equal_documents_is_kept(texts, survivor, shard_bytes):
    def plain(text: str) -> str:
        return "".join(text.lower().split())

    def order(i: int) -> tuple[int, int]:
        return (-len(texts[i].encode()) if survivor == "longest" else 0, i)

    expected = []
    for i, text in enumerate(texts):
        best = min((j for j in range(len(texts)) if plain(texts[j]) == plain(text)), key=order)
        expected.append(None if best == i else best)
    assert kept(texts, survivor=survivor, shard_bytes=shard_bytes) == expected


@fuzzed
@given(st.lists(st.text("aAzZ1. \n\t\x1f\x85\xa0Ääß\u3000日🙂𐐀𐐨\U000e0041", max_size=30), max_size=5))
def test_digests_are_of_the_text_without_letter_case_and_white_space(texts):
    plain = ["".join(text.lower().split()).encode() for text in texts]
    expected = [hashlib.sha256(content).digest()[:16] for content in plain]
    assert exact.measure(Texts.of(texts))["digest"].to_pylist() == expected


@fuzzed
@given(
    counts=st.lists(st.lists(st.integers(0, 3), max_size=8), min_size=1, max_size=4),
    num_buckets=st.integers(1, 5),
)
def test_buckets_give_back_what_was_written(counts, num_buckets):
    with tempfile.TemporaryDirectory() as folder:
        for i, values in enumerate(counts):
            places = np.array(values, np.int64) % num_buckets
            payloads = [bytes([value]) * value for value in values]
            buckets.write(Path(folder, str(i)), np.array(values, "<u4"), places, num_buckets, payloads)
        for i, values in enumerate(counts):
            reader = buckets.Reader(Path(folder, str(i)), np.dtype("<u4"), num_buckets)
            for bucket in range(num_buckets):
                here = [value for value in values if value % num_buckets == bucket]
                assert reader.records(bucket).tolist() == here
                assert reader.payloads(reader.numbers(bucket)) == [bytes([value]) * value for value in here]


def test_keys_spread_evenly_and_in_range():
    rng = np.random.default_rng(0)
    places = buckets.spread(rng.integers(0, 2**64, 10_000, dtype=np.uint64), 7)
    counts = np.bincount(places, minlength=7)
    assert len(counts) == 7
    assert counts.min() > 1200  # 1429 expected, standard deviation 35
    assert buckets.spread(np.array([0, 2**64 - 1], np.uint64), 7).tolist() == [0, 6]
    assert [buckets.number(n, 800) for n in (0, 1, 100, 101, 1000)] == [1, 1, 1, 2, 10]


def test_the_best_score_is_kept_and_a_missing_one_is_the_worst(tmp_path):
    shards = write_corpus(tmp_path, ["a", "b", "A", "b ", "a", "c"], shard_bytes=2)
    write_scores(tmp_path, shards, [0.1, None, 0.7, -5.0, 0.7, float("nan")])
    found = decide(tmp_path, shards, {"exact_dedup": ExactDedupConfig(survivor="best", score="rating.score")})
    assert [row.duplicate_of for row in found] == ["2", "3", None, None, "2", None]


def test_a_score_that_is_not_there_is_an_error(tmp_path):
    shards = write_corpus(tmp_path, ["a"])
    stage = ExactDedupConfig(survivor="best", score="rating.stars")
    with pytest.raises(ValueError, match=r"score names the stage 'rating', but before it are only \['length_filter'\]"):
        deduplicate.check({"length_filter": LengthFilterConfig(), "exact_dedup": stage})
    write_scores(tmp_path, shards, [1.0])
    with pytest.raises(ValueError, match=r"score = 'rating.stars' must be '<stage>.<attribute>' of an earlier stage"):
        decide(tmp_path, shards, {"exact_dedup": stage})
    with pytest.raises(ValueError, match="score goes with survivor = 'best'"):
        ExactDedupConfig(score="rating.score")
    with pytest.raises(ValueError, match=r"score must be '<stage>\.<attribute>'"):
        ExactDedupConfig(survivor="best", score="score")


def test_ids_are_compared_as_they_are(tmp_path):
    documents = [Document(id=name, key="", text=text) for name, text in zip("xXyx", ["1", "1", "2", "3"], strict=True)]
    directory = tmp_path / "work" / "read"
    shards = list(write_shards(documents, directory, prefix="0", source="test", shard_bytes=1))
    found = decide(tmp_path, shards, {"unique_ids": ExactDedupConfig(by="id")})
    assert [row.reason for row in found] == ["", "", "", "unique_ids.duplicate_id"]


def test_documents_that_were_dropped_keep_nobody_out(tmp_path):
    texts = ["same  ", "same", "other", "same"]
    shards = write_corpus(tmp_path, texts, shard_bytes=6)
    named = {"exact_dedup": ExactDedupConfig(survivor="longest"), "exact_dedup_2": ExactDedupConfig()}
    found = decide(tmp_path, shards, named)
    assert [row.reason for row in found] == ["", "exact_dedup.duplicate", "", "exact_dedup.duplicate"]
    assert [row.duplicate_of for row in found] == [None, "0", None, "0"]


def test_documents_of_an_earlier_corpus_are_kept_in_place_of_ours(tmp_path):
    against = (
        earlier_corpus(tmp_path / "first", {"old/a": "Same", "old/b": "elsewhere"}),
        earlier_corpus(tmp_path / "second", {"older/c": "third"}),
    )
    shards = write_corpus(tmp_path / "new", ["much  longer", "same", "third", "SAME   "], shard_bytes=5)
    stage = ExactDedupConfig(survivor="longest", against=against)
    found = decide(tmp_path / "new", shards, {"exact_dedup": stage})
    assert [row.duplicate_of for row in found] == [None, "old/a", "older/c", "old/a"]
    # Another corpus in its place is noticed.
    earlier_corpus(tmp_path / "second", {"older/c": "fourth"})
    found = decide(tmp_path / "new", shards, {"exact_dedup": stage})
    assert [row.duplicate_of for row in found] == [None, "old/a", None, "old/a"]


def test_an_earlier_corpus_must_be_one(tmp_path):
    shards = write_corpus(tmp_path / "new", ["a"])
    for path in (tmp_path / "nothing", tmp_path / "new"):
        stage = ExactDedupConfig(against=(str(path),))
        with pytest.raises(ValueError, match="must be the output directory of another pipeline that has finished"):
            decide(tmp_path / "new", shards, {"exact_dedup": stage})


def test_what_passes_between_tasks_is_removed(tmp_path):
    shards = write_corpus(tmp_path, ["a", "b", "a"], shard_bytes=1)
    decide(tmp_path, shards, {"exact_dedup": ExactDedupConfig()})
    assert not (tmp_path / "work/shuffle").exists()
    assert not (tmp_path / "work/markers/shuffle").exists()
    # And where a run was killed before it could.
    (tmp_path / "work/shuffle/exact_dedup").mkdir(parents=True)
    decide(tmp_path, shards, {"exact_dedup": ExactDedupConfig()})
    assert not (tmp_path / "work/shuffle").exists()
