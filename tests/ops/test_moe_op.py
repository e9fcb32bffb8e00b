"""Routing, grouped matrix products and the mixture-of-experts feed-forward against plain versions."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_compiler import compiled_for_hopper

from slmjax.config import MeshConfig, MoEConfig
from slmjax.ops.activation import activate
from slmjax.ops.grouped_matmul import grouped_matmul
from slmjax.ops.mixture import moe_feed_forward
from slmjax.ops.routing import route
from slmjax.parallel import batch_sharding, make_mesh, on_mesh

X, D, F, E, K = 150, 5, 6, 4, 2


@pytest.fixture(autouse=True)
def strict_rank_promotion():
    with jax.numpy_rank_promotion("raise"):
        yield


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@functools.partial(jax.jit, static_argnums=(0, 4))
def product_and_gradients(implementation, x_X, w_EDF, sizes_E, transposed=False):
    def product(x_X, w_EDF):
        return grouped_matmul(x_X, w_EDF, sizes_E, transposed=transposed, implementation=implementation)

    out_X, pullback = jax.vjp(product, x_X, w_EDF)
    return out_X, *pullback(normal(9, *out_X.shape).astype(jnp.bfloat16).astype(out_X.dtype))


# Blocks have 64 rows: groups within a block, over several, empty, on a border, and rows that no group has.
SIZES = [(30, 0, 100, 20), (64, 64, 22, 0), (0, 0, 0, 150), (1, 1, 147, 1), (10, 90, 0, 30), (0, 0, 0, 0)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_matmul_equals_reference(sizes, transposed):
    arrays = normal(0, X, F if transposed else D), normal(1, E, D, F), jnp.array(sizes, jnp.int32)
    want_out_X, want_dx_X, want_dw_EDF = product_and_gradients("reference", *arrays, transposed)
    for implementation in ("blocks", "ragged_dot"):
        out_X, dx_X, dw_EDF = product_and_gradients(implementation, *arrays, transposed)
        np.testing.assert_allclose(out_X, want_out_X, atol=1e-5)
        np.testing.assert_allclose(dx_X, want_dx_X, atol=1e-5)
        np.testing.assert_allclose(dw_EDF, want_dw_EDF, atol=1e-4)  # sums of up to 150 terms


def test_the_reference_is_a_product_for_each_group_and_its_gradients():
    sizes = (10, 90, 0, 30)
    x_XD, w_EDF, sizes_E = normal(0, X, D), normal(1, E, D, F), jnp.array(sizes, jnp.int32)

    def plain(x_XD, w_EDF):
        pieces = jnp.split(x_XD, np.cumsum(sizes))
        return jnp.concatenate([*(x @ w for x, w in zip(pieces, w_EDF, strict=False)), jnp.zeros((20, F))])

    out_XF, pullback = jax.vjp(plain, x_XD, w_EDF)
    want = out_XF, *pullback(normal(9, *out_XF.shape).astype(jnp.bfloat16).astype(jnp.float32))
    for a, b in zip(product_and_gradients("reference", x_XD, w_EDF, sizes_E), want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_fewer_rows_than_a_block_in_bfloat16():
    x_XD, w_EDF = normal(0, 7, D).astype(jnp.bfloat16), normal(1, E, D, F).astype(jnp.bfloat16)
    sizes_E = jnp.array([3, 0, 4, 0], jnp.int32)
    out_XF, dx_XD, dw_EDF = product_and_gradients("auto", x_XD, w_EDF, sizes_E)
    assert out_XF.dtype == dx_XD.dtype == dw_EDF.dtype == jnp.bfloat16
    wide = product_and_gradients("reference", x_XD.astype(jnp.float32), w_EDF.astype(jnp.float32), sizes_E)
    for a, b in zip((out_XF, dx_XD, dw_EDF), wide, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=2.0**-8, atol=1e-5)  # one rounding to 8 bits


def experts(gated=True):
    return {
        "w_up_EDF": normal(1, E, D, F),
        "w_gate_EDF": normal(2, E, D, F) if gated else None,
        "w_down_EFD": normal(3, E, F, D),
    }


def dense_feed_forward(x_XD, weights, expert, activation):
    up_XF = x_XD @ weights["w_up_EDF"][expert]
    if weights["w_gate_EDF"] is None:
        h_XF = activate(activation, up_XF)
    else:
        h_XF = activate(activation, x_XD @ weights["w_gate_EDF"][expert]) * up_XF
    return h_XF @ weights["w_down_EFD"][expert]


def routing(num_tokens):
    """Weights and ids of each token's K experts."""
    return jax.lax.top_k(jax.nn.softmax(normal(4, num_tokens, E)), K)


