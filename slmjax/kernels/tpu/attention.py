"""Attention on TPUs, forward and backward, in Pallas kernels of our own.

A query sees one run of keys, whose ends are all that the kernels know of a mask; tiles of keys that no query of a tile
sees are skipped in both passes. The layout of it all, and why: docs/decisions/0009-tpu-attention-layout.md.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from slmjax.kernels import targets
from slmjax.kernels.tpu.attention_backward import backward
from slmjax.kernels.tpu.attention_forward import forward
from slmjax.kernels.tpu.attention_problem import Problem
from slmjax.kernels.tpu.attention_schedule import Schedule, make_schedule
from slmjax.kernels.tpu.attention_tiling import LANES, TileSize, Tiling, choose_tiling

__all__ = ["TileSize", "Tiling", "choose_tiling", "tpu_attention"]

# Below every score, and finite: exp(-inf - _NO_SINK) is 0 where -inf - -inf would be NaN.
_NO_SINK = -1e30
# H lies along sublanes, of which a register of bfloat16 has 16.
_SUBLANES = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Schedules:
    """The schedule of the forward pass, and of the backward pass one for each piece of the keys."""

    forward: Schedule
    backward: tuple[Schedule, ...]


def tpu_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    k_start_XT: Any,
    k_end_XT: Any,
    sinks_N: jax.Array | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    tiling: Tiling | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Returns softmax(scale * q k^T) v as out_BTNH: query t sees the keys k_start <= s < k_end.

    X is B or 1. The ranges are int32; numpy arrays make the list of tiles a constant of the program. A query whose
    range is empty gets zeros and no gradient. Query head n reads key/value head n // (N // K). `softcap` is c in
    c * tanh(scores / c); `sinks_N` is a logit per head that joins the softmax's denominator and has no value.
    Products are of the inputs' dtype, bfloat16 or float32, sums and softmax float32. `tiling` is `choose_tiling`'s for
    the devices in use unless given; `interpret` is what `pl.pallas_call` takes, to run without a TPU.

    Under `jax.checkpoint` the policy `save_only_these_names("attention_out", "attention_lse")` saves what the backward
    pass needs of this one. XLA cannot partition it: with sharded arrays call it inside `jax.shard_map`.

    Raises:
      ValueError: if shapes or dtypes do not fit together or are not supported.
    """
    _check(q_BTNH, k_BSKH, v_BSKH, k_start_XT, k_end_XT, sinks_N)
    (T, N, H), (S, K) = q_BTNH.shape[1:], k_BSKH.shape[1:3]
    tiling = tiling or choose_tiling(
        device_kind=targets.device_kind(), head_dim=H, group=N // K, T=T, S=S, itemsize=q_BTNH.dtype.itemsize
    )
    _check_tiling(tiling, N // K, multiple=1 if interpret else LANES)
    problem = Problem(scale=scale, softcap=softcap, tiling=tiling, interpret=interpret)
    schedules = _make_schedules(tiling, k_start_XT, k_end_XT, S=S)
    sinks_N = jnp.full(N, _NO_SINK, jnp.float32) if sinks_N is None else sinks_N
    q_BTNH, k_BSKH, v_BSKH, sinks_N, schedules = _vary_alike((q_BTNH, k_BSKH, v_BSKH, sinks_N, schedules))
    return jnp.asarray(_attend(problem, q_BTNH, k_BSKH, v_BSKH, sinks_N, schedules))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(problem, q_BTNH, k_BSKH, v_BSKH, sinks_N, schedules):
    return _forward(problem, q_BTNH, k_BSKH, v_BSKH, sinks_N, schedules)[0]


def _forward(problem, q_BTNH, k_BSKH, v_BSKH, sinks_N, schedules):
    tile = problem.tiling.forward
    q_BNHT, k_BKHS, v_BKHS = _transpose(q_BTNH, tile.q), _transpose(k_BSKH, tile.k), _transpose(v_BSKH, tile.k)
    out_BNHT, lse_BUGT = forward(problem, schedules.forward, q_BNHT, k_BKHS, v_BKHS, _finite(sinks_N))
    return _transpose_back(out_BNHT, q_BTNH), lse_BUGT


def _forward_and_save(problem, q_BTNH, k_BSKH, v_BSKH, sinks_N, schedules):
    out_BTNH, lse_BUGT = _forward(problem, q_BTNH, k_BSKH, v_BSKH, sinks_N, schedules)
    out_BTNH = checkpoint_name(out_BTNH, "attention_out")
    lse_BUGT = checkpoint_name(lse_BUGT, "attention_lse")
    return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, sinks_N, schedules, out_BTNH, lse_BUGT)


