import math

import jax
import numpy as np
import pytest

from slmjax import config as c
from slmjax import model
from slmjax.data.token_store import TokenStoreWriter
from slmjax.evaluate.likelihood import evaluate_all, evaluate_set
from slmjax.parallel.mesh import make_mesh
from slmjax.parallel.rules import tree_shardings

V = 32
MODEL = c.ModelConfig(
    vocab_size=V,
    width=16,
    pattern=(
        c.LayerConfig(
            mixer=c.AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, rope=c.RopeConfig()),
            feed_forward=c.FeedForwardConfig(hidden=32),
            norm=c.RMSNormConfig(),
        ),
    ),
    repeats=2,
    final_norm=c.RMSNormConfig(),
    logit_scale=2.0,
    logit_softcap=5.0,
    init=c.InitConfig(std=0.3),
)
EXECUTION = c.ExecutionConfig(loss_chunk_tokens=64)
PARAMS = model.init(jax.random.key(0), MODEL)
# Sums in float32 within a row, of at most 64 values near 3.
TOLERANCE = 2e-6


def write_store(path, *, weights=False, lengths=(9, 2, 30, 17, 5, 21)):
    rng = np.random.default_rng(0)
    documents = []
    with TokenStoreWriter(
        path, tokenizer_sha256="0" * 64, vocab_size=V, config_sha256="1" * 64, with_weights=weights
    ) as writer:
        for length in lengths:
            ids = rng.integers(4, V, length)
            learned = rng.integers(0, 2, length) if weights else np.ones(length, int)
            writer.add(ids, 3 * length, learned if weights else None)
            documents.append((ids, learned))
    return documents


@jax.jit
def log_probabilities_of(tokens_BT):
    hidden_BTD = model.apply(PARAMS, MODEL, tokens_BT).hidden_BTD
    return jax.nn.log_softmax(model.logits(PARAMS, MODEL, hidden_BTD))


def expected(documents):
    """Nats and tokens, each document in a row of its own, each token after all before it in its document."""
    rows_BT = np.zeros((6, 40), np.int32)  # what stands behind a document changes nothing in it
    for row, (ids, _) in zip(rows_BT, documents, strict=True):
        row[: len(ids)] = ids
    log_probabilities_BTV = np.asarray(log_probabilities_of(rows_BT), np.float64)
    nll, tokens = 0.0, 0
    for row, (ids, learned) in enumerate(documents):
        for i in range(1, len(ids)):
            nll -= learned[i] * log_probabilities_BTV[row, i - 1, ids[i]]
            tokens += int(learned[i])
    return nll, tokens


def eval_set(path, **fields):
    rows = fields.pop("rows", "stream")
    return c.EvalSetConfig(name="set", source=c.TokenSourceConfig(path=str(path), rows=rows), **fields)


