"""Keys and values of the tokens seen so far, for generation one token at a time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from slmjax.config import ModelConfig
from slmjax.model.plan import plan


class LayerCache(NamedTuple):
    """Keys and values of one layer; slot s holds position s of each row."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array


def make_cache(config: ModelConfig, batch_size: int, capacity: int, dtype=jnp.float32) -> list:
    """Returns an empty cache for `capacity` positions: per group and layer of its unit a `LayerCache`.

    Arrays are stacked (L, R, B, S, K, H), L stored layers of the group and R executions of each.
    """

    def empty(layer, count):
        heads = layer.mixer
        shape = (count, config.block_repeats, batch_size, capacity, heads.num_kv_heads, heads.head_dim)
        return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    return [[empty(layer, group.count) for layer in group.unit] for group in plan(config)]


def update(cache: LayerCache, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array) -> LayerCache:
    """Writes keys and values into the slots that `positions_BT` names; positions past the capacity are dropped."""
    rows_B1 = jnp.arange(k_BTKH.shape[0])[:, None]

    def write(slots_BSKH, new_BTKH):
        return slots_BSKH.at[rows_B1, positions_BT].set(new_BTKH.astype(slots_BSKH.dtype), mode="drop")

    return LayerCache(write(cache.k_BSKH, k_BTKH), write(cache.v_BSKH, v_BTKH))
