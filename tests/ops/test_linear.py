"""Joined projections against separate ones, and the recomputed activation against JAX's own gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.config.model import Activation
from slmjax.ops.linear import project, project_activated, project_activated_reference, take_apart

D = 8
SWIGLU = {"activation": "silu", "gated": True}


def normal(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


@pytest.mark.parametrize("tokens", [2, 10], ids=["fewer tokens than D", "more"])
def test_joined_projections_are_the_separate_ones(tokens):
    x_BTD, weights = normal(0, 1, tokens, D), [normal(1, D, 3, 2), normal(2, D, 5), normal(3, D, 1, 2)]
    shapes = [weight.shape[1:] for weight in weights]

    def joined(x_BTD, weights):
        return take_apart(project(x_BTD, weights), shapes)

    def separate(x_BTD, weights):
        return [jnp.tensordot(x_BTD, weight, 1) for weight in weights]

    def loss(function):
        return lambda *arguments: sum(jnp.sum(jnp.sin(y)) for y in function(*arguments))

    for got, want in zip(joined(x_BTD, weights), separate(x_BTD, weights), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    got, want = (jax.grad(loss(each), argnums=(0, 1))(x_BTD, weights) for each in (joined, separate))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_joined_projections_are_one_product_forward_and_two_backward():
    def loss(x_BTD, weights):
        return sum(jnp.sum(jnp.sin(y)) for y in take_apart(project(x_BTD, weights), [(3, 2), (5,)]))

    def products(function):
        text = jax.jit(function).lower(normal(0, 2, 16, D), [normal(1, D, 3, 2), normal(2, D, 5)]).as_text()
        return text.count("stablehlo.dot_general")

    assert products(loss) == 1
    assert products(jax.value_and_grad(loss, argnums=(0, 1))) == 3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("activation", ["silu", "relu2"])
def test_projection_behind_an_activation_has_the_gradient_of_its_reference(activation: Activation, gated, dtype):
    F = 6
    x_BTF, w_FD = normal(0, 2, 5, 2 * F if gated else F, dtype=dtype), normal(1, F, D, dtype=dtype)
    weights_BTD = normal(2, 2, 5, D)

    def result(function):
        def loss(x_BTF, w_FD):
            y_BTD = function(x_BTF, w_FD, activation=activation, gated=gated)
            return jnp.sum(weights_BTD * y_BTD.astype(jnp.float32)), y_BTD

        (_, y_BTD), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x_BTF, w_FD)
        return [y_BTD, *gradients]

    for got, want in zip(result(project_activated), result(project_activated_reference), strict=True):
        assert got.dtype == dtype
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        # The same operations in the same precisions; only their fusion may differ, by one rounding of the largest.
        np.testing.assert_allclose(got, want, atol=(1e-6 if dtype == jnp.float32 else 2.0**-8) * np.abs(want).max())


def test_what_the_activation_gives_is_not_kept(capsys):
    from jax.ad_checkpoint import print_saved_residuals

    x_BTF, w_FD = normal(0, 2, 5, 12), normal(1, 6, D)
    print_saved_residuals(lambda x, w: jnp.sum(project_activated(x, w, **SWIGLU)), x_BTF, w_FD)
    saved = capsys.readouterr().out
    assert "f32[2,5,12]" in saved
    assert "f32[2,5,6]" not in saved
    print_saved_residuals(lambda x, w: jnp.sum(project_activated_reference(x, w, **SWIGLU)), x_BTF, w_FD)
    assert "f32[2,5,6]" in capsys.readouterr().out
