"""IFD, embeddings and influence of conversations, each against a slow reference for one example at a time."""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from trained_run import TEXTS, make_trained_run
from typer.testing import CliRunner

from slmjax import cli, model
from slmjax import config as c
from slmjax.data.batch import Batch
from slmjax.data.conversations import render
from slmjax.data.tokenizer import ASSISTANT
from slmjax.evaluate import adapter_gradients as adapters
from slmjax.evaluate.conversations import AnswerScorer
from slmjax.evaluate.embeddings import Embedder
from slmjax.evaluate.influence import InfluenceScorer
from slmjax.kernels.targets import compiling_for_hopper, on_hopper
from slmjax.optim.build import make_optimizer
from slmjax.train.checkpoint import Checkpointer
from slmjax.train.restore import load_adam_moments, load_run


def talk(*turns, system=None):
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    return ([{"role": "system", "content": system}] if system else []) + messages


TALKS = [
    talk("add 1", TEXTS[1]),
    talk("add 2", "x + 2"),
    talk("a", "b", "c", "return 7"),
    talk("say x", "x", system="be short"),
    talk("long " * 40, "def"),  # its answer lies beyond a row
    talk("long", "def add " * 20),  # of its answer a part does
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_trained_run(tmp_path_factory.mktemp("run"))


@functools.partial(jax.jit, static_argnums=0)
def states_of(config, params, ids_BT):
    hidden_BTD = model.apply(params, config, ids_BT).hidden_BTD
    return hidden_BTD[0], jax.nn.log_softmax(model.logits(params, config, hidden_BTD))[0]


def states(run, params, ids):
    """Hidden states and log-probabilities of one sequence; what follows does not matter, so one program does."""
    padded = np.zeros((1, run.input.sequence_length), np.int32)
    padded[0, : len(ids)] = ids
    hidden, log_p = states_of(run.model, params, padded)
    return np.asarray(hidden)[: len(ids)], np.asarray(log_p)[: len(ids)]


def plain_ifd(run, loaded, messages):
    """Straight from the definition, one sequence after the other."""
    tokenizer, length = loaded.tokenizer, run.input.sequence_length
    ids, learned = render(messages, tokenizer)
    ids, learned = ids[: length + 1], learned[: length + 1]
    _, log_p = states(run, loaded.params, ids[:-1])
    asked = [-float(log_p[i - 1, ids[i]]) for i in range(1, len(ids)) if learned[i]]
    alone, answer = [], []
    for i in range(len(ids) + 1):
        if i < len(ids) and learned[i]:
            answer.append(ids[i])
        elif answer:
            sequence = [tokenizer.bos_id, tokenizer.control_id(ASSISTANT), *answer]
            _, log_p = states(run, loaded.params, sequence[:-1])
            alone += [-float(log_p[j - 1, sequence[j]]) for j in range(2, len(sequence))]
            answer = []
    return asked, alone


def test_ifd_is_the_ratio_of_perplexities_with_and_without_the_question(run):
    loaded, scorer = load_run(run), AnswerScorer(run)
    scores = scorer.score(TALKS)
    for i, messages in enumerate(TALKS):
        asked, alone = plain_ifd(run, loaded, messages)
        assert scores["tokens"][i] == len(asked) == len(alone)
        if not asked:
            assert scores["ifd"][i] == scores["loss"][i] == scores["answer_loss"][i] == math.inf
            continue
        assert scores["loss"][i] == pytest.approx(np.mean(asked), rel=1e-5)
        assert scores["answer_loss"][i] == pytest.approx(np.mean(alone), rel=1e-5)
        assert scores["ifd"][i] == pytest.approx(math.exp(np.mean(asked)) / math.exp(np.mean(alone)), rel=1e-5)
    assert scores["tokens"][4] == 0
    assert 0 < scores["tokens"][5] < run.input.sequence_length
    assert {name: len(values) for name, values in scorer.score([]).items()} == dict.fromkeys(scores, 0)
    alone = [scorer.score([messages])["ifd"][0] for messages in TALKS]
    assert alone == pytest.approx(scores["ifd"].tolist(), rel=1e-5)


def test_embeddings_are_means_of_hidden_states(run):
    loaded, scorer = load_run(run), Embedder(run)
    long = "\n".join(TEXTS[:12])
    texts = [*TEXTS[:3], "", long, *["x"] * 70]  # the last ones: more than a row takes
    found = scorer.score(texts)["embedding"]
    assert found.type.list_size == run.model.width
    vectors = found.flatten().to_numpy().reshape(len(texts), -1)
    length = run.input.sequence_length
    for i, text in enumerate(texts[:6]):
        ids = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode(text)]
        hidden = [states(run, loaded.params, ids[start : start + length])[0] for start in range(0, len(ids), length)]
        np.testing.assert_allclose(vectors[i], np.concatenate(hidden).mean(axis=0), rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(vectors[5:], np.broadcast_to(vectors[5], vectors[5:].shape), rtol=1e-5, atol=1e-6)
    assert len(scorer.score([])["embedding"]) == 0


INFLUENCE = c.InfluenceConfig(
    targets=(c.TargetConfig(name="near", path="x"), c.TargetConfig(name="far", path="y")),
    projections=("w_q", "w_o", "w_down"),
    rank=3,
    dimensions=32,
    moments="none",
)
TARGETS = {"near": TALKS[:2], "far": [talk("z", "qqqq"), talk("zz", "qqqqqq")]}


def example_loss(config, params, example):
    inputs, targets, learned = example
    _, log_p = states_of(config, params, inputs[None])
    return -jnp.sum(learned * log_p[jnp.arange(len(targets)), targets]) / learned.sum()


@functools.partial(jax.jit, static_argnums=(0, 1))
def adapter_reference(config, influence, params, example):
    """The gradient of B in W + A B at B = 0, straight from its definition."""
    weights = adapters.select_projections(params, influence.projections)
    factors = adapters.first_factors(weights, influence)
    shapes = {path: adapters.matrix_shape(path, leaf.shape) for path, leaf in weights.items()}

    def loss(second):
        def one(path, leaf):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if name not in second:
                return leaf
            return leaf + jnp.einsum("lir,lro->lio", factors[name], second[name]).reshape(leaf.shape)

        return example_loss(config, jax.tree_util.tree_map_with_path(one, params), example)

    return jax.grad(loss)(
        {path: jnp.zeros((count, influence.rank, outputs)) for path, (count, _, outputs) in shapes.items()}
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def adam_reference(run, influence, params, moments, example):
    """What optax makes of the gradient of W, times A."""
    gradients = jax.grad(lambda params: example_loss(run.model, params, example))(params)
    weights = adapters.select_projections(gradients, influence.projections)
    factors = adapters.first_factors(weights, influence)
    rule = optax.scale_by_adam(run.optimizer.b1, run.optimizer.b2, run.optimizer.eps)
    before = optax.ScaleByAdamState(count=moments.count, mu=moments.mean, nu=moments.square)
    updates, _ = rule.update(weights, before)
    shapes = {path: adapters.matrix_shape(path, leaf.shape) for path, leaf in weights.items()}
    return {
        path: jnp.einsum("lio,lir->lro", leaf.reshape(shapes[path]), factors[path]) for path, leaf in updates.items()
    }


def example_of(run, tokenizer, messages):
    ids, learned = render(messages, tokenizer)
    length = run.input.sequence_length
    ids, learned = np.array(ids[: length + 1], np.int32), np.array(learned[1 : length + 1], np.float32)
    example = tuple(np.zeros(length, each.dtype) for each in (ids, ids, learned))
    for array, values in zip(example, (ids[:-1], ids[1:], learned), strict=True):
        array[: len(learned)] = values
    return example


def flat(gradients):
    return np.concatenate([np.asarray(gradients[path]).reshape(-1) for path in sorted(gradients)])


def signs_of(config, number):
    """The whole matrix of signs, by projecting unit vectors."""
    return np.asarray(adapters.project(jnp.eye(number), dimensions=config.dimensions, seed=config.seed))


def test_influence_is_the_cosine_of_adapter_gradients(run):
    loaded = load_run(run)
    scorer = InfluenceScorer(run, INFLUENCE, TARGETS)
    assert scorer.moments is None
    plain = [
        flat(adapter_reference(run.model, INFLUENCE, loaded.params, example_of(run, loaded.tokenizer, messages)))
        for messages in [*TALKS[:4], TALKS[5], *TARGETS["far"]]
    ]
    signs = signs_of(INFLUENCE, len(plain[0]))
    features = np.array(plain) @ signs
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    near, far = features[:2].mean(axis=0), features[5:].mean(axis=0)
    scores = scorer.score(TALKS)
    kept = [0, 1, 2, 3, 5]
    for name, target in (("near", near), ("far", far)):
        expected = unit[:5] @ (target / np.linalg.norm(target))
        np.testing.assert_allclose(scores[f"influence_{name}"][kept], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(scores["influence"], np.maximum(scores["influence_near"], scores["influence_far"]))
    assert scores["influence"][4] == -1.0  # nothing of it is learned
    assert scorer.score(TARGETS["far"])["influence_far"].min() > scores["influence_far"][kept].max()
    again = InfluenceScorer(run, INFLUENCE, TARGETS, batch_size=3)
    np.testing.assert_allclose(again.score(TALKS[:2])["influence"], scores["influence"][:2], rtol=1e-4, atol=1e-5)
    assert again.identity == scorer.identity


def test_gradients_of_single_examples_are_taken_on_hopper_too(run):
    layer = run.model.pattern[0]
    layer = dataclasses.replace(layer, feed_forward=c.FeedForwardConfig(hidden=128), norm=c.RMSNormConfig())
    config = dataclasses.replace(run.model, width=128, pattern=(layer,), repeats=1)
    params = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), model.specs(config))
    weights = adapters.select_projections(params, ("w_q", "w_down"))
    ids = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    batch = Batch(ids, ids, jax.ShapeDtypeStruct(ids.shape, jnp.float32), ids, ids)
    gradients = functools.partial(
        adapters.adapter_gradients,
        config=config,
        execution=c.ExecutionConfig(compute_dtype="bfloat16"),
        optimizer=c.AdamWConfig(peak_lr=1.0),
    )
    with compiling_for_hopper():
        features = jax.eval_shape(
            lambda params, batch: gradients(params, adapters.first_factors(weights, INFLUENCE), None, batch),
            params,
            batch,
        )
        assert on_hopper()
    assert features.shape == (2, adapters.num_features(weights, INFLUENCE))


def test_the_projection_is_made_of_signs_and_keeps_lengths():
    signs = np.asarray(adapters.project(jnp.eye(5000), dimensions=256, seed=3)) * 16
    np.testing.assert_allclose(np.abs(signs), 1.0, rtol=1e-6)
    assert abs(signs.mean()) < 0.01
    assert (signs[:904] != signs[4096:]).mean() > 0.45  # blocks differ
    vector = np.random.default_rng(0).normal(size=(1, 5000)).astype(np.float32)
    projected = np.asarray(adapters.project(jnp.asarray(vector), dimensions=256, seed=3))
    np.testing.assert_allclose(projected, vector @ signs / 16, rtol=1e-3, atol=1e-2)
    assert np.linalg.norm(projected) == pytest.approx(np.linalg.norm(vector), rel=0.2)


def test_moments_of_adam_shape_the_features(run, tmp_path):
    loaded = load_run(run)
    specs = model.specs(run.model)
    optimizer = make_optimizer(run.optimizer, lambda step: 1e-3, specs)
    state = optimizer.init(loaded.params)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        gradients = jax.tree.map(
            lambda leaf, rng=rng: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), loaded.params
        )
        _, state = optimizer.update(gradients, state, loaded.params)
    with_state = dataclasses.replace(run, output_dir=str(tmp_path / "run"))
    checkpointer = Checkpointer(tmp_path / "run" / "checkpoints", run.checkpoint)
    checkpointer.save(3, {"params": loaded.params, "opt_state": state}, extra={})
    checkpointer.close()

    config = dataclasses.replace(INFLUENCE, moments="auto")
    scorer = InfluenceScorer(with_state, config, TARGETS)
    assert scorer.moments is not None
    assert int(scorer.moments.count) == 3
    reference = [
        flat(adam_reference(run, config, loaded.params, scorer.moments, example_of(run, loaded.tokenizer, messages)))
        for messages in TALKS[:3]
    ]
    features, learned = scorer.features(TALKS[:3], moments=True)
    assert learned.all()
    np.testing.assert_allclose(
        features, np.array(reference) @ signs_of(config, len(reference[0])), rtol=2e-4, atol=2e-4
    )
    plain, _ = scorer.features(TALKS[:3], moments=False)
    assert np.abs(plain - features).max() > 0.01
    with pytest.raises(ValueError, match="has no moments of Adam for all of w_q, w_o, w_down"):
        InfluenceScorer(run, dataclasses.replace(config, moments="adam"), TARGETS)


