"""Norms against their formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.ops.norm import layer_norm, norm_branch, rms_norm

EPS = 1e-3  # large enough to be seen


@pytest.fixture(autouse=True)
def strict_rank_promotion():
    with jax.numpy_rank_promotion("raise"):
        yield


def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    return (
        jax.random.normal(keys[0], (2, 3, 8)) + 0.5,
        jax.random.normal(keys[1], (8,)),
        jax.random.normal(keys[2], (8,)),
    )


def test_rms_norm():
    x_D, gain_D, _ = inputs()
    wide_D = np.asarray(x_D, np.float64)
    unit_D = wide_D / np.sqrt((wide_D**2).mean(-1, keepdims=True) + EPS)
    np.testing.assert_allclose(rms_norm(x_D, None, eps=EPS), unit_D, rtol=1e-5)
    np.testing.assert_allclose(rms_norm(x_D, gain_D, eps=EPS), unit_D * np.asarray(gain_D), rtol=1e-5)
    np.testing.assert_allclose(
        rms_norm(x_D, gain_D, eps=EPS, offset=True), unit_D * (1 + np.asarray(gain_D)), rtol=1e-5
    )


@pytest.mark.parametrize("gain", [True, False], ids=["gain", "no gain"])
def test_a_branch_has_the_gradients_of_a_norm_beside_a_residual(gain):
    x_D, gain_D, weight_D = inputs()
    gain_D = gain_D if gain else None

    def apart(x_D, gain_D):
        residual_D, branch = norm_branch(x_D, gain_D, eps=EPS)
        return residual_D * weight_D[None, None] + jnp.tanh(branch.applied())

    def plain(x_D, gain_D):
        return x_D * weight_D[None, None] + jnp.tanh(rms_norm(x_D, gain_D, eps=EPS))

    np.testing.assert_array_equal(apart(x_D, gain_D), plain(x_D, gain_D))
    numbers = (0, 1) if gain else (0,)
    got, want = (
        jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), argnums=numbers)(x_D, gain_D) for f in (apart, plain)
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_layer_norm():
    x_D, gain_D, bias_D = inputs()
    wide_D = np.asarray(x_D, np.float64)
    centred_D = wide_D - wide_D.mean(-1, keepdims=True)
    unit_D = centred_D / np.sqrt((centred_D**2).mean(-1, keepdims=True) + EPS)
    np.testing.assert_allclose(layer_norm(x_D, eps=EPS), unit_D, rtol=1e-5, atol=1e-6)
    want_D = unit_D * np.asarray(gain_D) + np.asarray(bias_D)
    np.testing.assert_allclose(layer_norm(x_D, gain_D, bias_D, eps=EPS), want_D, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", [lambda x_D: rms_norm(x_D, None, eps=1e-6), lambda x_D: layer_norm(x_D, eps=1e-6)])
def test_statistics_of_bfloat16_are_float32(norm):
    """In bfloat16 a sum of 1024 equal squares would stop growing at 256 of them."""
    x_D = jnp.where(jnp.arange(1024) % 2 == 0, 3.0, -3.0).astype(jnp.bfloat16)
    y_D = norm(x_D)
    assert y_D.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y_D, jnp.sign(x_D))
