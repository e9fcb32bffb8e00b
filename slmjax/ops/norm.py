"""Norms over the last dimension. Statistics are taken in float32 whatever the input; the result has its dtype."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class PendingNorm(NamedTuple):
    """An RMS norm that is still to be applied, for `ops.linear.project` to do with the product's result.

    Attributes:
      x_D: what to normalise.
      gain_D: or None for no gain.
      eps: added to the mean square.
    """

    x_D: jax.Array
    gain_D: jax.Array | None
    eps: float

    def applied(self) -> jax.Array:
        """Returns the normalised array."""
        return rms_norm(self.x_D, self.gain_D, eps=self.eps)


def inverse_rms(x_D: jax.Array, *, eps: float) -> jax.Array:
    """Returns 1 / sqrt(mean(x^2) + eps) in float32, with a last dimension of one."""
    wide_D = x_D.astype(jnp.float32)
    return jax.lax.rsqrt(jnp.mean(jnp.square(wide_D), axis=-1, keepdims=True) + eps)


def rms_norm(x_D: jax.Array, gain_D: jax.Array | None, *, eps: float, offset: bool = False) -> jax.Array:
    """Scales each vector to unit root mean square, then by the gain. Zhang & Sennrich 2019, arXiv:1910.07467.

    `gain_D` may be None for no gain; with `offset` it is the gain's difference from one, as Gemma stores it.
    """
    y_D = x_D.astype(jnp.float32) * inverse_rms(x_D, eps=eps)
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
