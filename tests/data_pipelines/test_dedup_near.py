"""Near duplicates: planted ones are found as the theory says, and what is dropped is truly similar to what is kept."""

import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from dedup_corpus import Verdict, decide, earlier_corpus, global_step, write_corpus, write_scores
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.deduplicate import connect, members, verify
from data_pipelines.deduplicate.corpus import Phases, PhaseTask
from data_pipelines.tasks import Done
from slmjax.config import ExactDedupConfig, NearDedupConfig

NUM_WORDS = 300


def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def similarity(a: str, b: str) -> float:
    """Jaccard, of sets of strings."""
    one, other = shingles(a), shingles(b)
    return len(one & other) / len(one | other)


def near(root: Path, texts, *, shard_bytes: int = 40_000, worker_bytes: int = 1 << 29, **config) -> list[Verdict]:
    shards = write_corpus(root, texts, shard_bytes=shard_bytes)
    return decide(root, shards, {"near_dedup": NearDedupConfig(**config)}, worker_bytes=worker_bytes)


def originals(found: list[Verdict]) -> list[str | None]:
    assert {row.reason for row in found} <= {"", "near_dedup.near_duplicate"}
    assert all((row.reason == "") == (row.duplicate_of is None) for row in found)
    return [row.duplicate_of for row in found]


def random_words(rng: np.random.Generator, num_words: int = NUM_WORDS) -> list[str]:
    return [f"w{word}" for word in rng.integers(0, 5000, num_words)]


def edited(rng: np.random.Generator, words: list[str], rate: float) -> list[str]:
    """Words replaced, left out and put in, a third each, at a rate of so many edits a word."""
    result = []
    for word in words:
        if rng.random() >= rate:
            result.append(word)
            continue
        kind = rng.integers(3)
        result += [[f"new{rng.integers(5000)}"], [], [word, f"new{rng.integers(5000)}"]][kind]
    return result


@pytest.mark.parametrize("rate", [0.01, 0.02, 0.03, 0.05, 0.1, 0.2])
def test_recall_and_precision_on_planted_near_duplicates(tmp_path, rate):
    """Recall is that of the curve over the similarities of the pairs; what is dropped is similar without exception."""
    rng = np.random.default_rng(int(rate * 100))
    num_pairs = 120
    pairs = [(words, edited(rng, words, rate)) for words in (random_words(rng) for _ in range(num_pairs))]
    texts = [" ".join(words) for pair in zip(*pairs, strict=True) for words in pair]
    found = originals(near(tmp_path, texts))
    config = NearDedupConfig()
    similarities = np.array([similarity(texts[i], texts[num_pairs + i]) for i in range(num_pairs)])
    chances = np.where(similarities >= config.similarity, 1 - (1 - similarities**config.rows) ** config.bands, 0.0)
    hits = sum(found[num_pairs + i] == str(i) for i in range(num_pairs))
    deviation = np.sqrt((chances * (1 - chances)).sum())
    assert abs(hits - chances.sum()) <= 4 * deviation
    assert all(
        similarity(texts[i], texts[int(original)]) >= config.similarity
        for i, original in enumerate(found)
        if original is not None
    )
    assert found[:num_pairs] == [None] * num_pairs


def chain(rng: np.random.Generator, length: int) -> list[str]:
    """Texts each like the one before and unlike the others: words drop out at the start and come at the end."""
    words, step = random_words(rng, 300 + 30 * length), 30
    return [" ".join(words[i * step : i * step + 300]) for i in range(length)]


def test_a_chain_of_similar_documents_does_not_drop_strangers(tmp_path):
    texts = chain(np.random.default_rng(5), 12)
    assert similarity(texts[0], texts[1]) > 0.8
    assert similarity(texts[0], texts[2]) < 0.7
    found = originals(near(tmp_path, texts, bands=60, rows=4))  # in such bands all neighbours meet
    assert found == [None if i % 2 == 0 else str(i - 1) for i in range(12)]


