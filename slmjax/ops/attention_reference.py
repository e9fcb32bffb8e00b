"""Attention as its definition says: every score exists. The yardstick of the others, and the fastest on short rows."""

import jax
import jax.numpy as jnp

from slmjax.ops.mask import AttentionMask, dense


def attention_reference(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: AttentionMask,
    *,
    scale: float,
    softcap: float | None = None,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """Returns softmax(scale * q k^T) v as out_BTNH, with scores and softmax in float32. Memory grows with T * S."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = scale * jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    if softcap is not None:
        scores_BKGTS = softcap * jnp.tanh(scores_BKGTS / softcap)
    scores_BKGTS = jnp.where(dense(mask, B, T, S)[:, None, None], scores_BKGTS, -jnp.inf)
    peak_BKGT1 = jnp.max(scores_BKGTS, axis=-1, keepdims=True)
    if sinks_N is not None:
        sinks_BKGT1 = sinks_N.astype(jnp.float32).reshape(1, K, N // K, 1, 1)
        peak_BKGT1 = jnp.maximum(peak_BKGT1, sinks_BKGT1)
    # A query that sees nothing has no finite score; with peak 0 all its weights are exp(-inf) = 0.
    peak_BKGT1 = jax.lax.stop_gradient(jnp.where(jnp.isfinite(peak_BKGT1), peak_BKGT1, 0.0))
    weights_BKGTS = jnp.exp(scores_BKGTS - peak_BKGT1)
    total_BKGT1 = jnp.sum(weights_BKGTS, axis=-1, keepdims=True)
    if sinks_N is not None:
        total_BKGT1 += jnp.exp(sinks_BKGT1 - peak_BKGT1)
    weights_BKGTS /= jnp.where(total_BKGT1 == 0.0, 1.0, total_BKGT1)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS.astype(v_BSKH.dtype), v_BSKH)
    return out_BTKGH.reshape(B, T, N, H)
