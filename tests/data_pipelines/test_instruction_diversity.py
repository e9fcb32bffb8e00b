"""Orders by diversity against the plain quadratic algorithm, with any memory, and as scores that a pipeline reads."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from data_pipelines.quality import diversity, document_vectors, targets
from data_pipelines.run import run
from slmjax import cli
from slmjax.config import (
    ConversationFilesSourceConfig,
    DiversityConfig,
    InfluenceConfig,
    PipelineConfig,
    QualityFilterConfig,
    ScoreFilesConfig,
    SplitConfig,
    TargetConfig,
    TrainTokenizerConfig,
)

QUIET = Console(file=io.StringIO())


def unit(values):
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def plain_k_centre(values, most, min_distance):
    """All distances in a table of exact integers, and every step from the definition."""
    values = values.astype(object)
    lengths = np.sqrt(np.array([(row * row).sum() for row in values], np.float64))
    dots = np.array([[(a * b).sum() for b in values] for a in values], np.float64)
    table = np.maximum(1.0 - dots / (lengths[:, None] * lengths), 0.0)
    total = values.sum(axis=0).astype(np.float64)
    mean = document_vectors.quantise(total[None])[0].astype(object)
    to_mean = 1.0 - np.array([(row * mean).sum() for row in values], np.float64) / (
        lengths * np.sqrt(float((mean * mean).sum()))
    )
    chosen, distances = [int(np.argmin(np.maximum(to_mean, 0.0)))], [2.0]
    while len(chosen) < most:
        left = [i for i in range(len(values)) if i not in chosen]
        nearest = [min(table[i, j] for j in chosen) for i in left]
        if not left or max(nearest) < min_distance:
            break
        distances.append(max(nearest))
        chosen.append(left[int(np.argmax(nearest))])
    return chosen, distances


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 25), st.integers(1, 30), st.sampled_from([0.0, 0.3, 1.5]), st.integers(1, 9)
)
def test_k_centre_is_the_plain_algorithm_with_any_memory(seed, number, most, min_distance, rows):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(number, 4))
    values[rng.integers(0, number, number // 3)] = values[0]  # equals: the first one is chosen
    quantised = document_vectors.quantise(values)
    expected, distances = plain_k_centre(quantised, min(most, number), min_distance)
    for worker_bytes in (1 << 20, 8 * 4 * rows):
        vectors = document_vectors.Vectors(quantised, worker_bytes)
        found = diversity.k_centre(vectors, max_documents=most, min_distance=min_distance)
        assert found.number == len(expected)
        assert np.argsort(found.order, kind="stable")[: len(expected)].tolist() == expected
        assert found.distance[expected].tolist() == distances
        left = np.setdiff1d(np.arange(number), expected)
        assert (found.order[left] == len(expected) + 1).all()
        if len(left):
            assert found.distance[left].max() <= distances[-1]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 25), st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([None, 3]))
def test_score_first_is_the_plain_algorithm(seed, number, min_distance, most):
    rng = np.random.default_rng(seed)
    quantised = document_vectors.quantise(rng.normal(size=(number, 3)))
    scores = rng.integers(0, 4, number).astype(np.float64)
    vectors = document_vectors.Vectors(quantised, 100)
    found = diversity.by_score(vectors, scores, max_documents=most, min_distance=min_distance)
    chosen = []
    for i in sorted(range(number), key=lambda i: (-scores[i], i)):
        if len(chosen) < (most or number):
            near = min((vectors.distances(vectors.row(j))[i] for j in chosen), default=2.0)
            assert found.distance[i] == near
            if near >= min_distance:
                chosen.append(i)
    assert np.argsort(found.order, kind="stable")[: found.number].tolist() == chosen


def test_vectors_are_rounded_unit_vectors():
    values = np.random.default_rng(0).normal(size=(50, 64)) * 100
    quantised = document_vectors.quantise(values)
    vectors = document_vectors.Vectors(quantised, 1 << 20)
    expected = 1 - unit(values) @ unit(values)[3]
    np.testing.assert_allclose(vectors.distances(vectors.row(3)), expected, atol=1e-3)
    nothing = document_vectors.Vectors(document_vectors.quantise(np.zeros((2, 3))), 1 << 20)
    assert nothing.distances(nothing.row(0)).tolist() == [0.0, 0.0]


def test_what_has_no_words_comes_last_and_hides_nothing():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(6, 4))
    whole = diversity.k_centre(
        document_vectors.Vectors(document_vectors.quantise(values), 1 << 20), max_documents=None, min_distance=0.0
    )
    with_zeros = document_vectors.quantise(np.insert(values, [0, 3], 0.0, axis=0))
    zeros, others = [0, 4], [1, 2, 3, 5, 6, 7]
    for worker_bytes in (1 << 20, 64):
        vectors = document_vectors.Vectors(with_zeros, worker_bytes)
        found = diversity.k_centre(vectors, max_documents=None, min_distance=0.0)
        assert found.order[others].tolist() == whole.order.tolist()
        assert found.distance[others].tolist() == whole.distance.tolist()
        assert found.order[zeros].tolist() == [7, 8]
        assert found.distance[zeros].tolist() == [0.0, 0.0]
    first = np.arange(8.0)[::-1]  # the best score has no words
    chosen = diversity.by_score(vectors, first, max_documents=None, min_distance=0.01)
    assert chosen.order[[0, 1, 2, 3]].tolist() == [1, 2, 3, 4]
    assert chosen.order[4] == chosen.number + 1 == 8


TOPICS = ("river boat water fish", "engine wheel motor car", "violin concert opera tune")


def write_documents(directory, *, per_topic=6):
    """Two shards of conversations; those of a topic share most words. Returns {id: topic}."""
    directory.mkdir(parents=True)
    topics, rows = {}, []
    for i in range(3 * per_topic):
        topic = i % 3 if i < 12 else 0
        name = f"d{(i * 7) % 50:02d}"
        topics[name] = topic
        question = f"{TOPICS[topic]} {TOPICS[topic]} number {i}"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": f"answer {i % 2}"}]
        rows.append({"id": name, "text": f"{question}\n\nanswer {i % 2}", "messages": messages})
    for number, part in enumerate((rows[:10], rows[10:])):
        pq.write_table(pa.Table.from_pylist(part), directory / f"0000{number}.parquet")
    return topics


def read_order(directory):
    rows = [row for path in sorted(Path(directory).glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    return {row["id"]: (row["order"], row["distance"]) for row in rows}


@pytest.mark.parametrize("text", ["all", "question"])
def test_hashed_words_tell_topics_apart(tmp_path, text):
    topics = write_documents(tmp_path / "documents")
    config = DiversityConfig(
        documents=str(tmp_path / "documents"), output_dir=str(tmp_path / "order"), text=text, max_documents=5
    )
    diversity.write_order(config, console=QUIET)
    found = read_order(tmp_path / "order")
    assert found.keys() == topics.keys()
    first = sorted(found, key=lambda name: found[name][0])[:3]
    assert {topics[name] for name in first} == {0, 1, 2}
    assert sorted(order for order, _ in found.values()) == [1, 2, 3, 4, 5] + [6] * 13
    distances = [found[name][1] for name in sorted(found, key=lambda name: found[name][0])[:5]]
    assert distances == sorted(distances, reverse=True)

    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "order").glob("*.parquet")}
    diversity.write_order(dataclasses.replace(config, worker_bytes=1), console=QUIET)  # nothing is done again
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "order").glob("*.parquet")}
    again = dataclasses.replace(config, worker_bytes=1, output_dir=str(tmp_path / "again"))
    diversity.write_order(again, console=QUIET)
    assert [path.read_bytes() for path in sorted((tmp_path / "again").glob("*.parquet"))] == [
        path.read_bytes() for path in sorted((tmp_path / "order").glob("*.parquet"))
    ]


def write_embeddings(directory, documents, vector_of):
    directory.mkdir()
    for path in documents.glob("*.parquet"):
        ids = pq.read_table(path, columns=["id"]).column("id").to_pylist()[::-1]  # in another order
        values = pa.array(np.array([vector_of(name) for name in ids], np.float32).reshape(-1))
        table = pa.table({"id": ids, "embedding": pa.FixedSizeListArray.from_arrays(values, 3)})
        pq.write_table(table, directory / path.name)


def test_embeddings_and_scores_from_files(tmp_path):
    topics = write_documents(tmp_path / "documents")
    number = {name: i for i, name in enumerate(sorted(topics))}

    def vector_of(name):
        return np.eye(3)[topics[name]] + 0.001 * number[name]

    write_embeddings(tmp_path / "embedding", tmp_path / "documents", vector_of)
    config = DiversityConfig(
        documents=str(tmp_path / "documents"),
        output_dir=str(tmp_path / "order"),
        embeddings=str(tmp_path / "embedding"),
        min_distance=0.5,
    )
    diversity.write_order(config, console=QUIET)
    found = read_order(tmp_path / "order")
    assert {topics[name] for name in found if found[name][0] <= 3} == {0, 1, 2}
    assert max(order for order, _ in found.values()) == 4

    (tmp_path / "scores").mkdir()
    for path in (tmp_path / "documents").glob("*.parquet"):
        ids = pq.read_table(path, columns=["id"]).column("id").to_pylist()
        pq.write_table(
            pa.table({"id": ids, "ifd": [number[name] / 7 for name in ids]}), tmp_path / "scores" / path.name
        )
    scored = dataclasses.replace(
        config,
        method="score_first",
        scores=ScoreFilesConfig(path=str(tmp_path / "scores"), column="ifd"),
        output_dir=str(tmp_path / "best"),
    )
    diversity.write_order(scored, console=QUIET)
    best = read_order(tmp_path / "best")
    wanted = {topic: max((n for n in topics if topics[n] == topic), key=number.__getitem__) for topic in range(3)}
    assert {name for name in best if best[name][0] <= 3} == set(wanted.values())


def test_what_is_missing_is_named(tmp_path):
    write_documents(tmp_path / "documents")
    config = DiversityConfig(documents=str(tmp_path / "documents"), output_dir=str(tmp_path / "order"))
    with pytest.raises(ValueError, match="has no parquet files"):
        diversity.write_order(dataclasses.replace(config, documents=str(tmp_path / "none")), console=QUIET)
    with pytest.raises(ValueError, match="directory of its own"):
        diversity.write_order(dataclasses.replace(config, output_dir=str(tmp_path / "documents")), console=QUIET)
    with pytest.raises(ValueError, match=r"no embeddings for the documents of 00000.parquet"):
        diversity.write_order(dataclasses.replace(config, embeddings=str(tmp_path)), console=QUIET)
    write_embeddings(tmp_path / "embedding", tmp_path / "documents", lambda name: np.ones(3))
    path = tmp_path / "embedding" / "00001.parquet"
    pq.write_table(pq.read_table(path).slice(2), path)
    with pytest.raises(ValueError, match="has no embedding of 2 documents, the first one d"):
        diversity.write_order(dataclasses.replace(config, embeddings=str(tmp_path / "embedding")), console=QUIET)
    assert not (tmp_path / "order/work/vectors").exists()
    table = pq.read_table(tmp_path / "documents/00000.parquet")
    pq.write_table(table, tmp_path / "documents/00002.parquet")
    with pytest.raises(ValueError, match="two documents have the id"):
        diversity.write_order(config, console=QUIET)
    broken = tmp_path / "broken"
    broken.mkdir()
    config = dataclasses.replace(config, documents=str(broken))
    for content, message in (
        ({"id": ["a", "b"], "text": ["x", None]}, "document b has no text"),
        ({"id": ["a"], "text": [3]}, "texts must be strings, got int64"),
        ({"text": ["x"]}, "has no column id"),
    ):
        pq.write_table(pa.table(content), broken / "0.parquet")
        with pytest.raises(ValueError, match=rf"0\.parquet.* {message}"):
            diversity.write_order(config, console=QUIET)
    pq.write_table(pa.table({"id": ["a7"], "messages": ["x"]}), broken / "0.parquet")
    with pytest.raises(ValueError, match=r"0\.parquet: document a7: messages must be a list"):
        diversity.write_order(dataclasses.replace(config, text="question"), console=QUIET)
    (broken / "0.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"0\.parquet is not parquet, or is damaged"):
        diversity.write_order(config, console=QUIET)
    with pytest.raises(ValueError, match="scores goes with method = 'score_first'"):
        dataclasses.replace(config, method="score_first")


def test_a_pipeline_selects_by_the_order(tmp_path):
    rows = [{"question": f"{TOPICS[i % 3]} {TOPICS[i % 3]} {i}?", "answer": f"It is {i}."} for i in range(12)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    config = PipelineConfig(
        output_dir=str(tmp_path / "all"),
        sources=(ConversationFilesSourceConfig(paths=(str(tmp_path / "talks.jsonl"),)),),
        tokenizer=TrainTokenizerConfig(vocab_size=340),
        split=SplitConfig(held_out_fraction=0.0),
        num_workers=1,
    )
    run(config, console=QUIET)
    (tmp_path / "order.gin").write_text(
        f'DiversityConfig.documents = "{tmp_path}/all/documents"\nDiversityConfig.output_dir = "{tmp_path}/order"\n'
    )
    done = CliRunner().invoke(cli.app, ["data", "diversity", str(tmp_path / "order.gin")], catch_exceptions=False)
    assert done.exit_code == 0
    selected = QualityFilterConfig(scorer=ScoreFilesConfig(path=str(tmp_path / "order"), column="order"), max_score=3)
    run(dataclasses.replace(config, output_dir=str(tmp_path / "few"), stages=(selected,)), console=QUIET)
    kept = pq.read_table(next((tmp_path / "few/documents").iterdir())).to_pylist()
    assert {int(row["id"].rpartition("#")[2]) % 3 for row in kept} == {0, 1, 2}
    assert len(kept) == 3


def test_targets_are_conversations(tmp_path):
    write_documents(tmp_path / "documents")
    config = InfluenceConfig(
        targets=(TargetConfig(name="all", path=str(tmp_path / "documents"), max_documents=None),
                 TargetConfig(name="few", path=str(tmp_path / "documents"), max_documents=12))
    )  # fmt: skip
    found = targets.read_targets(config)
    assert [len(found[name]) for name in ("all", "few")] == [18, 12]
    assert found["all"][:12] == found["few"]
    assert found["few"][0][0]["content"].startswith(TOPICS[0])
    pq.write_table(pa.table({"id": ["x"], "text": ["y"]}), tmp_path / "documents/00009.parquet")
    with pytest.raises(ValueError, match="has no column messages; it holds no conversations, which a target needs"):
        targets.read_targets(config)
    asked = [{"role": "user", "content": "and?"}]
    table = pa.table({"id": ["x7"], "text": ["and?"], "messages": [asked]})
    pq.write_table(table, tmp_path / "documents/00000.parquet")
    with pytest.raises(ValueError, match=r"00000\.parquet: document x7: the conversation has no assistant message"):
        targets.read_targets(config)
    none = InfluenceConfig(targets=(TargetConfig(name="none", path=str(tmp_path / "none")),))
    with pytest.raises(ValueError, match=r"target 'none': .* has no parquet files"):
        targets.read_targets(none)
