"""Projections: several of one input as one matrix product, behind a norm and behind an activation.

Either in the dtype of their operands or in 8-bit floats ("float8", see ops.float8): the operands of the forward pass
are rounded to e4m3, gradients to e5m2, one scale for each; products are accumulated in float32.

An RMS norm before a projection is (x / rms(x) * gain) @ W = (x @ (gain * W)) / rms(x): the gain goes into the weights,
and the factor of each token into whatever reads the product. The normalised input is never written, the gradient of the
gain is a sum over the weights' gradient instead of one over all tokens, and the backward pass needs x, which is kept
anyway. How the factor depends on x is the business of `ops.norm.norm_branch`.
"""

import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from slmjax.config import Activation
from slmjax.ops.activation import activate
from slmjax.ops.float8 import FORWARD, GRADIENT, Scaled, dequantise, quantise
from slmjax.ops.norm import PendingNorm

Products = Literal["compute_dtype", "float8"]


class Projected(NamedTuple):
    """Products with several weights, side by side along the last dimension, and a factor they still are to be given.

    Whoever reads the values multiplies each by its token's factor once: `project` takes that for granted in its
    gradient, and the factor itself carries none.
    """

    values_BTF: jax.Array
    factor_BT1: jax.Array | None

    def finished(self) -> jax.Array:
        """Returns the products."""
        return _finished(self.values_BTF, self.factor_BT1).astype(self.values_BTF.dtype)

    def take_apart(self, shapes: Sequence[tuple[int, ...]]) -> list[jax.Array]:
        """Returns an array (B, T, *shape) for each shape."""
        # lax.split, because its transpose is one concatenation.
        pieces = jax.lax.split(self.values_BTF, [math.prod(shape) for shape in shapes], axis=self.values_BTF.ndim - 1)
        pieces = [Projected(piece, self.factor_BT1).finished() for piece in pieces]
        return [piece.reshape(*piece.shape[:-1], *shape) for piece, shape in zip(pieces, shapes, strict=True)]


def project(
    x: jax.Array | PendingNorm, weights: Sequence[jax.Array], *, products: Products = "compute_dtype"
) -> Projected:
    """Returns the products of x (B, T, D) with each of the weights (D, ...).

    The weights are put side by side and multiplied at once: that reads x once, is larger, and gives x one gradient
    instead of a sum of several, for a copy of the weights, which is little beside the activations of a training step.
    With fewer tokens than D (decoding) weights are left as they are. float8 rounds normalised inputs: the others differ
    too much from token to token for one scale.
    """
    flat = [weight.reshape(weight.shape[0], -1) for weight in weights]
    few = few_tokens(x.x_D if isinstance(x, PendingNorm) else x)
    if isinstance(x, PendingNorm):
        if not few and products == "compute_dtype":
            weights_DF = jnp.concatenate(flat, axis=1)
            product_BTF: jax.Array = _multiply_with_gain(x.x_D, x.gain_D, weights_DF)
            return Projected(product_BTF, x.factor_D1)
        x = x.applied()
    if few:
        return Projected(jnp.concatenate([_multiply(products, x, weight) for weight in flat], axis=-1), None)
    return Projected(_multiply(products, x, jnp.concatenate(flat, axis=1)), None)


def few_tokens(x: jax.Array) -> bool:
    """Whether x (B, T, D) has so few tokens, as in decoding, that copies of weights would not pay."""
    return math.prod(x.shape[:-1]) < x.shape[-1]


def project_activated(
    x: Projected,
    w_FD: jax.Array,
    *,
    activation: Activation,
    gated: bool,
    recompute: bool = False,
    products: Products = "compute_dtype",
) -> jax.Array:
    """Returns activation(x) @ w_FD; if gated, activation(gate) * up of the halves [gate, up] of x's last dimension.

    With `recompute`, what is multiplied is not kept for the backward pass but computed again there: a third less memory
    for a gated feed-forward.
    """
    if recompute:
        factor_BT1 = None if x.factor_BT1 is None else jax.lax.stop_gradient(x.factor_BT1)
        return _multiply_activated(activation, gated, products, x.values_BTF, factor_BT1, w_FD)
    return _multiply(products, _activated(activation, gated, *x), w_FD)


@jax.custom_vjp
def _multiply_with_gain(x_BTD: jax.Array, gain_D: jax.Array | None, w_DF: jax.Array) -> jax.Array:
    """Returns x @ (gain * w)."""
    return _multiply_with_gain_forward(x_BTD, gain_D, w_DF)[0]


def _multiply_with_gain_forward(x_BTD, gain_D, w_DF):
    scaled_DF = with_gain(gain_D, w_DF)
    # The scaled weights are kept too: made again, they would be gathered again where weights are sharded.
    return x_BTD @ scaled_DF, (x_BTD, gain_D, w_DF, scaled_DF)


def multiply_with_gain_backward(saved, dy_BTF: jax.Array):
    """Returns the gradients of x, the gain and w; saved are these and gain * w."""
    x_BTD, gain_D, w_DF, scaled_DF = saved
    dy_BTF = jax.lax.optimization_barrier(dy_BTF)
    dx_BTD = _dot("...F,DF->...D", dy_BTF, scaled_DF, x_BTD.dtype)
    dw_DF = _dot("...D,...F->DF", x_BTD, dy_BTF, w_DF.dtype)
    if gain_D is None:
        return dx_BTD, None, dw_DF
    dgain_D = jnp.sum(dw_DF.astype(jnp.float32) * w_DF.astype(jnp.float32), axis=1).astype(gain_D.dtype)
    return dx_BTD, dgain_D, with_gain(gain_D, dw_DF)


