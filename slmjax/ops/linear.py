"""Projections: several of one input as one matrix product, and the one behind an activation.

Either in the dtype of their operands or in 8-bit floats ("float8", see ops.float8): the operands of the forward pass
are rounded to e4m3, gradients to e5m2, one scale for each; products are accumulated in float32.
"""

import functools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from slmjax.config import Activation
from slmjax.ops.activation import activate
from slmjax.ops.float8 import FORWARD, GRADIENT, Scaled, dequantise, quantise

Products = Literal["compute_dtype", "float8"]


def project(x_BTD: jax.Array, weights: Sequence[jax.Array], *, products: Products = "compute_dtype") -> jax.Array:
    """Returns the products of x_BTD with each of the weights (D, ...), side by side along the last dimension.

    The weights are put side by side and multiplied at once: that reads x once, is larger, and gives x one gradient
    instead of a sum of several, for a copy of the weights, which is little beside the activations of a training step.
    With fewer tokens than D (decoding) it is the products that are put side by side.
    """
    flat = [weight.reshape(weight.shape[0], -1) for weight in weights]
    if len(flat) > 1 and math.prod(x_BTD.shape[:-1]) < x_BTD.shape[-1]:
        return jnp.concatenate([_multiply(products, x_BTD, weight) for weight in flat], axis=-1)
    return _multiply(products, x_BTD, flat[0] if len(flat) == 1 else jnp.concatenate(flat, axis=1))


def take_apart(joined_BTF: jax.Array, shapes: Sequence[tuple[int, ...]]) -> list[jax.Array]:
    """Returns an array (B, T, *shape) for each shape: the products that `project` put side by side."""
    # lax.split, because its transpose is one concatenation.
    pieces = jax.lax.split(joined_BTF, [math.prod(shape) for shape in shapes], axis=joined_BTF.ndim - 1)
    return [piece.reshape(*piece.shape[:-1], *shape) for piece, shape in zip(pieces, shapes, strict=True)]


def project_activated(
    x_BTF: jax.Array, w_FD: jax.Array, *, activation: Activation, gated: bool, products: Products = "compute_dtype"
) -> jax.Array:
    """Returns activation(x_BTF) @ w_FD; if gated, activation(gate) * up of the halves [gate, up] of the last dimension.

    What is multiplied is not kept for the backward pass but computed again there: a third less memory for a gated
    feed-forward.
    """
    return _multiply_activated(activation, gated, products, x_BTF, w_FD)


def project_activated_reference(x_BTF: jax.Array, w_FD: jax.Array, *, activation: Activation, gated: bool) -> jax.Array:
    """The same, plainly, differentiated by JAX."""
    return _activated(activation, gated, x_BTF) @ w_FD


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
def _multiply_activated(activation: Activation, gated: bool, products: Products, x_BTF, w_FD) -> jax.Array:
    return _multiply_activated_forward(activation, gated, products, x_BTF, w_FD)[0]


def _multiply_activated_forward(activation: Activation, gated: bool, products: Products, x_BTF, w_FD):
    h = _operand(products, _activated(activation, gated, x_BTF))
    y_BTD = _dot("...F,FD->...D", h, _operand(products, w_FD), x_BTF.dtype)
    return y_BTD, (x_BTF, w_FD, h.scale if isinstance(h, Scaled) else None)


def _multiply_activated_backward(activation: Activation, gated: bool, products: Products, saved, dy_BTD: jax.Array):
    # Without the barrier XLA finds that the forward pass computed the same, and keeps that.
    (x_BTF, w_FD, scale), dy_BTD = jax.lax.optimization_barrier((saved, dy_BTD))
    dy = _operand(products, dy_BTD, GRADIENT)
    h_BTF, pull = jax.vjp(lambda x_BTF: _activated(activation, gated, x_BTF), x_BTF)
    (dx_BTF,) = pull(_dot("...D,FD->...F", dy, _operand(products, w_FD), dy_BTD.dtype))
    return dx_BTF, _dot("...F,...D->FD", _operand(products, h_BTF, scale=scale), dy, dy_BTD.dtype)


_multiply_activated.defvjp(_multiply_activated_forward, _multiply_activated_backward)


def _activated(activation: Activation, gated: bool, x_BTF: jax.Array) -> jax.Array:
    wide_BTF = x_BTF.astype(jnp.float32)
    if not gated:
        return activate(activation, wide_BTF).astype(x_BTF.dtype)
    gate_BTF, up_BTF = jax.lax.split(wide_BTF, (x_BTF.shape[-1] // 2,) * 2, axis=x_BTF.ndim - 1)
    return (activate(activation, gate_BTF) * up_BTF).astype(x_BTF.dtype)


def _operand(
    products: Products, x: jax.Array, float8: jax.typing.DTypeLike = FORWARD, scale: jax.Array | None = None
) -> jax.Array | Scaled:
    return quantise(x, float8, scale) if products == "float8" else x


def _dot(subscripts: str, a: jax.Array | Scaled, b: jax.Array | Scaled, dtype: jax.typing.DTypeLike) -> jax.Array:
    a, b = (dequantise(each, dtype) if isinstance(each, Scaled) else each for each in (a, b))
    return jnp.einsum(subscripts, a, b)
