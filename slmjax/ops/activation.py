"""Elementwise activations of feed-forwards."""

import jax
import jax.numpy as jnp

from slmjax.config import Activation


def activate(name: Activation, x: jax.Array) -> jax.Array:
    """Applies the activation called `name`; "gelu" is exact, "gelu_tanh" Gemma's, "relu2" relu squared."""
    match name:
        case "silu":
            return jax.nn.silu(x)
        case "gelu":
            return jax.nn.gelu(x, approximate=False)
        case "gelu_tanh":
            return jax.nn.gelu(x, approximate=True)
        case "relu":
            return jax.nn.relu(x)
        case "relu2":
            return jnp.square(jax.nn.relu(x))
    raise ValueError(f"unknown activation {name!r}")
