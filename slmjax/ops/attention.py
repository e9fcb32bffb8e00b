"""Attention for every mask: one function, several implementations.

  reference  every score at once; the definition.
  chunked    flash attention in plain XLA: any mask, any platform, memory linear in length.
  cudnn      NVIDIA's fused kernels through `jax.nn`; only where they compute exactly what the mask says.

To add an implementation: write it with the reference's signature, reading the mask by `ops.mask.ranges` and
`kernels.tiles`; say in a `why_not_...` what it cannot do; add its name to `Implementation` and to
`ExecutionConfig.attention`, its line to `choose_implementation` and its case to `attention`. For remat = "attention" it
names what its backward pass needs "attention_out" and "attention_lse", as chunked alone does: of the others that policy
saves nothing. It gets arrays whose sharding XLA decides; a kernel that XLA cannot partition, such as one in Pallas,
also needs a shard_map over the run's mesh, which this module does not know yet.
"""

import functools
import logging
from typing import Literal, assert_never

import jax
import jax.numpy as jnp

from slmjax.ops.attention_chunked import attention_chunked
from slmjax.ops.attention_reference import attention_reference
from slmjax.ops.mask import AttentionMask

__all__ = ["AttentionMask", "attention", "choose_implementation", "why_not_cudnn"]

Implementation = Literal["reference", "chunked", "cudnn"]

_logger = logging.getLogger("slmjax.attention")


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: AttentionMask,
    *,
    scale: float,
    softcap: float | None = None,
    sinks_N: jax.Array | None = None,
    implementation: Implementation | Literal["auto"] = "auto",
) -> jax.Array:
    """Returns softmax(scale * q k^T) v over the keys that `mask` lets each query see, as out_BTNH in q's dtype.

    Query head n reads key/value head n // (N // K) (Ainslie et al. 2023, arXiv:2305.13245). A query that sees no key
    gets zeros. `softcap` is c in c * tanh(scores / c), applied to the scaled scores; `sinks_N` is a logit per head that
    joins the softmax's denominator and has no value (gpt-oss). "auto" chooses by platform, mask and shapes, and logs
    each different choice once.

    Raises:
      ValueError: if shapes or dtypes disagree, or the implementation asked for cannot do this exactly.
    """
    _check(q_BTNH, k_BSKH, v_BSKH, mask, sinks_N)
    if implementation == "auto":
        implementation = choose_implementation(
            q_BTNH, k_BSKH, mask, softcap=softcap, sinks=sinks_N is not None, platform=jax.default_backend()
        )
    match implementation:
        case "reference":
            return attention_reference(q_BTNH, k_BSKH, v_BSKH, mask, scale=scale, softcap=softcap, sinks_N=sinks_N)
        case "chunked":
            return attention_chunked(q_BTNH, k_BSKH, v_BSKH, mask, scale=scale, softcap=softcap, sinks_N=sinks_N)
        case "cudnn":
            reason = why_not_cudnn(q_BTNH, k_BSKH, mask, softcap=softcap, sinks=sinks_N is not None)
            if reason is not None:
                raise ValueError(f"attention implementation 'cudnn' {reason}; use 'chunked' or 'auto'")
            # jax counts the keys before the query's own: a window of w keys is (w - 1, 0).
            window = None if mask.window is None else (mask.window - 1, 0)
            return jax.nn.dot_product_attention(
                *(q_BTNH, k_BSKH, v_BSKH),
                scale=scale,
                is_causal=mask.causal,
                local_window_size=window,
                implementation="cudnn",
            )
        case _:
            assert_never(implementation)


def choose_implementation(
    q_BTNH: jax.Array, k_BSKH: jax.Array, mask: AttentionMask, *, softcap: float | None, sinks: bool, platform: str
) -> Implementation:
    """Returns the implementation that "auto" means on `platform` ("cpu", "gpu", "tpu"), and logs it once."""
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    # One query at a time, as in decoding, is linear in S anyway. On a CPU the chunked form is level at T = 64, 2 to 3
    # times faster at 128 and 4 to 7 times at 512 (forward + backward, float32).
    if T == 1 or T * S <= 64 * 64:
        return _log_once("reference", platform, "there are few scores")
    if platform == "gpu":
        reason = why_not_cudnn(q_BTNH, k_BSKH, mask, softcap=softcap, sinks=sinks)
        return (
            _log_once("cudnn", platform, "exact here")
            if reason is None
            else _log_once("chunked", platform, f"cudnn {reason}")
        )
    return _log_once("chunked", platform, "the fastest for every mask")


def why_not_cudnn(
    q_BTNH: jax.Array, k_BSKH: jax.Array, mask: AttentionMask, *, softcap: float | None, sinks: bool
) -> str | None:
    """Returns why cuDNN would not compute exactly this attention, or None if it does."""
    H = q_BTNH.shape[-1]
    if mask.q_documents_BT is not None:
        return "cannot keep documents apart"
    if mask.q_index_BT is not None:
        return "cannot place queries at given indices"
    if mask.causal and q_BTNH.shape[1] != k_BSKH.shape[1]:
        return f"is causal only for as many queries as keys, got {q_BTNH.shape[1]} and {k_BSKH.shape[1]}"
    if mask.window is not None and not mask.causal:
        return "has windows only together with causality"
    if softcap is not None:
        return "has no softcap"
    if sinks:
        return "has no sinks"
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, got {q_BTNH.dtype}"
    if H > 128 or H % 8:
        return f"needs a head_dim of at most 128 that is a multiple of 8, got {H}"
    return None


@functools.cache
def _log_once(implementation: Implementation, platform: str, reason: str) -> Implementation:
    _logger.info("attention on %s: %s, because %s", platform, implementation, reason)
    return implementation


def _check(q_BTNH, k_BSKH, v_BSKH, mask, sinks_N):
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    if k_BSKH.shape != (B, S, K, H) or v_BSKH.shape != k_BSKH.shape or N % K:
        raise ValueError(
            "attention: expected q (B, T, N, H), k and v (B, S, K, H) with N a multiple of K, "
            f"got {q_BTNH.shape}, {k_BSKH.shape} and {v_BSKH.shape}"
        )
    if not q_BTNH.dtype == k_BSKH.dtype == v_BSKH.dtype:
        raise ValueError(f"attention: q, k and v differ in dtype: {q_BTNH.dtype}, {k_BSKH.dtype}, {v_BSKH.dtype}")
    wanted = {"q_documents_BT": (B, T), "k_documents_BS": (B, S), "q_index_BT": (B, T)}
    for name, shape in wanted.items():
        array = getattr(mask, name)
        if array is not None and array.shape != shape:
            raise ValueError(f"attention: mask.{name} should have the shape {shape}, got {array.shape}")
    if sinks_N is not None and sinks_N.shape != (N,):
        raise ValueError(f"attention: sinks_N should have the shape {(N,)}, got {sinks_N.shape}")
