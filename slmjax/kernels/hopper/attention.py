"""Fused attention on Hopper, differentiable: the forward and backward kernels, and the shapes that they want."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from slmjax.kernels import targets
from slmjax.kernels.hopper.attention_backward_fused import FusedTiling, attention_backward_fused
from slmjax.kernels.hopper.attention_backward_split import SplitTiling, attention_backward_split
from slmjax.kernels.hopper.attention_forward import attention_forward
from slmjax.kernels.hopper.attention_tiling import AttentionTiling, choose_tiling, mask_kind
from slmjax.kernels.tiles import IntArray, pad_ranges

# Lengths and widths are padded to multiples of these.
_LENGTHS, _WIDTHS = 128, 16


def hopper_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    k_start_XT: IntArray,
    k_end_XT: IntArray,
    sinks_N: jax.Array | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    deterministic: bool = False,
    tiling: AttentionTiling | None = None,
) -> jax.Array:
    """Returns softmax(scale * q k^T) v over the keys k_start <= s < k_end of each query, as out_BTNH in q's dtype.

    The mask, softcap and sinks mean what they do in `ops.attention`. X is 1, a mask for all rows, or B. bfloat16 or
    float16; head_dim up to 256. With `deterministic` gradients are the same bit for bit every time.
    """
    T, N, H = q_BTNH.shape[1:]
    kind = mask_kind(k_start_XT)
    k_start_XT, k_end_XT = pad_ranges(k_start_XT, k_end_XT, T + -T % _LENGTHS)
    q_BTNH, k_BSKH, v_BSKH = _pad(q_BTNH), _pad(k_BSKH), _pad(v_BSKH)
    if tiling is None:
        tiling = choose_tiling(
            device_kind=targets.device_kind(),
            head_dim=q_BTNH.shape[3],
            heads_per_group=N // k_BSKH.shape[2],
            mask=kind,
            length=k_BSKH.shape[1],
            deterministic=deterministic,
        )
    problem = _Problem(scale=scale, softcap=softcap, tiling=tiling)
    out_BTNH = jnp.asarray(_attend(problem, q_BTNH, k_BSKH, v_BSKH, sinks_N, k_start_XT, k_end_XT))
    return out_BTNH[:, :T, :, :H]


def _pad(x_BTNH: jax.Array) -> jax.Array:
    T, H = x_BTNH.shape[1], x_BTNH.shape[3]
    if T % _LENGTHS == 0 and H % _WIDTHS == 0:
        return x_BTNH
    return jnp.pad(x_BTNH, ((0, 0), (0, -T % _LENGTHS), (0, 0), (0, -H % _WIDTHS)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Problem:
    scale: float
    softcap: float | None
    tiling: AttentionTiling


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(problem, q_BTNH, k_BSKH, v_BSKH, sinks_N, k_start_XT, k_end_XT):
    return _forward(problem, q_BTNH, k_BSKH, v_BSKH, sinks_N, k_start_XT, k_end_XT)[0]


def _forward(problem, q_BTNH, k_BSKH, v_BSKH, sinks_N, k_start_XT, k_end_XT):
    tiling = problem.tiling.forward
    return attention_forward(
        *(q_BTNH, k_BSKH, v_BSKH, k_start_XT, k_end_XT, sinks_N),
        **dict(scale=problem.scale, softcap=problem.softcap, tiling=tiling),
    )


def _forward_and_save(problem, q_BTNH, k_BSKH, v_BSKH, sinks_N, k_start_XT, k_end_XT):
    out_BTNH, lse_BNT = _forward(problem, q_BTNH, k_BSKH, v_BSKH, sinks_N, k_start_XT, k_end_XT)
    out_BTNH = checkpoint_name(out_BTNH, "attention_out")
    lse_BNT = checkpoint_name(lse_BNT, "attention_lse")
    return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, sinks_N, k_start_XT, k_end_XT, out_BTNH, lse_BNT)


def _backward(problem, saved, dout_BTNH):
    q_BTNH, k_BSKH, v_BSKH, sinks_N, k_start_XT, k_end_XT, out_BTNH, lse_BNT = saved
    # The softmax's derivative is p_s (dp_s - sum_s p_s dp_s), and that sum is out . dout.
    delta_BTN = jnp.sum(out_BTNH.astype(jnp.float32) * dout_BTNH.astype(jnp.float32), axis=-1)
    # The barrier keeps the transposition out of the sum, which else reads at a tenth of the memory's speed.
    delta_BNT = jax.lax.optimization_barrier(delta_BTN).swapaxes(1, 2)
    arrays = (q_BTNH, k_BSKH, v_BSKH, dout_BTNH, lse_BNT, delta_BNT, k_start_XT, k_end_XT)
    match problem.tiling.backward:
        case FusedTiling() as tiling:
            gradients = attention_backward_fused(*arrays, scale=problem.scale, softcap=problem.softcap, tiling=tiling)
        case SplitTiling() as tiling:
            gradients = attention_backward_split(*arrays, scale=problem.scale, softcap=problem.softcap, tiling=tiling)
    dsinks_N = None
    if sinks_N is not None:  # a sink is a key whose value is zero
        weights_BNT = jnp.exp(sinks_N.astype(jnp.float32)[None, :, None] - lse_BNT)
        dsinks_N = -jnp.sum(weights_BNT * delta_BNT, axis=(0, 2)).astype(sinks_N.dtype)
    return *gradients, dsinks_N, None, None


_attend.defvjp(_forward_and_save, _backward)