def test_muon_leaves_no_moments_of_matrices(run, tmp_path):
    muon = dataclasses.replace(
        run,
        output_dir=str(tmp_path / "run"),
        optimizer=c.MuonConfig(peak_lr=1e-3, adamw=c.AdamWConfig(peak_lr=1e-3)),
    )
    params = load_run(run).params
    state = make_optimizer(muon.optimizer, lambda step: 1e-3, model.specs(run.model)).init(params)
    checkpointer = Checkpointer(tmp_path / "run" / "checkpoints", run.checkpoint)
    checkpointer.save(1, {"params": params, "opt_state": state}, extra={})
    checkpointer.close()
    assert load_adam_moments(muon, ["group_0/layer_0/mixer/w_q_DNH"], step=1) is None
    found = load_adam_moments(muon, ["embed_VD"], step=1)
    assert found is not None
    assert found.mean["embed_VD"].shape == params["embed_VD"].shape


def test_matrices_of_projections():
    assert adapters.matrix_shape("mixer/w_q_DNH", (6, 8, 2, 3)) == (6, 8, 6)
    assert adapters.matrix_shape("mixer/w_o_NHD", (6, 2, 3, 8)) == (6, 6, 8)
    assert adapters.matrix_shape("feed_forward/w_down_FD", (6, 5, 8)) == (6, 5, 8)
    assert adapters.matrix_shape("feed_forward/w_up_EDF", (6, 4, 8, 5)) == (24, 8, 5)
    assert adapters.matrix_shape("shared_feed_forward/w_down_FD", (5, 8)) == (1, 5, 8)
    params = {"w_up_DF": jnp.zeros((2, 3)), "gain_D": jnp.zeros(2)}
    with pytest.raises(ValueError, match=r"no weight 'w_gate'; its matrices are \['w_up_DF'\]"):
        adapters.select_projections(params, ("w_gate",))
    with pytest.raises(ValueError, match="gain_D is no matrix"):
        adapters.select_projections(params, ("gain",))