def mixture(x_XD, factors_XK, ids_XK, weights):
    return moe_feed_forward(x_XD, ids_XK, factors_XK, **weights, activation="silu")


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(function, x_XD, factors_XK, ids_XK, weights):
    y_XD, pullback = jax.vjp(lambda *arrays: function(*arrays[:2], ids_XK, arrays[2]), x_XD, factors_XK, weights)
    return y_XD, pullback(normal(5, *y_XD.shape))


# float32 sums of up to 150 products of a few numbers of size about 1, in another order.
assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("gated", "num_tokens"), [(True, X), (False, X), (True, 9)])
def test_mixture_equals_every_expert_on_every_token(gated, num_tokens):
    (factors_XK, ids_XK), weights = routing(num_tokens), experts(gated)
    assert set(np.unique(ids_XK)) == set(range(E))

    def plain(x_XD, factors_XK, ids_XK, weights):
        y_XD = jnp.zeros_like(x_XD)
        for expert in range(E):
            factor_X = jnp.sum(jnp.where(ids_XK == expert, factors_XK, 0.0), axis=1)
            y_XD += factor_X[:, None] * dense_feed_forward(x_XD, weights, expert, "silu")
        return y_XD

    arrays = normal(0, num_tokens, D), factors_XK, ids_XK, weights
    jax.tree.map(assert_close, value_and_gradients(mixture, *arrays), value_and_gradients(plain, *arrays))


@pytest.mark.multidevice
def test_mixture_over_devices_equals_one_device():
    factors_XK, ids_XK = routing(64)
    arrays = normal(0, 64, D), factors_XK, ids_XK
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    want = value_and_gradients(mixture, *arrays, experts())
    got = jax.jit(on_mesh(mesh, functools.partial(value_and_gradients, mixture)))(
        *jax.device_put(arrays, batch_sharding(mesh)), experts()
    )
    jax.tree.map(assert_close, got, want)
    # Tokens stay where they are: nothing but the gradients of the experts goes between devices.
    compiled = jax.jit(on_mesh(mesh, mixture)).lower(*jax.device_put(arrays, batch_sharding(mesh)), experts()).compile()
    assert not re.search(r"all-gather|all-to-all|all-reduce|collective-permute", compiled.as_text())


def test_no_row_of_full_width_is_kept_for_the_backward_pass():
    _, pullback = jax.vjp(lambda x_XD, weights: mixture(x_XD, *routing(X), weights), normal(0, X, D), experts())
    kept = {leaf.shape for leaf in jax.tree.leaves(pullback)}
    assert (X * K, 2 * F) in kept
    assert not {(X * K, D), (X * K, F)} & kept


WIDE = {"x": (4096, 512), "w_up_EDF": (8, 512, 320), "w_gate_EDF": (8, 512, 320), "w_down_EFD": (8, 320, 512)}


def wide(implementation):
    """A mixture of a size that Hopper's kernels can compute, and its arrays."""
    arrays = {name: (0.1 * normal(i, *shape)).astype(jnp.bfloat16) for i, (name, shape) in enumerate(WIDE.items())}
    factors_XK, ids_XK = jax.lax.top_k(jax.nn.softmax(normal(9, WIDE["x"][0], 8)), K)

    def function(arrays, factors_XK, ids_XK):
        x_XD, weights = arrays["x"], {name: array for name, array in arrays.items() if name != "x"}
        return moe_feed_forward(x_XD, ids_XK, factors_XK, **weights, activation="silu", implementation=implementation)

    return function, (arrays, factors_XK, ids_XK)


def with_gradients(function):
    """The same, and the gradients of all but the ids."""

    def run(arrays, factors_XK, ids_XK):
        y_XD, pullback = jax.vjp(lambda *args: function(*args, ids_XK), arrays, factors_XK)
        return y_XD, pullback(jnp.cos(jnp.arange(y_XD.size)).reshape(y_XD.shape).astype(y_XD.dtype))

    return run


def test_mixture_compiles_for_hopper():
    function, arrays = wide("hopper")
    text = compiled_for_hopper(with_gradients(function), *arrays).as_text() or ""
    # Two products forward; backward, the gradients of both operands of each.
    assert text.count('custom_call_target="mosaic_gpu') == 6


