"""Properties of the forward pass that hold whatever the weights are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax import axes, model
from slmjax import config as configs

T = 8
MOE = configs.MoEConfig(num_experts=4, top_k=2, hidden=9, shared_hidden=5)


def tokens(config, rows=1, length=T, seed=0):
    return np.random.default_rng(seed).integers(config.vocab_size, size=(rows, length)).astype(np.int32)


def assert_trees_close(actual, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), actual, expected)


@pytest.mark.parametrize(("window", "feed_forward"), [(None, MOE), (3, None)])
def test_no_gradient_flows_to_later_tokens(window, feed_forward, tiny_layer, tiny_model, random_params):
    config = tiny_model(tiny_layer(mixer={"window": window}, feed_forward=feed_forward), repeats=1)
    params = random_params(config)
    tokens_BT = np.arange(T, dtype=np.int32)[None]  # all different, so that a row of the table is a position
    direction_D = np.random.default_rng(0).normal(size=config.width).astype(np.float32)

    @jax.jit
    @jax.grad
    def gradient(embed_VD, t):
        return model.apply(params | {"embed_VD": embed_VD}, config, tokens_BT).hidden_BTD[0, t] @ direction_D

    sensitivity_TS = np.stack([np.abs(gradient(params["embed_VD"], t)[:T]).max(-1) for t in range(T)])
    distance_TS = np.arange(T)[:, None] - np.arange(T)
    visible_TS = (distance_TS >= 0) & (distance_TS < (window or T))
    assert (sensitivity_TS[~visible_TS] == 0).all()
    assert (sensitivity_TS[visible_TS] > 0).all()


def test_documents_do_not_see_each_other_nor_padding(tiny_layer, tiny_model, random_params):
    config = tiny_model(tiny_layer(mixer={"window": 3}), tiny_layer(feed_forward=MOE))
    params = random_params(config)
    documents_BT = np.array([[1, 1, 1, 2, 2, 3, 0, 0]], np.int32)
    positions_BT = np.array([[0, 1, 2, 0, 1, 0, 0, 1]], np.int32)

    @jax.jit
    def hidden(tokens_BT):
        out = model.apply(params, config, tokens_BT, documents_BT=documents_BT, positions_BT=positions_BT)
        return out.hidden_BTD[0]

    tokens_BT = tokens(config)
    before_TD = np.asarray(hidden(tokens_BT))
    assert np.isfinite(before_TD).all()
    for document in (0, 1, 2, 3):
        changed_T = documents_BT[0] == document
        after_TD = np.asarray(hidden(np.where(changed_T[None], (tokens_BT + 1) % config.vocab_size, tokens_BT)))
        np.testing.assert_array_equal(after_TD[~changed_T], before_TD[~changed_T])
        assert (after_TD[changed_T] != before_TD[changed_T]).any(axis=-1).all()


def test_packed_documents_are_as_if_alone(tiny_model, random_params):
    config = tiny_model()
    params = random_params(config)
    tokens_BT = tokens(config)
    packed = model.apply(
        params,
        config,
        tokens_BT,
        documents_BT=np.array([[1, 1, 1, 1, 2, 2, 2, 2]], np.int32),
        positions_BT=np.array([[0, 1, 2, 3, 0, 1, 2, 3]], np.int32),
    )
    alone = model.apply(params, config, tokens_BT.reshape(2, 4))
    np.testing.assert_allclose(
        packed.hidden_BTD.reshape(alone.hidden_BTD.shape), alone.hidden_BTD, rtol=1e-5, atol=1e-5
    )


PLAIN = configs.ExecutionConfig(layers="unroll")
EXECUTIONS = [
    configs.ExecutionConfig(layers="scan", remat="none"),
    configs.ExecutionConfig(layers="scan", remat="full"),
    configs.ExecutionConfig(layers="scan", remat="dots"),
    configs.ExecutionConfig(layers="scan", remat="attention"),
    configs.ExecutionConfig(layers="unroll", remat="attention"),
]


@pytest.fixture(scope="module")
def gradient_of(tiny_layer, tiny_model, random_params):
    """Returns (execution) -> (loss, gradient), traced, of two layers with windows that are mixtures."""
    config = tiny_model(tiny_layer(mixer={"window": 3}, feed_forward=MOE))
    params = random_params(config)

    def loss(params, execution):
        out = model.apply(params, config, tokens(config), execution=execution)
        return jnp.mean(jnp.sin(out.hidden_BTD)) + out.router_loss

    return lambda execution: jax.jit(jax.value_and_grad(loss), static_argnums=1).trace(params, execution), params


@pytest.fixture(scope="module")
def plain_gradient(gradient_of):
    trace, params = gradient_of
    return trace(PLAIN).lower().compile()(params)


@pytest.mark.parametrize("execution", EXECUTIONS, ids=lambda e: f"{e.layers}-{e.remat}")
def test_scan_and_remat_change_nothing(execution, gradient_of, plain_gradient):
    trace, params = gradient_of
    value, gradient = trace(execution).lower().compile()(params)
    expected_value, expected_gradient = plain_gradient
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    assert_trees_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def test_each_remat_policy_saves_what_its_name_says(tiny_model, random_params, capsys):
    config = tiny_model()
    params = random_params(config)
    saved = {}
    for remat in ("full", "dots", "attention"):
        execution = configs.ExecutionConfig(layers="unroll", remat=remat, attention="chunked")
        jax.ad_checkpoint.print_saved_residuals(
            lambda params, execution=execution: model.apply(
                params, config, tokens(config), execution=execution
            ).hidden_BTD.sum(),
            params,
        )
        lines = capsys.readouterr().out.splitlines()
        kinds = {"dot_general": "output of dot_general", "out": "'attention_out'", "lse": "'attention_lse'"}
        saved[remat] = {kind: sum(text in line for line in lines) for kind, text in kinds.items()}
    # Two layers; a dense one has six products whose result is kept: q, k, v, o, up and gate.
    assert saved["full"] == {"dot_general": 0, "out": 0, "lse": 0}
    assert saved["attention"] == {"dot_general": 0, "out": 2, "lse": 2}
    assert saved["dots"] == {"dot_general": 2 * 6, "out": 0, "lse": 0}


def test_recomputed_activations_change_nothing_and_are_not_kept(tiny_model, random_params, capsys):
    config = tiny_model()
    params = random_params(config)

    def run(remat):
        execution = configs.ExecutionConfig(remat=remat)
        loss = lambda params: jnp.sin(  # noqa: E731
            model.apply(params, config, tokens(config), execution=execution).hidden_BTD
        ).sum()
        jax.ad_checkpoint.print_saved_residuals(loss, params)
        return len(capsys.readouterr().out.splitlines()), jax.jit(jax.grad(loss))(params)

    (kept, plain), (recomputed, gradient) = run("none"), run("activations")
    assert recomputed == kept - 1  # an array of both layers
    assert_trees_close(gradient, plain, rtol=1e-5, atol=1e-6)


def test_cache_of_packed_documents_is_refused(tiny_model, random_params):
    config = tiny_model()
    cache = model.make_cache(config, 1, T)
    with pytest.raises(ValueError, match="documents_BT must be None with a cache"):
        model.apply(random_params(config), config, tokens(config), documents_BT=np.ones((1, T), np.int32), cache=cache)


def test_block_repeats_is_each_stored_layer_twice_in_a_row(tiny_model, random_params):
    config = tiny_model(block_repeats=2)
    written_out = dataclasses.replace(config, repeats=4, block_repeats=1)
    params = random_params(config)
    twice = params | {"group_0": jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=0), params["group_0"])}

    def gradient(params, config):
        loss = jax.grad(lambda params: jnp.sum(jnp.sin(model.apply(params, config, tokens(config)).hidden_BTD)))
        return jax.jit(loss)(params)

    repeated, expected = gradient(params, config), gradient(twice, written_out)
    summed = jax.tree.map(lambda leaf: leaf.reshape(2, 2, *leaf.shape[1:]).sum(1), expected["group_0"])
    assert_trees_close(repeated, expected | {"group_0": summed}, rtol=1e-4, atol=1e-5)


def test_gradient_of_a_shared_feed_forward_is_the_sum_over_layers(tiny_model, random_params):
    config = tiny_model(share_feed_forward=True)
    separate = dataclasses.replace(config, share_feed_forward=False)
    params = random_params(config)
    layer = params["group_0"]["layer_0"]
    copies = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params["shared_feed_forward"])
    unshared = {k: v for k, v in params.items() if k != "shared_feed_forward"}
    unshared["group_0"] = {"layer_0": layer | {"feed_forward": copies}}

    def run(params, config):
        loss = jax.value_and_grad(
            lambda params: jnp.sum(jnp.sin(model.apply(params, config, tokens(config)).hidden_BTD))
        )
        return jax.jit(loss)(params)

    value, gradient = run(params, config)
    expected_value, expected = run(unshared, separate)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    summed = jax.tree.map(lambda leaf: leaf.sum(0), expected["group_0"]["layer_0"]["feed_forward"])
    assert_trees_close(gradient["shared_feed_forward"], summed, rtol=1e-4, atol=1e-5)


def test_grouped_heads_are_multi_head_with_repeated_keys_and_values(tiny_layer, tiny_model, random_params):
    grouped = tiny_model(repeats=1)
    full = tiny_model(tiny_layer(mixer={"num_kv_heads": 4}), repeats=1)
    params = random_params(grouped)
    mixer = dict(params["group_0"]["layer_0"]["mixer"])
    for name in ("w_k_DKH", "w_v_DKH"):
        mixer[name] = jnp.repeat(mixer[name], 2, axis=2)
    repeated = params | {"group_0": {"layer_0": params["group_0"]["layer_0"] | {"mixer": mixer}}}
    actual = model.apply(repeated, full, tokens(full)).hidden_BTD
    np.testing.assert_allclose(actual, model.apply(params, grouped, tokens(full)).hidden_BTD, rtol=1e-5, atol=1e-5)


def test_mixture_of_equal_experts_all_chosen_is_the_dense_feed_forward(tiny_layer, tiny_model, random_params):
    dense = tiny_model()
    moe = configs.MoEConfig(num_experts=3, top_k=3, hidden=20)
    mixed = tiny_model(tiny_layer(feed_forward=moe))
    params = random_params(dense)
    layer = params["group_0"]["layer_0"]
    experts = {
        f"{name[:-2]}E{name[-2:]}": jnp.repeat(weight[:, None], 3, axis=1)
        for name, weight in layer["feed_forward"].items()
    }
    router = random_params(mixed)["group_0"]["layer_0"]["feed_forward"]["router_DE"]
    mixed_params = params | {"group_0": {"layer_0": layer | {"feed_forward": experts | {"router_DE": router}}}}
    actual = model.apply(mixed_params, mixed, tokens(mixed)).hidden_BTD
    np.testing.assert_allclose(actual, model.apply(params, dense, tokens(dense)).hidden_BTD, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def routed(tiny_layer, tiny_model, random_params):
    """Returns a compiled (params, documents) -> (Output, gradient of the router losses), and params."""
    config = tiny_model(tiny_layer(feed_forward=dataclasses.replace(MOE, balance_bias_rate=0.1)))

    @jax.jit
    def run(params, documents_BT):
        def loss(params):
            out = model.apply(params, config, tokens(config), documents_BT=documents_BT)
            return out.router_loss, out

        (_, out), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return out, gradient["group_0"]["layer_0"]["feed_forward"]

    return run, random_params(config)


def test_padding_counts_for_no_expert(routed):
    run, params = routed
    for documents_BT in ([[1] * T], [[1, 1, 1, 2, 2, 0, 0, 0]], [[0] * T]):
        out, gradient = run(params, np.array(documents_BT, np.int32))
        np.testing.assert_array_equal(
            out.expert_load["group_0"]["layer_0"].sum(-1), [MOE.top_k * np.count_nonzero(documents_BT)] * 2
        )
        assert np.isfinite(out.router_loss)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_router_loss_teaches_the_router_and_not_the_balance_bias(routed):
    run, params = routed
    _, gradient = run(params, np.ones((1, T), np.int32))
    assert (np.abs(gradient["router_DE"]).max(axis=(1, 2)) > 0).all()
    assert (gradient["balance_bias_E"] == 0).all()


def test_balance_bias_changes_the_choice_of_experts_only(routed):
    run, params = routed
    documents_BT = np.ones((1, T), np.int32)

    def with_bias(bias_E):
        layer = params["group_0"]["layer_0"]
        moe = layer["feed_forward"] | {"balance_bias_E": jnp.tile(jnp.array(bias_E), (2, 1))}
        return run(params | {"group_0": {"layer_0": layer | {"feed_forward": moe}}}, documents_BT)[0]

    plain, equal, biased = with_bias([0.0] * 4), with_bias([7.0] * 4), with_bias([9.0, 0.0, 0.0, 9.0])
    # The same experts are chosen, so that a bias that entered the weights would show.
    np.testing.assert_array_equal(equal.hidden_BTD, plain.hidden_BTD)
    np.testing.assert_array_equal(biased.expert_load["group_0"]["layer_0"], [[T, 0, 0, T]] * 2)


def test_bfloat16_is_close_to_float32(tiny_layer, tiny_model, random_params):
    config = tiny_model(
        tiny_layer(mixer={"qkv_bias": True, "qk_norm": configs.RMSNormConfig()}, feed_forward={"bias": True}),
        embedding_scale=4.0,
        repeats=1,
    )
    params = random_params(config)
    tokens_BT = tokens(config)

    def run(dtype):
        def loss(params):
            execution = configs.ExecutionConfig(compute_dtype=dtype)
            hidden_BTD = model.apply(params, config, tokens_BT, execution=execution).hidden_BTD
            return jnp.mean(jnp.square(model.logits(params, config, hidden_BTD))), hidden_BTD

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (value, hidden_BTD), gradient = run("bfloat16")
    (expected_value, expected_BTD), expected = run("float32")
    assert (hidden_BTD.dtype, expected_BTD.dtype) == (jnp.bfloat16, jnp.float32)
    # bfloat16 keeps 8 bits: 0.4 % an operation, some ten of them in a row.
    np.testing.assert_allclose(value, expected_value, rtol=0.03)
    for leaf, expected_leaf in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == jnp.float32
        assert np.linalg.norm(leaf - expected_leaf) <= 0.06 * np.linalg.norm(expected_leaf) + 1e-6


def test_constrain_sees_the_residual_stream_after_the_embedding_and_each_layer(tiny_model, random_params):
    seen = []

    def constrain(x, logical_axes):
        seen.append((x.shape, logical_axes))
        return x

    config = tiny_model()
    jax.eval_shape(
        lambda params: model.apply(
            params, config, tokens(config), constrain=constrain, execution=configs.ExecutionConfig(layers="unroll")
        ),
        random_params(config),
    )
    assert seen == [((1, T, config.width), (axes.BATCH, axes.LENGTH, axes.ACT_EMBED))] * 3


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_decoding_with_a_cache_is_the_full_forward_pass(layers, tiny_layer, tiny_model, random_params):
    if layers == "unroll":
        config = tiny_model(tiny_layer(mixer={"window": 3, "qk_norm": configs.RMSNormConfig()}))
    else:
        config = tiny_model(tiny_layer(feed_forward=MOE), prefix=(tiny_layer(mixer={"rope": None}),), block_repeats=2)
    params = random_params(config)
    tokens_BT = tokens(config, rows=2)
    execution = configs.ExecutionConfig(layers=layers)
    expected_BTD = model.apply(params, config, tokens_BT, execution=execution).hidden_BTD

    @jax.jit
    def run(tokens_BT, positions_BT, cache):
        return model.apply(
            params, config, tokens_BT, positions_BT=positions_BT, cache=cache, execution=execution
        )[:2]  # fmt: skip

    cache = model.make_cache(config, 2, T)
    prefill = 5
    positions_BT = np.tile(np.arange(T, dtype=np.int32), (2, 1))
    hidden_BTD, cache = run(tokens_BT[:, :prefill], positions_BT[:, :prefill], cache)
    np.testing.assert_allclose(hidden_BTD, expected_BTD[:, :prefill], rtol=1e-4, atol=1e-5)
    for t in range(prefill, T):
        hidden_BTD, cache = run(tokens_BT[:, t : t + 1], positions_BT[:, t : t + 1], cache)
        np.testing.assert_allclose(hidden_BTD[:, 0], expected_BTD[:, t], rtol=1e-4, atol=1e-5)


def test_rows_of_a_cache_may_be_at_different_positions(tiny_model, random_params):
    config = tiny_model()
    params = random_params(config)
    tokens_BT = tokens(config, rows=2)
    lengths_B = [3, 5]
    cache = model.make_cache(config, 2, T)
    # Both rows are filled to 5; the first writes on at 3, over what it does not want.
    everywhere_BT = np.tile(np.arange(5, dtype=np.int32), (2, 1))
    cache = model.apply(params, config, tokens_BT[:, :5], positions_BT=everywhere_BT, cache=cache).cache
    next_B1 = np.stack([tokens_BT[row, length : length + 1] for row, length in enumerate(lengths_B)])
    positions_B1 = np.array(lengths_B, np.int32)[:, None]
    hidden_BTD = model.apply(params, config, next_B1, positions_BT=positions_B1, cache=cache).hidden_BTD
    expected_BTD = model.apply(params, config, tokens_BT).hidden_BTD
    for row, length in enumerate(lengths_B):
        np.testing.assert_allclose(hidden_BTD[row, 0], expected_BTD[row, length], rtol=1e-4, atol=1e-5)
