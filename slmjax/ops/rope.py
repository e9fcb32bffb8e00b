"""Rotary position embedding, Su et al. 2021, arXiv:2104.09864."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.config import Llama3RopeScalingConfig, RopeConfig


def rope_frequencies(head_dim: int, config: RopeConfig) -> np.ndarray:
    """Returns float32 angles per position (R / 2): theta ** (-2 i / R) for R = head_dim * rotated_fraction channels."""
    rotated = int(head_dim * config.rotated_fraction)
    frequencies = config.theta ** (-np.arange(0, rotated, 2, dtype=np.float64) / rotated)
    if config.scaling is not None:
        frequencies = _llama3_scaled(frequencies, config.scaling)
    return frequencies.astype(np.float32)


def _llama3_scaled(frequencies: np.ndarray, scaling: Llama3RopeScalingConfig) -> np.ndarray:
    """Divides frequencies that turn less than `low_frequency_factor` times in `original_length` by `factor`."""
    turns = scaling.original_length * frequencies / (2 * math.pi)
    span = scaling.high_frequency_factor - scaling.low_frequency_factor
    kept = np.clip((turns - scaling.low_frequency_factor) / span, 0.0, 1.0)
    return frequencies * (kept + (1 - kept) / scaling.factor)


@jax.named_scope("rope")
def apply_rope(x_BTNH: jax.Array, positions_BT: jax.Array, frequencies: np.ndarray) -> jax.Array:
    """Rotates channel i with channel i + R / 2 by position * frequency i; channels from R on pass unchanged.

    Angles stay float32, since bfloat16 rounds position 257 to 256.
    """
    half = frequencies.shape[0]
    angles_BTR = positions_BT.astype(jnp.float32)[..., None] * jnp.asarray(frequencies)[None, None]
    cos_BT11R, sin_BT11R = (f(angles_BTR)[:, :, None, None] for f in (jnp.cos, jnp.sin))
    # Halves are exchanged by reversing a dimension of two: pieces joined to one would be what a GPU does slowly when
    # gradients of queries, keys and values are joined too.
    wide_BTN2R = x_BTNH[..., : 2 * half].astype(jnp.float32).reshape(*x_BTNH.shape[:3], 2, half)
    sign_21 = jnp.array([-1.0, 1.0], jnp.float32)[None, None, None, :, None]
    turned_BTN2R = wide_BTN2R * cos_BT11R + jnp.flip(wide_BTN2R, 3) * (sign_21 * sin_BT11R)
    turned = turned_BTN2R.reshape(*x_BTNH.shape[:3], 2 * half).astype(x_BTNH.dtype)
    return jnp.concatenate((turned, x_BTNH[..., 2 * half :]), axis=-1) if 2 * half < x_BTNH.shape[-1] else turned
