"""Matrix products of groups of rows, each with a matrix of its own, and the mixture-of-experts feed-forward on them."""

import jax
import jax.numpy as jnp

from slmjax.config import Activation
from slmjax.ops.activation import activate


def grouped_matmul(x_XD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """Multiplies the first group_sizes[0] rows with w[0], the next group_sizes[1] with w[1], and so on; out (X, F)."""
    return jax.lax.ragged_dot(x_XD, w_EDF, group_sizes_E)


def grouped_matmul_reference(x_XD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """The same, plainly: every row with every matrix, and the right one kept."""
    ends_E = jnp.cumsum(group_sizes_E)
    expert_X = jnp.sum(jnp.arange(x_XD.shape[0])[:, None] >= ends_E[None], axis=1)
    keep_XE = jax.nn.one_hot(expert_X, w_EDF.shape[0], dtype=x_XD.dtype)
    return jnp.einsum("XD,EDF,XE->XF", x_XD, w_EDF, keep_XE)


def moe_feed_forward(
    x_XD: jax.Array,
    ids_XK: jax.Array,
    weights_XK: jax.Array,
    *,
    w_up_EDF: jax.Array,
    w_gate_EDF: jax.Array | None,
    w_down_EFD: jax.Array,
    activation: Activation,
) -> jax.Array:
    """Returns sum over k of weights[x, k] * expert ids[x, k] of x; no token is dropped (MegaBlocks, arXiv:2211.15841).

    Assignments are sorted by expert, so that each expert's rows lie together, and put back in order afterwards.
    """
    num_experts, k = w_up_EDF.shape[0], ids_XK.shape[1]
    expert_A = ids_XK.reshape(-1)
    order_A = jnp.argsort(expert_A, stable=True)
    group_sizes_E = jnp.bincount(expert_A, length=num_experts).astype(jnp.int32)
    x_AD = x_XD[order_A // k]
    up_AF = grouped_matmul(x_AD, w_up_EDF, group_sizes_E)
    if w_gate_EDF is None:
        h_AF = activate(activation, up_AF)
    else:
        h_AF = activate(activation, grouped_matmul(x_AD, w_gate_EDF, group_sizes_E)) * up_AF
    y_AD = grouped_matmul(h_AF, w_down_EFD, group_sizes_E)
    y_AD = jnp.zeros_like(y_AD).at[order_A].set(y_AD, unique_indices=True)
    return jnp.einsum("XKD,XK->XD", y_AD.reshape(-1, k, y_AD.shape[-1]), weights_XK.astype(y_AD.dtype))
