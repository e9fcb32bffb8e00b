"""Norms over the last dimension. Statistics are taken in float32 whatever the input; the result has its dtype."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from slmjax.kernels import targets
from slmjax.ops.partition import over_batch


class PendingNorm(NamedTuple):
    """An RMS norm at the beginning of a branch, still to be applied: `ops.linear.project` does it to a product.

    Whoever reads it takes the factor for a constant: `norm_branch` knows how it depends on `x_D`.

    Attributes:
      x_D: what to normalise.
      gain_D: or None for no gain.
      factor_D1: float32, 1 / rms(x).
    """

    x_D: jax.Array
    gain_D: jax.Array | None
    factor_D1: jax.Array

    def applied(self) -> jax.Array:
        """Returns the normalised array."""
        return _scaled(self.x_D, self.gain_D, jax.lax.stop_gradient(self.factor_D1))


def norm_branch(x_D: jax.Array, gain_D: jax.Array | None, *, eps: float) -> tuple[jax.Array, PendingNorm]:
    """Returns x for the residual stream, and the norm of it with which a branch begins.

    Both gradients arrive at one place, where they are added, and completed by the factor's own, in one pass.
    """
    parts: tuple[jax.Array, jax.Array, jax.Array] = _part(eps, x_D)
    residual_D, x_D, factor_D1 = parts
    return residual_D, PendingNorm(x_D, gain_D, factor_D1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _part(eps: float, x_D: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return _part_forward(eps, x_D)[0]


@jax.named_scope("norm")
def _part_forward(eps: float, x_D: jax.Array):
    factor_D1 = inverse_rms(x_D, eps=eps)
    return (x_D, x_D, factor_D1), (x_D, factor_D1)


@jax.named_scope("norm")
def _part_backward(eps: float, saved, cotangents):
    (x_D, factor_D1), (dresidual_D, dx_D, _) = saved, cotangents
    return (norm_gradient(dx_D, x_D, factor_D1, dresidual_D),)


_part.defvjp(_part_forward, _part_backward)


def norm_gradient(dx_D: jax.Array, x_D: jax.Array, factor_D1: jax.Array, dresidual_D: jax.Array) -> jax.Array:
    """Returns the gradient of x, of which dx is what it would be with a constant factor 1 / rms(x), and dresidual more.

    The branch reads y = factor x, so that dx is factor times dy. The factor's derivative is -factor^3 x / D, which
    leaves dx - x factor^2 mean(dx x).
    """
    if targets.on_hopper() and x_D.ndim == 3:
        from slmjax.kernels.hopper import norm_gradient as kernels  # Pallas is slow to import, and of use here only

        def kernel(dx_BTD, x_BTD, factor_BT1, dresidual_BTD):
            rows = [array.reshape(-1, array.shape[-1]) for array in (dx_BTD, x_BTD, dresidual_BTD)]
            out_XD = kernels.norm_gradient(rows[0], rows[1], factor_BT1.reshape(-1), rows[2])
            return out_XD.reshape(x_BTD.shape)

        if kernels.why_not(x_D.reshape(-1, x_D.shape[-1])) is None:
            return over_batch(kernel, (dx_D, x_D, factor_D1, dresidual_D))
    return norm_gradient_reference(dx_D, x_D, factor_D1, dresidual_D)


def norm_gradient_reference(dx_D: jax.Array, x_D: jax.Array, factor_D1: jax.Array, dresidual_D: jax.Array) -> jax.Array:
    """The same, plainly."""
    wide_D, x_wide_D = dx_D.astype(jnp.float32), x_D.astype(jnp.float32)
    along_D1 = jnp.mean(wide_D * x_wide_D, axis=-1, keepdims=True) * jnp.square(factor_D1)
    return (wide_D - x_wide_D * along_D1 + dresidual_D.astype(jnp.float32)).astype(x_D.dtype)


def inverse_rms(x_D: jax.Array, *, eps: float) -> jax.Array:
    """Returns 1 / sqrt(mean(x^2) + eps) in float32, with a last dimension of one."""
    wide_D = x_D.astype(jnp.float32)
    return jax.lax.rsqrt(jnp.mean(jnp.square(wide_D), axis=-1, keepdims=True) + eps)


def rms_norm(x_D: jax.Array, gain_D: jax.Array | None, *, eps: float, offset: bool = False) -> jax.Array:
    """Scales each vector to unit root mean square, then by the gain. Zhang & Sennrich 2019, arXiv:1910.07467.

    `gain_D` may be None for no gain; with `offset` it is the gain's difference from one, as Gemma stores it.
    """
    return _scaled(x_D, gain_D + 1.0 if offset and gain_D is not None else gain_D, inverse_rms(x_D, eps=eps))


def _scaled(x_D: jax.Array, gain_D: jax.Array | None, factor_D1: jax.Array) -> jax.Array:
    y_D = x_D.astype(jnp.float32) * factor_D1
    if gain_D is not None:
        y_D = y_D * _aligned(gain_D, y_D)
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