def evaluate(path, *, batch_size=4, sequence_length=128, mesh=None, params=PARAMS, **fields):
    return evaluate_set(
        params,
        MODEL,
        eval_set(path, **fields),
        execution=EXECUTION,
        batch_size=batch_size,
        sequence_length=sequence_length,
        mesh=mesh,
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluate") / "store"
    return path, write_store(path)


def test_packed_rows_give_what_single_documents_give(store):
    path, documents = store
    nll, tokens = expected(documents)
    result = evaluate(path)
    assert result.tokens == tokens == 84 - 6
    assert result.bytes == 3 * 84
    assert math.isclose(result.loss, nll / tokens, rel_tol=TOLERANCE)
    assert math.isclose(result.perplexity, math.exp(nll / tokens), rel_tol=10 * TOLERANCE)
    assert math.isclose(result.bits_per_byte, nll / math.log(2) / (3 * 84), rel_tol=TOLERANCE)


def test_result_does_not_depend_on_the_batch_size(store):
    results = [evaluate(store[0], sequence_length=16, batch_size=size) for size in (1, 4)]
    assert results[0].tokens == results[1].tokens
    assert math.isclose(results[0].loss, results[1].loss, rel_tol=TOLERANCE)


def test_stride_scores_each_token_once_with_more_context(store):
    path, documents = store
    nll, tokens = expected(documents)
    whole = evaluate(path)
    cut = evaluate(path, sequence_length=32)
    overlapping = evaluate(path, sequence_length=32, stride=1)
    assert whole.tokens == cut.tokens == overlapping.tokens == tokens
    # Each row of stride 1 scores a token after the 31 before it, which is all that a document here has.
    assert math.isclose(overlapping.loss, nll / tokens, rel_tol=TOLERANCE)
    assert not math.isclose(cut.loss, nll / tokens, rel_tol=100 * TOLERANCE)


def test_without_isolation_documents_see_each_other(store):
    path, _ = store
    isolated = evaluate(path)
    merged = evaluate_set(
        PARAMS,
        MODEL,
        eval_set(path),
        execution=EXECUTION,
        batch_size=4,
        sequence_length=128,
        document_isolation=False,
    )
    assert merged.tokens == isolated.tokens
    assert not math.isclose(merged.loss, isolated.loss, rel_tol=100 * TOLERANCE)


def test_only_learned_tokens_count(tmp_path):
    documents = write_store(tmp_path / "store", weights=True)
    nll, tokens = expected(documents)
    result = evaluate(tmp_path / "store", rows="whole")
    assert result.tokens == tokens
    assert math.isclose(result.loss, nll / tokens, rel_tol=TOLERANCE)


def test_a_set_with_nothing_to_score_is_an_error(tmp_path):
    write_store(tmp_path / "store", lengths=(1, 1, 1))
    with pytest.raises(ValueError, match="has no token to score"):
        evaluate(tmp_path / "store")


def test_a_ruined_model_has_no_perplexity(store):
    ruined = evaluate(store[0], params=jax.tree.map(lambda leaf: leaf * np.nan, PARAMS))
    assert math.isnan(ruined.loss)
    assert math.isnan(ruined.perplexity)


@pytest.mark.multidevice
@pytest.mark.parametrize("mesh_config", [c.MeshConfig(data=8, fsdp=1), c.MeshConfig(data=2, fsdp=4)])
def test_sharded_is_unsharded(store, mesh_config):
    mesh = make_mesh(mesh_config)
    params = jax.tree.map(jax.device_put, PARAMS, tree_shardings(model.specs(MODEL), mesh))
    alone = evaluate(store[0], sequence_length=16, batch_size=3)
    sharded = evaluate(store[0], sequence_length=16, batch_size=3, mesh=mesh, params=params)
    assert sharded.tokens == alone.tokens
    assert math.isclose(sharded.loss, alone.loss, rel_tol=TOLERANCE)


def test_all_sets_of_a_run(store, tmp_path):
    write_store(tmp_path / "other", lengths=(40, 3))
    source = c.TokenSourceConfig(path=str(store[0]))
    other = c.EvalSetConfig(name="other", source=c.TokenSourceConfig(path=str(tmp_path / "other")))
    run = c.RunConfig(
        output_dir=str(tmp_path),
        steps=1,
        model=MODEL,
        input=c.InputConfig(
            tokenizer="", stages=(c.MixtureStageConfig(sources=(source,)),), batch_size=2, sequence_length=128
        ),
        optimizer=c.AdamWConfig(peak_lr=1e-3),
        schedule=c.ConstantScheduleConfig(),
        checkpoint=c.CheckpointConfig(every_steps=1),
        execution=EXECUTION,
        evaluation=c.EvaluationConfig(sets=(c.EvalSetConfig(name="a", source=source), other), batch_size=4),
    )
    metrics = evaluate_all(PARAMS, run)
    scores = ("loss", "perplexity", "bits_per_byte")
    assert list(metrics) == [f"{name}/{score}" for name in ("a", "other") for score in scores]
    assert metrics["a/loss"] == evaluate(store[0]).loss
    with pytest.raises(ValueError, match="written with the tokenizer"):
        evaluate_all(PARAMS, run, tokenizer_sha256="f" * 64)