def test_strangers_that_share_bands_stay(tmp_path):
    """With one row a band, nearly everything is a candidate of everything, one cluster in all."""
    rng = np.random.default_rng(6)
    shared = random_words(rng, 150)
    texts = [" ".join(shared + random_words(rng, 150)) for _ in range(40)] + [" ".join(shared[:150])]
    found = originals(near(tmp_path, texts, bands=20, rows=1))
    assert found == [None] * 41
    found = originals(near(tmp_path, texts, bands=20, rows=1, similarity=0.3))
    assert found == [None] + ["0"] * 40


def test_many_copies_leave_one_whatever_the_pieces_are(tmp_path):
    rng = np.random.default_rng(7)
    base = random_words(rng)
    copies = [" ".join(edited(rng, base, 0.002)) for _ in range(60)]
    texts = [" ".join(random_words(rng)) for _ in range(20)] + copies
    order = rng.permutation(len(texts))
    first = int(np.flatnonzero(order >= 20)[0])
    expected = [None if i < 20 or place == first else str(first) for place, i in enumerate(order.tolist())]
    shuffled = [texts[i] for i in order]
    assert min(similarity(shuffled[first], text) for text in copies) > 0.9
    for number, (shard_bytes, worker_bytes) in enumerate([(10**6, 1 << 29), (3000, 1 << 29), (3000, 4000)]):
        root = tmp_path / str(number)
        assert originals(near(root, shuffled, shard_bytes=shard_bytes, worker_bytes=worker_bytes)) == expected


def test_which_one_is_kept(tmp_path):
    rng = np.random.default_rng(8)
    words = random_words(rng)
    texts = [" ".join(part) for part in (words[:290], [*words, "at", "the", "end"], words, random_words(rng))]
    assert originals(near(tmp_path / "first", texts)) == [None, "0", "0", None]
    assert originals(near(tmp_path / "longest", texts, survivor="longest")) == ["1", None, "1", None]
    shards = write_corpus(tmp_path / "best", texts, shard_bytes=3000)
    write_scores(tmp_path / "best", shards, [0.1, 0.2, 0.3, None])
    stage = NearDedupConfig(survivor="best", score="rating.score")
    assert originals(decide(tmp_path / "best", shards, {"near_dedup": stage})) == ["2", "2", None, None]


def test_documents_of_an_earlier_corpus_are_kept_in_place_of_ours(tmp_path):
    rng = np.random.default_rng(9)
    words, other = random_words(rng), random_words(rng)
    # Two that are alike in the earlier corpus are both kept there.
    against = earlier_corpus(tmp_path / "old", {"old/a": " ".join(words[:295]), "old/b": " ".join(words[:294])})
    texts = [" ".join(words), " ".join(other), " ".join(other[1:])]
    found = originals(near(tmp_path / "new", texts, survivor="longest", against=(against,)))
    assert found[0] in ("old/a", "old/b")
    assert found[1:] == [None, "1"]


def test_documents_that_were_dropped_keep_nobody_out(tmp_path):
    words = random_words(np.random.default_rng(10))
    texts = [" ".join(words), " ".join(words).upper(), " ".join(words[1:]), " ".join(words[1:]) + "."]
    shards = write_corpus(tmp_path, texts, shard_bytes=2000)
    found = decide(
        tmp_path, shards, {"exact_dedup": ExactDedupConfig(survivor="longest"), "near_dedup": NearDedupConfig()}
    )
    assert [row.reason for row in found] == ["", "exact_dedup.duplicate"] + ["near_dedup.near_duplicate"] * 2
    assert [row.duplicate_of for row in found] == [None, "0", "0", "0"]


def test_empty_and_short_documents_meet_only_their_equals(tmp_path):
    assert originals(near(tmp_path, ["a b", "A, b!", "a c", "", " ", "...", "...", "x"])) == [
        None, "0", None, None, None, None, None, None,
    ]  # fmt: skip


def test_no_more_comparisons_than_allowed(tmp_path):
    """The one that shares the most bands is compared first, so that one comparison finds a close duplicate."""
    rng = np.random.default_rng(11)
    shared = random_words(rng, 200)
    texts = [" ".join(shared + random_words(rng, 100)) for _ in range(30)]
    texts.append(" ".join([*texts[17].split(), "end"]))
    found = originals(near(tmp_path, texts, bands=20, rows=1, comparisons=1))
    assert found == [None] * 30 + ["17"]


