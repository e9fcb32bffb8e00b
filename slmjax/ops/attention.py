"""Attention for every mask: one function, several implementations.

  reference  every score at once; the definition.
  chunked    flash attention in plain XLA: any mask, any platform, memory linear in length.
  hopper     our fused kernels for H100 and H200: any mask, tiles skipped in both directions. The gradient of the
             queries may be summed in any order, so that its last bits differ from run to run.
  hopper_deterministic  the same, bit for bit every time, with a slower backward pass.
  tpu        our fused kernels for TPUs, likewise.
  cudnn      NVIDIA's fused kernels through `jax.nn`; only where they compute exactly what the mask says.

To add an implementation: write it with the reference's signature, reading the mask by `ops.mask.ranges` and
`kernels.tiles`; say in a `why_not_...` what it cannot do; add its name to `Implementation` and to
`ExecutionConfig.attention`, its line to `choose_implementation` and its case to `attention`. For remat = "attention" it
names what its backward needs "attention_out" and "attention_lse"; of reference and cudnn that policy saves nothing.
Its arrays have shardings that XLA decides; a kernel that XLA cannot partition, such as one in Pallas, goes through
`ops.partition`.
"""

import functools
import logging
from typing import Literal, assert_never

import jax
import jax.numpy as jnp

from slmjax.kernels import targets
from slmjax.ops.attention_chunked import attention_chunked
from slmjax.ops.attention_reference import attention_reference
from slmjax.ops.mask import AttentionMask, ranges, static_ranges
from slmjax.ops.partition import over_batch

__all__ = ["AttentionMask", "attention", "choose_implementation", "why_not_cudnn", "why_not_hopper", "why_not_tpu"]

Implementation = Literal["reference", "chunked", "hopper", "hopper_deterministic", "tpu", "cudnn"]
Platform = Literal["cpu", "gpu", "hopper", "tpu"]

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
            q_BTNH, k_BSKH, mask, softcap=softcap, sinks=sinks_N is not None, scale=scale, platform=_platform()
        )
    match implementation:
        case "reference":
            return attention_reference(q_BTNH, k_BSKH, v_BSKH, mask, scale=scale, softcap=softcap, sinks_N=sinks_N)
        case "chunked":
            return attention_chunked(q_BTNH, k_BSKH, v_BSKH, mask, scale=scale, softcap=softcap, sinks_N=sinks_N)
        case "hopper" | "hopper_deterministic":
            reason = why_not_hopper(q_BTNH, scale=scale)
            if reason is not None:
                raise ValueError(f"attention implementation '{implementation}' {reason}; use 'chunked' or 'auto'")
            from slmjax.kernels.hopper.attention import (
                hopper_attention,
            )  # Pallas is slow to import, and of use here only

            deterministic = implementation == "hopper_deterministic"
            fused = functools.partial(hopper_attention, scale=scale, softcap=softcap, deterministic=deterministic)
            return _over_batch(fused, q_BTNH, k_BSKH, v_BSKH, mask, sinks_N)
        case "tpu":
            reason = why_not_tpu(q_BTNH)
            if reason is not None:
                raise ValueError(f"attention implementation 'tpu' {reason}; use 'chunked' or 'auto'")
            from slmjax.kernels.tpu.attention import tpu_attention  # Pallas is slow to import, and of use here only

            return _over_batch(
                functools.partial(tpu_attention, scale=scale, softcap=softcap), q_BTNH, k_BSKH, v_BSKH, mask, sinks_N
            )
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
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    mask: AttentionMask,
    *,
    softcap: float | None,
    sinks: bool,
    scale: float,
    platform: Platform,
) -> Implementation:
    """Returns the implementation that "auto" means on `platform`, and logs it once."""
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    # One query at a time, as in decoding, is linear in S anyway. On a CPU the chunked form is level at T = 64, 2 to 3
    # times faster at 128 and 4 to 7 times at 512 (forward + backward, float32).
    if T == 1 or T * S <= 64 * 64:
        return _log_once("reference", platform, "there are few scores")
    why_not = []
    if platform == "hopper":
        reason = why_not_hopper(q_BTNH, scale=scale)
        if reason is None:
            return _log_once("hopper", platform, "the fastest for every mask")
        why_not.append(f"hopper {reason}")
    if platform == "tpu":
        reason = why_not_tpu(q_BTNH)
        if reason is None:
            return _log_once("tpu", platform, "the fastest for every mask")
        why_not.append(f"tpu {reason}")
    if platform in ("gpu", "hopper"):
        reason = why_not_cudnn(q_BTNH, k_BSKH, mask, softcap=softcap, sinks=sinks)
        if reason is None:
            return _log_once("cudnn", platform, "; ".join([*why_not, "exact here"]))
        why_not.append(f"cudnn {reason}")
    return _log_once("chunked", platform, "; ".join(why_not) or "the fastest for every mask")


def _platform() -> Platform:
    if targets.on_hopper():
        return "hopper"
    backend = jax.default_backend()
    return backend if backend in ("gpu", "tpu") else "cpu"


def why_not_hopper(q_BTNH: jax.Array, *, scale: float) -> str | None:
    """Returns why our kernels for Hopper cannot compute this attention, or None if they can."""
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, got {q_BTNH.dtype}"
    if q_BTNH.shape[-1] > 256:
        return f"needs a head_dim of at most 256, got {q_BTNH.shape[-1]}"
    if scale <= 0:
        return f"needs a scale over zero, got {scale}"
    return None


def why_not_tpu(q_BTNH: jax.Array) -> str | None:
    """Returns why our kernels for TPUs cannot compute this attention, or None if they can."""
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float32):
        return f"needs bfloat16 or float32, got {q_BTNH.dtype}"
    if q_BTNH.shape[-1] > 256:
        return f"needs a head_dim of at most 256, got {q_BTNH.shape[-1]}"
    return None


def _over_batch(fused, q_BTNH, k_BSKH, v_BSKH, mask, sinks_N):
    """Runs a kernel of ours, which takes ranges, on each device's own rows."""
    B, T = q_BTNH.shape[:2]
    S = k_BSKH.shape[1]
    if mask.q_documents_BT is None and mask.q_index_BT is None:
        k_start_T, k_end_T = static_ranges(mask, T, S)

        def same_for_all(q_BTNH, k_BSKH, v_BSKH, sinks_N):
            return fused(q_BTNH, k_BSKH, v_BSKH, k_start_T[None], k_end_T[None], sinks_N)

        return over_batch(same_for_all, (q_BTNH, k_BSKH, v_BSKH), (sinks_N,))
    return over_batch(fused, (q_BTNH, k_BSKH, v_BSKH, *ranges(mask, B, T, S)), (sinks_N,))


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