def test_what_is_named_for_remat_saves_the_first_product_and_the_sort():
    function, arrays = wide("hopper")

    def operations(policy):
        run = with_gradients(jax.checkpoint(function, policy=policy))
        text = jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
        return text.count("custom_call @mosaic_gpu"), text.count("stablehlo.sort")

    # The last product is computed once, whatever the policy. The sort that stays orders the groups by size.
    assert operations(None) == (7, 3)
    assert operations(jax.checkpoint_policies.save_only_these_names("experts")) == (6, 2)


@pytest.mark.gpu
def test_mixture_on_the_device_equals_the_reference_in_float32():
    function, (arrays, factors_XK, ids_XK) = wide("hopper")
    plain, _ = wide("reference")
    arrays_f32 = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    got = jax.jit(with_gradients(function))(arrays, factors_XK, ids_XK)
    with jax.default_matmul_precision("highest"):
        want = jax.jit(with_gradients(plain))(arrays_f32, factors_XK, ids_XK)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(np.asarray(a, np.float32) - b) < 0.01 * np.linalg.norm(b)  # a few roundings to 8 bits


def test_all_experts_equal_is_the_dense_feed_forward():
    weights = jax.tree.map(lambda w_E: jnp.broadcast_to(w_E[:1], w_E.shape), experts())
    x_XD = normal(0, X, D)
    routed = route(normal(4, X, E), MoEConfig(num_experts=E, top_k=E, hidden=F))
    y_XD = moe_feed_forward(x_XD, routed.ids_XK, routed.weights_XK, **weights, activation="gelu")
    np.testing.assert_allclose(y_XD, dense_feed_forward(x_XD, weights, 0, "gelu"), rtol=1e-4, atol=1e-4)


def test_bias_changes_the_choice_and_not_the_weights():
    logits_XE = jnp.array([[2.0, 1.0, 0.0, -1.0]])
    config = MoEConfig(num_experts=E, top_k=2, hidden=F, scoring="sigmoid", normalise_top_k=False)
    plain = route(logits_XE, config)
    biased = route(logits_XE, config, balance_bias_E=jnp.array([0.0, -1.0, 0.0, 1.0]))
    np.testing.assert_array_equal(plain.ids_XK, [[0, 1]])
    np.testing.assert_array_equal(biased.ids_XK, [[3, 0]])
    np.testing.assert_allclose(biased.weights_XK, jax.nn.sigmoid(jnp.array([[-1.0, 2.0]])), rtol=1e-6)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_weights_are_the_chosen_scores(scoring):
    logits_XE = normal(0, X, E)
    config = MoEConfig(num_experts=E, top_k=K, hidden=F, scoring=scoring)
    scores_XE = np.asarray({"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}[scoring](logits_XE))
    best_XK = -np.sort(-scores_XE, axis=-1)[:, :K]
    routed = route(logits_XE, config)
    np.testing.assert_allclose(np.take_along_axis(scores_XE, np.asarray(routed.ids_XK), axis=-1), best_XK)
    np.testing.assert_allclose(routed.weights_XK, best_XK / best_XK.sum(-1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(jnp.sum(routed.load_E), X * K)


def test_balance_loss_is_one_when_even_and_e_over_k_when_all_go_to_one_expert():
    config = MoEConfig(num_experts=E, top_k=1, hidden=F)
    even = route(100.0 * jnp.eye(E), config)
    np.testing.assert_allclose(even.balance_loss, 1.0, rtol=1e-5)
    uneven = route(jnp.broadcast_to(jnp.array([[100.0, 0.0, 0.0, 0.0]]), (8, E)), config)
    np.testing.assert_allclose(uneven.balance_loss, E, rtol=1e-5)
    np.testing.assert_allclose(uneven.router_z, 100.0**2, rtol=1e-5)
    # Its gradient takes probability from the crowded expert.
    slope_XE = jax.grad(lambda logits_XE: route(logits_XE, config).balance_loss)(jnp.eye(E)[:1])
    assert slope_XE[0, 0] > 0 > slope_XE[0, 1]


def test_padding_counts_neither_for_the_load_nor_for_the_losses():
    config = MoEConfig(num_experts=E, top_k=K, hidden=F)
    logits_XE = normal(0, 12, E)
    valid_X = jnp.arange(12) < 7
    padded, alone = route(logits_XE, config, valid_X=valid_X), route(logits_XE[:7], config)
    for name in ("load_E", "balance_loss", "router_z"):
        np.testing.assert_allclose(getattr(padded, name), getattr(alone, name), rtol=1e-5)
    nothing = route(logits_XE, config, valid_X=jnp.zeros(12, bool))
    assert np.all(np.asarray(nothing.load_E) == 0)
    assert float(nothing.balance_loss) == float(nothing.router_z) == 0.0
