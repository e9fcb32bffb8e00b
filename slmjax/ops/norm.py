"""Norms over the last dimension. Statistics are taken in float32 whatever the input; the result has its dtype."""

import jax
import jax.numpy as jnp


def rms_norm(x_D: jax.Array, gain_D: jax.Array | None, *, eps: float, offset: bool = False) -> jax.Array:
    """Scales each vector to unit root mean square, then by the gain. Zhang & Sennrich 2019, arXiv:1910.07467.

    `gain_D` may be None for no gain; with `offset` it is the gain's difference from one, as Gemma stores it.
    """
    wide_D = x_D.astype(jnp.float32)
    y_D = wide_D * jax.lax.rsqrt(jnp.mean(jnp.square(wide_D), axis=-1, keepdims=True) + eps)
    if gain_D is not None:
        y_D = y_D * _aligned(gain_D + 1.0 if offset else gain_D, y_D)
    return y_D.astype(x_D.dtype)


def layer_norm(
    x_D: jax.Array, gain_D: jax.Array | None = None, bias_D: jax.Array | None = None, *, eps: float
) -> jax.Array:
    """Brings each vector to mean 0 and variance 1, then applies gain and bias. Ba et al. 2016, arXiv:1607.06450."""
    wide_D = x_D.astype(jnp.float32)
    centred_D = wide_D - jnp.mean(wide_D, axis=-1, keepdims=True)
    y_D = centred_D * jax.lax.rsqrt(jnp.mean(jnp.square(centred_D), axis=-1, keepdims=True) + eps)
    if gain_D is not None:
        y_D = y_D * _aligned(gain_D, y_D)
    if bias_D is not None:
        y_D = y_D + _aligned(bias_D, y_D)
    return y_D.astype(x_D.dtype)


def _aligned(vector_D: jax.Array, like: jax.Array) -> jax.Array:
    """Gives `vector_D` leading dimensions of one, in float32: no silent rank promotion."""
    return vector_D.astype(jnp.float32).reshape((1,) * (like.ndim - 1) + (-1,))
