"""Fused attention on Hopper, backward in two kernels: bit for bit the same every time, and no sums in global memory.

The gradient of queries, and those of keys and values, are computed apart, each from scores computed anew: seven
products where the fused backward has five. Both kernels skip the tiles that no range touches, and mask only those that
a range touches in part. Any head_dim up to 256 that is a multiple of 16 is computed as it is, without padding.
"""

import dataclasses

import jax
import jax.numpy as jnp

from slmjax.kernels.hopper.attention_backward_dkv import gradients_of_keys_and_values
from slmjax.kernels.hopper.attention_backward_dq import gradient_of_queries
from slmjax.kernels.hopper.attention_backward_pieces import LOG2E, PassTiling
from slmjax.kernels.hopper.warpgroups import NAMED_BARRIERS, ROWS
from slmjax.kernels.tiles import IntArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitTiling:
    """How the kernel of dq and the kernel of dk and dv cut their work."""

    dq: PassTiling
    dkv: PassTiling


def split_tilings(head_dim: int) -> list[SplitTiling]:
    """Returns tilings worth measuring, the default first.

    All fit the shared memory. The default never spills registers; the others do not at a head_dim of 64, 80, 96, 128
    and 256 without a softcap.
    """
    small = PassTiling(tile=64, stages=4)
    if head_dim <= 96:
        dq = [
            PassTiling(tile=128, stages=3, resident=head_dim <= 64),
            dataclasses.replace(small, resident=True, lookahead=True),
            PassTiling(tile=128, stages=3, lookahead=True),
            dataclasses.replace(small, resident=True),
        ]
        dkv = [
            dataclasses.replace(small, resident=True),
            dataclasses.replace(small, resident=head_dim <= 64, lookahead=True),
            PassTiling(tile=128, stages=3) if head_dim <= 64 else PassTiling(tile=64, stages=3, lookahead=True),
            small,
        ]
    elif head_dim <= 128:
        dq = [
            dataclasses.replace(small, resident=True, lookahead=True),
            PassTiling(tile=128, stages=2),
            dataclasses.replace(small, lookahead=True),
            dataclasses.replace(small, resident=True),
        ]
        dkv = [
            PassTiling(tile=64, stages=3, lookahead=True),
            PassTiling(tile=64, stages=3),
            PassTiling(tile=64, stages=2, lookahead=True),
            PassTiling(tile=64, stages=2),
        ]
    else:
        dq = [
            PassTiling(tile=64, stages=2, warpgroups=1, lookahead=True),
            PassTiling(tile=64, stages=2, warpgroups=1),
        ]
        dkv = [PassTiling(tile=64, stages=2)] * 2
    return [SplitTiling(dq=one, dkv=other) for one, other in zip(dq, dkv, strict=True)]


def attention_backward_split(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    dout_BTNH: jax.Array,
    lse_BNT: jax.Array,
    delta_BNT: jax.Array,
    k_start_XT: IntArray,
    k_end_XT: IntArray,
    *,
    scale: float,
    softcap: float | None = None,
    tiling: SplitTiling,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns dq_BTNH, dk_BSKH and dv_BSKH in the dtype of q, bfloat16 or float16.

    T and S must be multiples of 128, head_dim of 16. `lse_BNT` is the natural logarithm of the softmax's denominator,
    +infinity for queries that see nothing; `delta_BNT` the sum over head_dim of out * dout. `k_start_XT` and `k_end_XT`
    have one row for all, or one for each of the batch.

    Raises:
      ValueError: if the arrays or the tiling do not fit the kernels.
    """
    _check(q_BTNH, k_BSKH, tiling)
    stats_BN2T = jnp.stack([lse_BNT * LOG2E, -delta_BNT], axis=2)
    ranges_X2T = jnp.stack([k_start_XT, jnp.maximum(k_end_XT - k_start_XT, 0)], axis=1).astype(jnp.int32)
    arrays = (q_BTNH, k_BSKH, v_BSKH, dout_BTNH, stats_BN2T, ranges_X2T, k_start_XT, k_end_XT)
    dq_BTNH = gradient_of_queries(*arrays, scale=scale, softcap=softcap, tiling=tiling.dq)
    dk_BSKH, dv_BSKH = gradients_of_keys_and_values(*arrays, scale=scale, softcap=softcap, tiling=tiling.dkv)
    return dq_BTNH, dk_BSKH, dv_BSKH


def _check(q_BTNH: jax.Array, k_BSKH: jax.Array, tiling: SplitTiling) -> None:
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    S = k_BSKH.shape[1]
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16) or q_BTNH.dtype != k_BSKH.dtype:
        raise ValueError(
            f"attention_backward_split: expected bfloat16 or float16 for all, got {q_BTNH.dtype} and {k_BSKH.dtype}"
        )
    if T % (2 * ROWS) or S % (2 * ROWS) or H % 16 or not 16 <= H <= 256:
        raise ValueError(
            "attention_backward_split: expected lengths that are multiples of 128 and a head_dim up to 256 that is a "
            f"multiple of 16, got T={T}, S={S}, head_dim={H}; pad the arrays"
        )
    wide = H > 128
    for name, each in (("dq", tiling.dq), ("dkv", tiling.dkv)):
        if wide and name == "dkv" and (each.warpgroups != 2 or each.resident or each.lookahead):
            raise ValueError(
                "attention_backward_split: above a head_dim of 128 dkv takes two warpgroups, without resident or "
                f"lookahead, got {each}"
            )
        if each.stages + 3 > NAMED_BARRIERS:
            raise ValueError(f"attention_backward_split: at most {NAMED_BARRIERS - 3} stages, got {each} for {name}")
