"""Projections: several of one input as one matrix product, and the one behind an activation."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from slmjax.config import Activation
from slmjax.ops.activation import activate


def project(x_BTD: jax.Array, weights: Sequence[jax.Array]) -> jax.Array:
    """Returns the products of x_BTD with each of the weights (D, ...), side by side along the last dimension.

    The weights are put side by side and multiplied at once: that reads x once, is larger, and gives x one gradient
    instead of a sum of several, for a copy of the weights, which is little beside the activations of a training step.
    With fewer tokens than D (decoding) it is the products that are put side by side.
    """
    flat = [weight.reshape(weight.shape[0], -1) for weight in weights]
    if len(flat) == 1:
        return _multiply(x_BTD, flat[0])
    if math.prod(x_BTD.shape[:-1]) < x_BTD.shape[-1]:
        return jnp.concatenate([x_BTD @ weight for weight in flat], axis=-1)
    return _multiply(x_BTD, jnp.concatenate(flat, axis=1))


def take_apart(joined_BTF: jax.Array, shapes: Sequence[tuple[int, ...]]) -> list[jax.Array]:
    """Returns an array (B, T, *shape) for each shape: the products that `project` put side by side."""
    # lax.split, because its transpose is one concatenation.
    pieces = jax.lax.split(joined_BTF, [math.prod(shape) for shape in shapes], axis=joined_BTF.ndim - 1)
    return [piece.reshape(*piece.shape[:-1], *shape) for piece, shape in zip(pieces, shapes, strict=True)]


@jax.custom_vjp
def _multiply(x_BTD: jax.Array, w_DF: jax.Array) -> jax.Array:
    return x_BTD @ w_DF


def _multiply_forward(x_BTD: jax.Array, w_DF: jax.Array):
    return x_BTD @ w_DF, (x_BTD, w_DF)


def _multiply_backward(saved, dy_BTF: jax.Array):
    x_BTD, w_DF = saved
    # Without the barrier XLA puts the gradient together from its pieces twice, once for each product.
    dy_BTF = jax.lax.optimization_barrier(dy_BTF)
    return jnp.einsum("...F,DF->...D", dy_BTF, w_DF), jnp.einsum("...D,...F->DF", x_BTD, dy_BTF)


_multiply.defvjp(_multiply_forward, _multiply_backward)


def project_activated(x_BTF: jax.Array, w_FD: jax.Array, *, activation: Activation, gated: bool) -> jax.Array:
    """Returns activation(x_BTF) @ w_FD; if gated, activation(gate) * up of the halves [gate, up] of the last dimension.

    What is multiplied is not kept for the backward pass but computed again there: a third less memory for a gated
    feed-forward.
    """
    return _activated_product(activation, gated, x_BTF, w_FD)


def project_activated_reference(x_BTF: jax.Array, w_FD: jax.Array, *, activation: Activation, gated: bool) -> jax.Array:
    """The same, plainly, differentiated by JAX."""
    return _activated(activation, gated, x_BTF) @ w_FD


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _activated_product(activation: Activation, gated: bool, x_BTF: jax.Array, w_FD: jax.Array) -> jax.Array:
    return _activated(activation, gated, x_BTF) @ w_FD


def _activated(activation: Activation, gated: bool, x_BTF: jax.Array) -> jax.Array:
    wide_BTF = x_BTF.astype(jnp.float32)
    if not gated:
        return activate(activation, wide_BTF).astype(x_BTF.dtype)
    gate_BTF, up_BTF = jax.lax.split(wide_BTF, (x_BTF.shape[-1] // 2,) * 2, axis=x_BTF.ndim - 1)
    return (activate(activation, gate_BTF) * up_BTF).astype(x_BTF.dtype)


def _activated_forward(activation: Activation, gated: bool, x_BTF: jax.Array, w_FD: jax.Array):
    return _activated_product(activation, gated, x_BTF, w_FD), (x_BTF, w_FD)


def _activated_backward(activation: Activation, gated: bool, saved, dy_BTD: jax.Array):
    # Without the barrier XLA finds that the forward pass computed the same, and keeps that.
    x_BTF, w_FD, dy_BTD = jax.lax.optimization_barrier((*saved, dy_BTD))
    h_BTF, pull = jax.vjp(lambda x_BTF: _activated(activation, gated, x_BTF), x_BTF)
    dx_BTF = pull(jnp.einsum("...D,FD->...F", dy_BTD, w_FD))[0]
    return dx_BTF, jnp.einsum("...F,...D->FD", h_BTF, dy_BTD)


_activated_product.defvjp(_activated_forward, _activated_backward)