def test_of_very_large_clusters_the_last_documents_are_remembered(tmp_path, monkeypatch):
    """What a bound on the memory for one cluster costs: copies of the forgotten stay."""
    rng = np.random.default_rng(12)
    shared = random_words(rng, 200)
    texts = [" ".join(shared + random_words(rng, 100)) for _ in range(4)]
    texts += [texts[3] + " end", texts[0] + " end"]
    monkeypatch.setattr(verify, "_REMEMBERED", 2)
    assert originals(near(tmp_path, texts, bands=20, rows=1)) == [None] * 4 + ["3", None]
    monkeypatch.undo()
    assert originals(near(tmp_path / "all", texts, bands=20, rows=1)) == [None] * 4 + ["3", "0"]


@settings(deadline=None, max_examples=60)
@given(st.sets(st.integers(0, 30)), st.sets(st.integers(0, 30)), st.floats(0, 1))
def test_similarity_is_that_of_sets(one, other, at_least):
    a, b = (np.array(sorted(values), np.uint32) for values in (one, other))
    if not one and not other:
        return
    expected = len(one & other) / len(one | other)
    assert verify.similarity(a, b) == expected
    bounded = verify.similarity(a, b, at_least=at_least)
    assert (bounded >= at_least) == (expected >= at_least)


@settings(deadline=None, max_examples=20)
@given(st.text(max_size=20), st.integers(0, 3), st.integers(0, 40))
def test_members_are_unpacked_as_they_were_packed(name, num_bands, num_ngrams):
    content = members.Content(
        name.encode(), np.arange(num_bands, dtype=np.uint64), np.arange(num_ngrams, dtype=np.uint32) << np.uint32(9)
    )
    again = members.Content.unpack(content.pack(), num_bands)
    assert again.id == content.id
    assert again.bands.tolist() == content.bands.tolist()
    assert again.ngrams.tolist() == content.ngrams.tolist()


NUM_NODES = 40


@settings(deadline=None, max_examples=12)
@given(
    edges=st.lists(st.tuples(st.integers(0, NUM_NODES - 1), st.integers(0, NUM_NODES - 1)), max_size=60)
    | st.integers(2, NUM_NODES).map(lambda n: [(i, i + 1) for i in range(n - 1)])  # a path takes the most rounds
    | st.permutations(range(NUM_NODES)).map(lambda order: list(itertools.pairwise(order))),
    num_buckets=st.integers(1, 4),
)
def test_components_are_those_of_union_find(edges, num_buckets):
    parents = list(range(NUM_NODES))

    def root(node: int) -> int:
        return node if parents[node] == node else root(parents[node])

    for a, b in edges:
        a, b = root(a), root(b)
        parents[max(a, b)] = min(a, b)
    sizes = np.bincount([root(node) for node in range(NUM_NODES)], minlength=NUM_NODES)
    expected = {node: root(node) for node in range(NUM_NODES) if sizes[root(node)] > 1}

    def write(task: PhaseTask) -> Done:
        pairs = np.array(edges, np.uint64).reshape(-1, 2)
        connect.write_edges(task.output, connect.join(pairs[:, 0], pairs[:, 1]), task.num_buckets)
        return task.finish({}, started=0.0)

    def read(task: PhaseTask) -> Done:
        labels = task.read(connect.LABEL)
        task.output.parent.mkdir(parents=True, exist_ok=True)
        task.output.write_bytes(b"")
        return task.finish({"labels": labels.tolist()}, started=0.0)

    with tempfile.TemporaryDirectory() as folder:
        shards = write_corpus(Path(folder), ["x"] * NUM_NODES, shard_bytes=30)
        with global_step(Path(folder), shards, "near_dedup") as step:
            phases = Phases(NearDedupConfig(), step, against=())
            start = phases.by_part("start", write, num_buckets=num_buckets)
            labels = phases.by_part("read", read, num_buckets=1, inputs=[connect.clusters(phases, [start])])
    found = [(node, cluster) for result in labels.results for node, cluster in result["labels"]]
    assert dict(found) == expected
    assert len(found) == len(expected)