_multiply_with_gain.defvjp(_multiply_with_gain_forward, multiply_with_gain_backward)


def with_gain(gain_D: jax.Array | None, w_DF: jax.Array) -> jax.Array:
    """Returns gain * w, rounded to the dtype of w."""
    if gain_D is None:
        return w_DF
    return (gain_D.astype(jnp.float32)[:, None] * w_DF.astype(jnp.float32)).astype(w_DF.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(products: Products, x_BTD: jax.Array, w_DF: jax.Array) -> jax.Array:
    return _multiply_forward(products, x_BTD, w_DF)[0]


def _multiply_forward(products: Products, x_BTD: jax.Array, w_DF: jax.Array):
    x, w = _operand(products, x_BTD), _operand(products, w_DF)
    # What is kept is what was multiplied: for float8 half the bytes of x.
    return _dot("...D,DF->...F", x, w, x_BTD.dtype), (x, w)


def _multiply_backward(products: Products, saved, dy_BTF: jax.Array):
    x, w = saved
    # Without the barrier XLA puts the gradient together from its pieces twice, once for each product.
    dy_BTF = jax.lax.optimization_barrier(dy_BTF)
    dy = _operand(products, dy_BTF, GRADIENT)
    return _dot("...F,DF->...D", dy, w, dy_BTF.dtype), _dot("...D,...F->DF", x, dy, dy_BTF.dtype)


_multiply.defvjp(_multiply_forward, _multiply_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _multiply_activated(activation: Activation, gated: bool, products: Products, x_BTF, factor_BT1, w_FD) -> jax.Array:
    return _multiply_activated_forward(activation, gated, products, x_BTF, factor_BT1, w_FD)[0]


def _multiply_activated_forward(activation: Activation, gated: bool, products: Products, x_BTF, factor_BT1, w_FD):
    h = _operand(products, _apply(activation, gated, x_BTF, factor_BT1))
    y_BTD = _dot("...F,FD->...D", h, _operand(products, w_FD), x_BTF.dtype)
    return y_BTD, (x_BTF, factor_BT1, w_FD, h.scale if isinstance(h, Scaled) else None)


def _multiply_activated_backward(activation: Activation, gated: bool, products: Products, saved, dy_BTD: jax.Array):
    # Without the barrier XLA finds that the forward pass computed the same, and keeps that.
    (x_BTF, factor_BT1, w_FD, scale), dy_BTD = jax.lax.optimization_barrier((saved, dy_BTD))
    dy = _operand(products, dy_BTD, GRADIENT)
    h_BTF, pull = jax.vjp(lambda x_BTF: _apply(activation, gated, x_BTF, factor_BT1), x_BTF)
    (dx_BTF,) = pull(_dot("...D,FD->...F", dy, _operand(products, w_FD), dy_BTD.dtype))
    dfactor_BT1 = None if factor_BT1 is None else jnp.zeros_like(factor_BT1)
    return dx_BTF, dfactor_BT1, _dot("...F,...D->FD", _operand(products, h_BTF, scale=scale), dy, dy_BTD.dtype)


_multiply_activated.defvjp(_multiply_activated_forward, _multiply_activated_backward)


def _apply(activation: Activation, gated: bool, x_BTF: jax.Array, factor_BT1: jax.Array | None) -> jax.Array:
    wide_BTF = _finished(x_BTF, factor_BT1)
    if not gated:
        return activate(activation, wide_BTF).astype(x_BTF.dtype)
    gate_BTF, up_BTF = jax.lax.split(wide_BTF, (x_BTF.shape[-1] // 2,) * 2, axis=x_BTF.ndim - 1)
    return (activate(activation, gate_BTF) * up_BTF).astype(x_BTF.dtype)


# JAX's own gradient would keep the float32 halves.
_activated = jax.custom_vjp(_apply, nondiff_argnums=(0, 1))


def _activated_forward(activation: Activation, gated: bool, x_BTF: jax.Array, factor_BT1: jax.Array | None):
    return _apply(activation, gated, x_BTF, factor_BT1), (x_BTF, factor_BT1)


def _activated_backward(activation: Activation, gated: bool, saved, dh_BTF: jax.Array):
    x_BTF, factor_BT1 = saved
    (dx_BTF,) = jax.vjp(lambda x_BTF: _apply(activation, gated, x_BTF, factor_BT1), x_BTF)[1](dh_BTF)
    return dx_BTF, None if factor_BT1 is None else jnp.zeros_like(factor_BT1)


_activated.defvjp(_activated_forward, _activated_backward)


def _finished(values_BTF: jax.Array, factor_BT1: jax.Array | None) -> jax.Array:
    wide_BTF = values_BTF.astype(jnp.float32)
    return wide_BTF if factor_BT1 is None else wide_BTF * jax.lax.stop_gradient(factor_BT1)


def _operand(
    products: Products, x: jax.Array, float8: jax.typing.DTypeLike = FORWARD, scale: jax.Array | None = None
) -> jax.Array | Scaled:
    return quantise(x, float8, scale) if products == "float8" else x


def _dot(subscripts: str, a: jax.Array | Scaled, b: jax.Array | Scaled, dtype: jax.typing.DTypeLike) -> jax.Array:
    a, b = (dequantise(each, dtype) if isinstance(each, Scaled) else each for each in (a, b))
    return jnp.einsum(subscripts, a, b)
