"""Scores of single documents against the evaluation of a store that holds the same ones."""

import dataclasses
import math

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from trained_run import TEXTS, make_trained_run
from typer.testing import CliRunner

from slmjax import cli, model
from slmjax.config import EvalSetConfig, InfluenceConfig, TargetConfig, TokenSourceConfig
from slmjax.evaluate.documents import DocumentScorer
from slmjax.evaluate.influence import InfluenceScorer
from slmjax.evaluate.likelihood import evaluate_set
from slmjax.train.restore import load_run, params_sha256


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_trained_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def scorer(run):
    return DocumentScorer(run)


def test_scores_add_up_to_those_of_a_store(run, scorer):
    loaded = load_run(run)
    source = TokenSourceConfig(path=str(run.input.stages[0].sources[0].path).replace("train", "held_out"), rows="whole")
    expected = evaluate_set(
        loaded.params,
        run.model,
        EvalSetConfig(name="text", source=source),
        execution=run.execution,
        batch_size=2,
        sequence_length=run.input.sequence_length,
    )
    scores = scorer.score(TEXTS[30:])
    assert scores["tokens"].sum() == expected.tokens
    nats = scores["loss"] * scores["tokens"]
    assert nats.sum() / expected.tokens == pytest.approx(expected.loss, rel=1e-5)
    sizes = np.array([len(text) for text in TEXTS[30:]])
    assert scores["bits_per_byte"] == pytest.approx(nats / math.log(2) / sizes)
    assert (scores["bits_per_byte"] * sizes).sum() / sizes.sum() == pytest.approx(expected.bits_per_byte, rel=1e-5)


def test_a_score_does_not_depend_on_what_else_is_scored(scorer):
    long = "\n".join(TEXTS)  # many windows
    texts = [*TEXTS[:5], long, "", "x", "\u65e5\u672c"]
    together = scorer.score(texts)
    for i, text in enumerate(texts):
        alone = scorer.score([text])
        assert alone["tokens"] == together["tokens"][i]
        assert alone["loss"] == pytest.approx(together["loss"][i], rel=1e-5)
    assert np.isfinite(together["loss"]).all()
    assert together["tokens"][6] == 1  # the end of the empty text
    assert {name: values.tolist() for name, values in scorer.score([]).items()} == {
        "loss": [],
        "bits_per_byte": [],
        "tokens": [],
    }


def test_windows_of_a_long_text_do_not_see_each_other(scorer, run):
    """A text of one and a half rows against its two halves, scored position by position from the model's own logits."""
    loaded, length = load_run(run), run.input.sequence_length
    text = "\n".join(TEXTS)
    ids = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode(text)][: 3 * length // 2]
    text = loaded.tokenizer.decode(ids[1:])
    assert loaded.tokenizer.encode(text) == ids[1:]
    ids.append(loaded.tokenizer.eos_id)
    nats = 0.0
    for start in (0, length):
        window = np.array([ids[start : start + length + 1]])
        hidden = model.apply(loaded.params, run.model, window[:, :-1], execution=run.execution).hidden_BTD
        scores = jax.nn.log_softmax(model.logits(loaded.params, run.model, hidden))
        nats -= float(np.take_along_axis(np.asarray(scores), window[:, 1:, None], axis=2).sum())
    assert scorer.score([text])["loss"][0] * (len(ids) - 1) == pytest.approx(nats, rel=1e-5)


def test_the_identity_is_that_of_the_parameters(run, scorer):
    assert scorer.identity == DocumentScorer(run, batch_size=16).identity
    assert scorer.identity != DocumentScorer(run, step=10).identity
    longer = dataclasses.replace(run.input, sequence_length=128)
    assert scorer.identity != DocumentScorer(dataclasses.replace(run, input=longer)).identity
    params = load_run(run).params
    changed = jax.tree.map(lambda leaf: leaf, params)
    first, *_ = jax.tree.leaves(changed)
    assert params_sha256(changed) == params_sha256(params)
    swapped = jax.tree.map(lambda leaf: leaf + 1e-3 if leaf is first else leaf, changed)
    assert params_sha256(swapped) != params_sha256(params)


@pytest.mark.parametrize("size", [0, -3])
def test_a_size_that_is_none_is_refused(run, size):
    influence = InfluenceConfig(targets=(TargetConfig(name="t", path="x"),))
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {size}"):
        DocumentScorer(run, batch_size=size)
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {size}"):
        InfluenceScorer(run, influence, {"t": []}, batch_size=size)


def test_several_processes_are_refused(run, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="scored by one process, got 2"):
        DocumentScorer(run)


def test_the_verb_writes_scores_that_a_pipeline_can_read(run, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.data, "start_jax", lambda: None)
    monkeypatch.setattr(cli.data, "load_run", lambda files, overrides: type("Loaded", (), {"config": run}))
    (tmp_path / "documents").mkdir()
    for name, texts in (("a", TEXTS[:3]), ("b", [])):
        ids = pa.array([f"{name}{i}" for i in range(len(texts))], pa.string())
        table = pa.table({"id": ids, "text": pa.array(texts, pa.string())})
        pq.write_table(table, tmp_path / "documents" / f"{name}.parquet")
    arguments = ["data", "score", "run.gin", "--documents", tmp_path / "documents", "--output", tmp_path / "scores"]
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0
    rows = pq.read_table(tmp_path / "scores/a.parquet").to_pylist()
    assert [row["id"] for row in rows] == ["a0", "a1", "a2"]
    assert [row["loss"] for row in rows] == pytest.approx(DocumentScorer(run).score(TEXTS[:3])["loss"], rel=1e-5)
    assert pq.read_table(tmp_path / "scores/b.parquet").column_names == ["id", "loss", "bits_per_byte", "tokens"]