def _backward(problem, saved, dout_BTNH):
    q_BTNH, k_BSKH, v_BSKH, sinks_N, schedules, out_BTNH, lse_BUGT = saved
    B, T, N, _ = q_BTNH.shape
    tile = problem.tiling.backward
    piece = tile.k * len(schedules.backward)
    # The softmax's derivative is p_s (dp_s - sum_s p_s dp_s), and that sum is out . dout.
    delta_BTN = jnp.sum(out_BTNH.astype(jnp.float32) * dout_BTNH.astype(jnp.float32), axis=-1)
    delta_BNT, lse_BNT = delta_BTN.transpose(0, 2, 1), lse_BUGT.reshape(B, N, -1)[:, :, :T]

    def by_tile(x_BNT):
        x_BNT = _fill_up(x_BNT, tile.q)
        return x_BNT.reshape(B, -1, problem.tiling.heads, x_BNT.shape[-1])

    dq_BNHT, dk_BKHS, dv_BKHS = backward(
        problem,
        schedules.backward,
        _transpose(q_BTNH, tile.q),
        _transpose(k_BSKH, piece),
        _transpose(v_BSKH, piece),
        _transpose(dout_BTNH, tile.q),
        by_tile(lse_BNT),
        by_tile(delta_BNT),
    )
    sink_weights_BNT = jnp.exp(_finite(sinks_N)[None, :, None] - lse_BNT)
    dsinks_N = -jnp.sum(sink_weights_BNT * delta_BNT, axis=(0, 2)).astype(sinks_N.dtype)
    gradients = (_transpose_back(dq_BNHT, q_BTNH), _transpose_back(dk_BKHS, k_BSKH), _transpose_back(dv_BKHS, v_BSKH))
    return *gradients, dsinks_N, None


_attend.defvjp(_forward_and_save, _backward)


def _make_schedules(tiling, k_start_XT, k_end_XT, *, S):
    if not (isinstance(k_start_XT, np.ndarray) and isinstance(k_end_XT, np.ndarray)):
        k_start_XT, k_end_XT = jnp.asarray(k_start_XT), jnp.asarray(k_end_XT)

    def of_keys(first, last, tile):
        ranges = (x_XT.clip(first, last) - first for x_XT in (k_start_XT, k_end_XT))
        return make_schedule(*ranges, q_tile=tile.q, k_tile=tile.k, num_k_tiles=-(-(last - first) // tile.k))

    k_tile = tiling.backward.k
    num_tiles = -(-S // k_tile)
    num_pieces = -(-num_tiles // (tiling.resident_keys // k_tile))
    piece = -(-num_tiles // num_pieces) * k_tile
    return _Schedules(
        forward=of_keys(0, S, tiling.forward),
        backward=tuple(of_keys(x, min(x + piece, S), tiling.backward) for x in range(0, num_pieces * piece, piece)),
    )


def _finite(sinks_N):
    return jnp.maximum(sinks_N.astype(jnp.float32), _NO_SINK)


def _transpose(x_BTNH, tile):
    """Returns x_BNHT, filled up with zeros to whole tiles of T and whole registers of H."""
    x_BTNH = jnp.pad(x_BTNH, [(0, 0), (0, 0), (0, 0), (0, -x_BTNH.shape[3] % _SUBLANES)])
    return _fill_up(x_BTNH.transpose(0, 2, 3, 1), tile)


def _fill_up(x_T, tile):
    return jnp.pad(x_T, [(0, 0)] * (x_T.ndim - 1) + [(0, -x_T.shape[-1] % tile)])


def _transpose_back(x_BNHT, like_BTNH):
    """Returns x_BTNH without what `_transpose` added to an array of this shape."""
    T, H = like_BTNH.shape[1], like_BTNH.shape[3]
    return x_BNHT[:, :, :H, :T].transpose(0, 3, 1, 2)


def _vary_alike(arrays):
    """Returns the arrays as varying over all mesh axes of a shard_map that one of them varies over.

    A kernel takes no others; the transpose of this is the sum that gradients of what is replicated need.
    """
    varying = [jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(arrays)]
    axes = frozenset().union(*varying)

    def vary(x):
        missing = tuple(axes - jax.typeof(x).manual_axis_type.varying)
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, arrays)


def _check(q_BTNH, k_BSKH, v_BSKH, k_start_XT, k_end_XT, sinks_N):
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    if k_BSKH.shape != (B, S, K, H) or v_BSKH.shape != k_BSKH.shape or N % K:
        raise ValueError(
            "tpu_attention: expected q (B, T, N, H), k and v (B, S, K, H) with N a multiple of K, "
            f"got {q_BTNH.shape}, {k_BSKH.shape} and {v_BSKH.shape}"
        )
    if not q_BTNH.dtype == k_BSKH.dtype == v_BSKH.dtype or q_BTNH.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(
            "tpu_attention: expected q, k and v all bfloat16 or all float32, "
            f"got {q_BTNH.dtype}, {k_BSKH.dtype} and {v_BSKH.dtype}"
        )
    if k_start_XT.shape != k_end_XT.shape or k_start_XT.shape not in ((1, T), (B, T)):
        raise ValueError(
            f"tpu_attention: expected k_start and k_end of shape {(B, T)} or {(1, T)}, "
            f"got {k_start_XT.shape} and {k_end_XT.shape}"
        )
    if sinks_N is not None and sinks_N.shape != (N,):
        raise ValueError(f"tpu_attention: sinks_N should have the shape {(N,)}, got {sinks_N.shape}")


def _check_tiling(tiling, group, *, multiple):
    if group % tiling.heads:
        raise ValueError(f"tpu_attention: {tiling.heads} heads of a tile do not divide the {group} of a key/value head")
    for tile in (tiling.forward, tiling.backward):
        if tile.q % multiple or tile.k % multiple:
            raise ValueError(f"tpu_attention: tiles on a device must be multiples of {multiple}, got {tile}")
