"""Which weight gets which distribution, in one table.

| weight | distribution |
|---|---|
| embed_VD, unembed_VD | normal, `embedding_std`, or `std` |
| w_o_*, w_down_* (back into the residual stream) | normal `std`; / sqrt(2 layers), or zero, if the config says so |
| w_*, router_* | normal `std` |
| gain_* | one; gain_offset_* zero |
| b_*, balance_bias_*, sinks_* | zero |

Each weight's key is derived from its path, so adding one weight changes no other.
"""

import zlib

import jax
import jax.numpy as jnp

from slmjax.config import ModelConfig
from slmjax.model.spec import ParamSpec
from slmjax.model.transformer import Params, specs


def init(key: jax.Array, config: ModelConfig) -> Params:
    """Returns float32 parameters for `config`, as `model.apply` takes them."""

    def draw(path, spec: ParamSpec):
        name = "/".join(part.key for part in path)
        leaf = path[-1].key
        if leaf.startswith("gain_") and not leaf.startswith("gain_offset_"):
            return jnp.ones(spec.shape, jnp.float32)
        std = standard_deviation(leaf, config)
        if std == 0:
            return jnp.zeros(spec.shape, jnp.float32)
        leaf_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return std * jax.random.normal(leaf_key, spec.shape, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, specs(config))


def standard_deviation(leaf: str, config: ModelConfig) -> float:
    """Returns the standard deviation of the weight called `leaf`; 0 is a constant zero.

    Raises:
      ValueError: the table does not know the name.
    """
    rules = config.init
    std = config.width**-0.5 if rules.std is None else rules.std
    if leaf in ("embed_VD", "unembed_VD"):
        return std if rules.embedding_std is None else rules.embedding_std
    if leaf.startswith(("w_o_", "w_down_")):
        if rules.zero_residual_outputs:
            return 0.0
        return std / (2 * config.num_layers) ** 0.5 if rules.scale_residual_outputs else std
    if leaf.startswith(("w_", "router_")):
        return std
    if leaf.startswith(("gain_offset_", "b_", "balance_bias_", "sinks_")):
        return 0.0
    raise ValueError(f"no initialisation is known for a weight called {leaf!r}: add a row to the table")
