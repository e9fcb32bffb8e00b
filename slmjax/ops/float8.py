"""Matrix products of 8-bit floats (Micikevicius et al. 2022, arXiv:2209.05433), with one scale for each operand.

The scale is the smallest power of two under which the operand's present largest value fits, so that scaling rounds
nothing. XLA turns the product into cuBLAS's for 8-bit floats on GPUs that have one, if its own Triton products are off
(slmjax/train/compiler.py); anywhere else the operands are rounded the same and multiplied in their former dtype.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Forward operands want precision, gradients range.
FORWARD, GRADIENT = jnp.float8_e4m3fn, jnp.float8_e5m2


class Scaled(NamedTuple):
    """An array as values * scale: 8-bit values, and a float32 power of two."""

    values: jax.Array
    scale: jax.Array


def scale_of(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns the smallest power of two s, 2^-126 at least, with max |x| <= s * largest number of `dtype`."""
    ratio = jnp.max(jnp.abs(x)).astype(jnp.float32) / float(jnp.finfo(dtype).max)
    # The next power of two: the bits of the exponent, one more if the fraction has any.
    bits = jax.lax.bitcast_convert_type(jnp.maximum(ratio, jnp.finfo(jnp.float32).tiny), jnp.int32)
    return jax.lax.bitcast_convert_type((bits + 0x007FFFFF) & 0x7F800000, jnp.float32)


def quantise(x: jax.Array, dtype: jax.typing.DTypeLike, scale: jax.Array | None = None) -> Scaled:
    """Rounds x to 8-bit floats times `scale`, by default `scale_of` x."""
    scale = scale_of(x, dtype) if scale is None else scale
    return Scaled((x.astype(jnp.float32) / scale).astype(dtype), scale)


def dequantise(x: Scaled, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns values * scale in `dtype`; before a matrix product XLA knows these two operations as an 8-bit operand."""
    return x.values.astype(dtype) * x.scale.astype(dtype)
