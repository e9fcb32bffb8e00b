"""Joined projections against separate ones, a norm folded into them, and the recomputed activation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.config.model import Activation
from slmjax.ops.activation import activate
from slmjax.ops.linear import Projected, project, project_activated
from slmjax.ops.norm import norm_branch, rms_norm

D = 8


def normal(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def loss(function):
    """A function of a function's outputs whose gradient is different for each of their numbers."""
    return lambda *arguments: sum(jnp.sum(jnp.sin(y.astype(jnp.float32))) for y in function(*arguments))


def assert_close(got, want, *, roundings: int = 0):
    """float32 up to the order of sums; `roundings` of bfloat16 numbers of the largest's size on the way."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype or roundings
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=(1e-5 + roundings * 2.0**-9) * np.abs(b).max())


@pytest.mark.parametrize("tokens", [2, 10], ids=["fewer tokens than D", "more"])
def test_joined_projections_are_the_separate_ones(tokens):
    x_BTD, weights = normal(0, 1, tokens, D), [normal(1, D, 3, 2), normal(2, D, 5), normal(3, D, 1, 2)]

    def joined(x_BTD, weights):
        return project(x_BTD, weights).take_apart([weight.shape[1:] for weight in weights])

    def separate(x_BTD, weights):
        return [jnp.tensordot(x_BTD, weight, 1) for weight in weights]

    assert_close(joined(x_BTD, weights), separate(x_BTD, weights))
    gradients = [jax.grad(loss(each), argnums=(0, 1))(x_BTD, weights) for each in (joined, separate)]
    assert_close(*gradients)


def test_joined_projections_are_one_product_forward_and_two_backward():
    def joined(x_BTD, gain_D, *weights):
        return project(norm_branch(x_BTD, gain_D, eps=1e-5)[1], weights).take_apart([(3, 2), (5,)])

    def products(function):
        text = jax.jit(function).lower(normal(0, 2, 16, D), normal(1, D), normal(1, D, 3, 2), normal(2, D, 5)).as_text()
        return text.count("stablehlo.dot_general")

    assert products(loss(joined)) == 1
    assert products(jax.value_and_grad(loss(joined), argnums=(0, 1, 2, 3))) == 3


@pytest.mark.parametrize("tokens", [2, 10], ids=["fewer tokens than D", "more"])
@pytest.mark.parametrize("gain", [True, False], ids=["gain", "no gain"])
@pytest.mark.parametrize("behind", ["heads", "activation", "recomputed activation"])
def test_a_norm_folded_into_projections_is_the_norm_before_them(behind, gain, tokens):
    # Tokens of different sizes, one zero: the norm's gradient has no term that is small beside the others.
    x_BTD = normal(0, 2, tokens, D) * jnp.array([0.01, 1.0])[:, None, None]
    x_BTD = x_BTD.at[1, 0].set(0.0)
    gain_D = normal(1, D) if gain else None
    weights = [normal(2, D, 6) / 3, normal(3, D, 6) / 3, normal(4, 6, D) / 3]

    def outputs(x, w_gate, w_up, w_down):
        projected = project(x, [w_gate, w_up])
        if behind == "heads":
            return projected.take_apart([(3, 2), (6,)])
        recompute = behind == "recomputed activation"
        return [project_activated(projected, w_down, activation="silu", gated=True, recompute=recompute)]

    def folded(x_BTD, gain_D, *weights):
        return outputs(norm_branch(x_BTD, gain_D, eps=1e-5)[1], *weights)

    def before(x_BTD, gain_D, *weights):
        return outputs(rms_norm(x_BTD, gain_D, eps=1e-5), *weights)

    arguments = (x_BTD, gain_D, *weights)
    assert_close(folded(*arguments), before(*arguments))
    numbers = (0, 1, 2, 3, 4) if gain else (0, 2, 3, 4)
    assert_close(*(jax.grad(loss(each), argnums=numbers)(*arguments) for each in (folded, before)))


def test_a_folded_norm_rounds_no_more_than_one_before():
    """bfloat16 against float32: the errors of values and of each gradient are no larger than the plain order's.

    One rounds the normalised input, the other the weights times the gain; whoever reads the product does so in float32.
    """
    arguments = (normal(0, 4, 64, 64) * jnp.exp(normal(5, 4, 64, 1)), 1 + normal(1, 64) / 2, normal(2, 64, 96))
    narrow = [x.astype(jnp.bfloat16) if i != 1 else x for i, x in enumerate(arguments)]

    def folded(x, gain, weight):
        projected = project(norm_branch(x, gain, eps=1e-5)[1], [weight])
        return projected.values_BTF.astype(jnp.float32) * jax.lax.stop_gradient(projected.factor_BT1)

    def before(x, gain, weight):
        return project(rms_norm(x, gain, eps=1e-5), [weight]).values_BTF.astype(jnp.float32)

    def everything(function, arguments):
        linear = lambda *a: jnp.sum(function(*a) * normal(7, 4, 64, 96))  # noqa: E731
        return function(*arguments), *jax.grad(linear, argnums=(0, 1, 2))(*arguments)

    exact = everything(before, [x.astype(jnp.float32) for x in narrow])
    errors = [
        [float(jnp.linalg.norm((a - b).ravel())) for a, b in zip(everything(function, narrow), exact, strict=True)]
        for function in (folded, before)
    ]
    # The errors of two random roundings of the same size differ by chance.
    assert all(0 < folded < 1.1 * plain for folded, plain in zip(*errors, strict=True)), errors


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("activation", ["silu", "relu2"])
def test_projection_behind_an_activation_is_the_two_in_order(activation: Activation, gated, recompute, dtype):
    F = 6
    x_BTF, w_FD = normal(0, 2, 5, 2 * F if gated else F, dtype=dtype), normal(1, F, D, dtype=dtype)

    def fused(x_BTF, w_FD):
        x = Projected(x_BTF, None)
        return [project_activated(x, w_FD, activation=activation, gated=gated, recompute=recompute)]

    def plain(x_BTF, w_FD):
        wide_BTF = x_BTF.astype(jnp.float32)
        h_BTF = activate(activation, wide_BTF[..., :F]) * (wide_BTF[..., F:] if gated else 1.0)
        return [h_BTF.astype(dtype) @ w_FD]

    roundings = 0 if dtype == jnp.float32 else 2
    assert_close(fused(x_BTF, w_FD), plain(x_BTF, w_FD), roundings=roundings)
    assert_close(*(jax.grad(loss(each), argnums=(0, 1))(x_BTF, w_FD) for each in (fused, plain)), roundings=roundings)


@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_recomputed_is_not_kept(recompute, capsys):
    from jax.ad_checkpoint import print_saved_residuals

    def function(x_BTF, w_FD):
        x = Projected(x_BTF, jnp.ones((2, 5, 1)))
        return jnp.sum(project_activated(x, w_FD, activation="silu", gated=True, recompute=recompute))

    print_saved_residuals(function, normal(0, 2, 5, 12), normal(1, 6, D))
    saved = capsys.readouterr().out
    assert "f32[2,5,12]" in saved
    assert ("f32[2,5,6]" not in saved) == recompute
