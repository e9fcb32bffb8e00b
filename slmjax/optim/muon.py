"""Muon: momentum whose matrices are orthogonalised by Newton-Schulz iterations.

optax.contrib.muon is not used because it iterates in the dtype of the parameters (on GPUs and TPUs float32 products
cost several times bfloat16's, which is what the method was designed for) and lends its Nesterov flag to its AdamW part.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from slmjax import axes

# Jordan et al. 2024: the quintic that lifts small singular values fastest; it leaves them in about [0.7, 1.2].
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# The same root mean square of an update as AdamW's typical one, Liu et al. 2025, arXiv:2502.16982, section 2.2.
ADAMW_RMS = 0.2


class MuonState(NamedTuple):
    """Momentum, a float32 tree like the parameters."""

    momentum: Any


def matrix_shape(shape: tuple[int, ...], logical_axes: tuple[str, ...]) -> tuple[int, int, int]:
    """Returns (matrices, in, out): leading layers and experts are a batch, heads and their width are one side.

    Raises:
      ValueError: if what is left is not two-sided.
    """
    count = sum(axis in (axes.LAYERS, axes.EXPERT) for axis in logical_axes)
    batched = all(axis in (axes.LAYERS, axes.EXPERT) for axis in logical_axes[:count])
    sides = []
    for size, axis in zip(shape[count:], logical_axes[count:], strict=True):
        if axis == axes.HEAD_DIM and sides:
            sides[-1] *= size
        else:
            sides.append(size)
    if not batched or len(sides) != 2:
        raise ValueError(
            f"Muon needs leading layers or experts, then two sides, with heads and head_dim as one; got the axes "
            f"{logical_axes} of shape {shape}. Give such a parameter another group in slmjax/optim/groups.py"
        )
    return math.prod(shape[:count]), *sides


def orthogonalise(x_BIO: jax.Array, *, steps: int, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """Moves the singular values of each (in, out) matrix to about one: X <- a X + (b A + c A A) X with A = X X^T.

    Products are taken in `dtype`, the norm that brings singular values below one in float32. A zero matrix stays zero.
    """
    a, b, c = COEFFICIENTS
    x_BIO = x_BIO.astype(jnp.float32)
    # The 1e-12 only keeps zero from becoming NaN.
    x_BIO = x_BIO / (jnp.sqrt(jnp.sum(x_BIO * x_BIO, axis=(1, 2), keepdims=True)) + 1e-12)
    wide = x_BIO.shape[1] <= x_BIO.shape[2]
    # The Gram matrix is that of the shorter side.
    x_BRC = (x_BIO if wide else x_BIO.mT).astype(dtype)
    for _ in range(steps):
        gram_BRR = x_BRC @ x_BRC.mT
        x_BRC = a * x_BRC + (b * gram_BRR + c * (gram_BRR @ gram_BRR)) @ x_BRC
    return (x_BRC if wide else x_BRC.mT).astype(jnp.float32)


def scale_by_muon(
    specs: Any, *, momentum: float, nesterov: bool, steps: int, dtype: jax.typing.DTypeLike | None = None
) -> optax.GradientTransformation:
    """Replaces gradients by 0.2 * sqrt(max(in, out)) times their orthogonalised momentum.

    Momentum is an exponential average, M <- momentum M + (1 - momentum) G; what is orthogonalised is M, or with
    Nesterov momentum M + (1 - momentum) G.

    Args:
      specs: tree of ParamSpec, with optax.MaskedNode() for the parameters that another rule takes.
      momentum: decay of the average.
      nesterov: whether to look one step ahead.
      steps: Newton-Schulz iterations.
      dtype: of their products; None is float32 on CPUs, which emulate bfloat16, and bfloat16 elsewhere.
    """

    def init(params):
        return MuonState(jax.tree.map(lambda param: jnp.zeros_like(param, dtype=jnp.float32), params))

    def direction(update, spec):
        product_dtype = dtype or (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
        matrices, rows, columns = matrix_shape(spec.shape, spec.logical_axes)
        x_BIO = orthogonalise(update.reshape(matrices, rows, columns), steps=steps, dtype=product_dtype)
        return ADAMW_RMS * math.sqrt(max(rows, columns)) * x_BIO.reshape(update.shape)

    def update(updates, state, params=None):
        del params
        mixed = lambda average, update: momentum * average + (1 - momentum) * update  # noqa: E731
        average = jax.tree.map(mixed, state.momentum, updates)
        looked_ahead = jax.tree.map(mixed, average, updates) if nesterov else average
        return jax.tree.map(direction, looked_ahead, specs), MuonState(average)

    return optax.GradientTransformation(init, update)