def test_a_target_without_anything_to_learn_is_refused(run):
    with pytest.raises(ValueError, match="target 'near' has no conversation of which a row of 64 learns"):
        InfluenceScorer(run, INFLUENCE, {"near": [TALKS[4]]})


def test_the_verb_writes_every_metric(run, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.data, "start_jax", lambda: None)
    monkeypatch.setattr(cli.data, "load_run", lambda files, overrides: type("Loaded", (), {"config": run}))
    (tmp_path / "documents").mkdir()
    rows = [{"id": f"t{i}", "text": messages[-1]["content"], "messages": messages} for i, messages in enumerate(TALKS)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "documents/a.parquet")
    (tmp_path / "influence.gin").write_text(
        "InfluenceConfig.targets = (@TargetConfig(),)\nTargetConfig.name = 'own'\nInfluenceConfig.dimensions = 16\n"
        f"TargetConfig.path = '{tmp_path}/documents'\nInfluenceConfig.projections = ('w_v',)\n"
    )

    def score(metric):
        output = tmp_path / "scores" / Path(metric).stem
        options = {"--documents": tmp_path / "documents", "--output": output, "--metric": metric}
        arguments = ["data", "score", "run.gin", *(str(each) for pair in options.items() for each in pair)]
        done = CliRunner().invoke(cli.app, arguments)
        if done.exception is not None:
            raise done.exception
        return pq.read_table(output / "a.parquet")

    ifd = score("ifd")
    assert ifd.column_names == ["id", "loss", "answer_loss", "ifd", "tokens"]
    assert ifd.column("ifd").to_pylist() == pytest.approx(AnswerScorer(run).score(TALKS)["ifd"].tolist(), rel=1e-5)
    assert score("embedding").schema.field("embedding").type.list_size == run.model.width
    influence = score(str(tmp_path / "influence.gin"))
    assert influence.column_names == ["id", "influence", "influence_own"]
    assert influence.column("influence").to_pylist()[4] == -1.0
    with pytest.raises(ValueError, match="--metric must be likelihood, ifd, embedding or a Gin file"):
        score("perplexity")
    pq.write_table(pa.table({"id": ["x"], "text": ["y"]}), tmp_path / "documents/a.parquet")
    with pytest.raises(ValueError, match="has no column messages; it holds no conversations"):
        score("ifd")
