"""Flash attention in plain XLA (Dao 2023, arXiv:2307.08691): memory linear in length, tiles outside the mask skipped.

Queries are taken a tile at a time. The backward pass is given the output and the log-sum-exp of each row of scores, and
computes the scores again. The same tile arithmetic runs in one of two loops:

  unrolled  a tile of queries meets all keys that causality and window allow in one piece, between bounds that are
            constants of the program; documents are masked but not skipped. For few tiles.
  looped    a tile of queries loops over tiles of keys, correcting the softmax as it goes, between bounds that follow
            the documents too.

Inside, arrays are BKGTH and BKSH: G = N // K query heads share a key/value head, and M is G and T as one dimension.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from slmjax.kernels.tiles import tile_bounds
from slmjax.ops.mask import AttentionMask, ranges, static_ranges

# Below every score, and finite: exp(-inf - _LOWEST) is 0 where -inf - -inf would be NaN.
_LOWEST = -1e30
_NO_TILE = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """How the work is cut.

    Attributes:
      q_tile: queries in a tile.
      k_tile: keys in a tile, where tiles of keys are looped over.
      unrolled: which of the two loops of this module.
      by_row: whether the rows of the batch are looped over too, so that each skips exactly what it may and its tiles
        stay in the cache; otherwise only tiles that no row needs are skipped.
    """

    q_tile: int
    k_tile: int
    unrolled: bool
    by_row: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Problem:
    """All about one call that is known before the program runs."""

    scale: float
    softcap: float | None
    tiling: Tiling
    static_keys: tuple[tuple[int, int], ...]  # first and last key (exclusive) of each tile of queries, if unrolled


def choose_tiling(mask: AttentionMask, *, T: int, platform: str, num_devices: int) -> Tiling:
    """Returns the tiling for queries of length T on a platform ("cpu", "gpu", "tpu")."""
    # CPU, float32, two idle cores, forward + backward in ms (8 rows, N 8, K 2, H 32 | 16 rows, N 4, K 4, H 64), T 512:
    #   causal:                      unrolled 59 | 118   looped 80 | 160   unrolled without rows 101 | 160
    #   documents of about T / 4:    unrolled 61 | 123   looped 60 | 127
    # and for 4 rows, N 4, K 4, H 64, T 2048: causal 740 and 440-475, documents of about T / 16: 970 and 200-210.
    # Tiles of 128 are a tenth slower unrolled, a fifth to a half looped: they leave the cache.
    tile = 64 if platform == "cpu" else 256
    # One H200, SmolLM2-135M, 32 rows of 2048 tokens: unrolled asks for 107 GiB, looped takes 42.
    unrolled_tiles = 8 if platform == "cpu" else 4
    return Tiling(
        q_tile=tile,
        k_tile=tile,
        unrolled=mask.q_index_BT is None and unrolled_tiles * tile >= T,
        by_row=platform == "cpu" and num_devices == 1,  # a loop over rows would gather rows that devices share out
    )


def attention_chunked(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: AttentionMask,
    *,
    scale: float,
    softcap: float | None = None,
    sinks_N: jax.Array | None = None,
    tiling: Tiling | None = None,
) -> jax.Array:
    """Returns softmax(scale * q k^T) v as out_BTNH; products in the inputs' dtype, sums and softmax in float32.

    Under `jax.checkpoint` the policy `save_only_these_names("attention_out", "attention_lse")` saves what the backward
    pass needs of this one, so that it does not run again.

    Raises:
      ValueError: if an unrolled tiling is asked for with query indices, whose bounds are not known in advance.
    """
    B, T, S = *q_BTNH.shape[:2], k_BSKH.shape[1]
    tiling = tiling or choose_tiling(mask, T=T, platform=jax.default_backend(), num_devices=jax.device_count())
    k_start_BT, k_end_BT = ranges(mask, B, T, S)
    static_keys = ()
    if tiling.unrolled:
        if mask.q_index_BT is not None:
            raise ValueError("attention_chunked: an unrolled tiling needs a mask whose q_index_BT is None")
        first_I, last_I = tile_bounds(*static_ranges(mask, T, S), q_tile=tiling.q_tile, k_tile=1)
        static_keys = tuple((int(first), int(last)) for first, last in zip(first_I, last_I, strict=True))
    else:
        # Whole tiles only. A query of the padding has the empty range 0, 0; keys of the padding are in nobody's range.
        q_BTNH, k_start_BT, k_end_BT = (_pad(x, tiling.q_tile) for x in (q_BTNH, k_start_BT, k_end_BT))
        k_BSKH, v_BSKH = (_pad(x, tiling.k_tile) for x in (k_BSKH, v_BSKH))
    problem = _Problem(scale=scale, softcap=softcap, tiling=tiling, static_keys=static_keys)
    out_BTNH = jnp.asarray(_attend(problem, q_BTNH, k_BSKH, v_BSKH, sinks_N, k_start_BT, k_end_BT))
    return out_BTNH[:, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(problem, q_BTNH, k_BSKH, v_BSKH, sinks_N, k_start_BT, k_end_BT):
    return _forward(problem, q_BTNH, k_BSKH, v_BSKH, sinks_N, k_start_BT, k_end_BT)[0]


def _forward(problem, q_BTNH, k_BSKH, v_BSKH, sinks_N, k_start_BT, k_end_BT):
    K = k_BSKH.shape[2]
    tiles = functools.partial(_forward_tiles, problem, None if sinks_N is None else _sinks_per_head(sinks_N, K))
    out_BKGTH, lse_BKGT = _over_rows(
        problem,
        tiles,
        *(k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)),
        *(k_start_BT[:, None, None, :], k_end_BT[:, None, None, :], _split_heads(q_BTNH, K)),
    )
    return _join_heads(out_BKGTH), lse_BKGT


def _forward_and_save(problem, q_BTNH, k_BSKH, v_BSKH, sinks_N, k_start_BT, k_end_BT):
    out_BTNH, lse_BKGT = _forward(problem, q_BTNH, k_BSKH, v_BSKH, sinks_N, k_start_BT, k_end_BT)
    out_BTNH = checkpoint_name(out_BTNH, "attention_out")
    lse_BKGT = checkpoint_name(lse_BKGT, "attention_lse")
    return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, sinks_N, k_start_BT, k_end_BT, out_BTNH, lse_BKGT)


def _backward(problem, saved, dout_BTNH):
    q_BTNH, k_BSKH, v_BSKH, sinks_N, k_start_BT, k_end_BT, out_BTNH, lse_BKGT = saved
    K = k_BSKH.shape[2]
    # The softmax's derivative is p_s (dp_s - sum_s p_s dp_s), and that sum is out . dout.
    delta_BTN1 = jnp.sum(out_BTNH.astype(jnp.float32) * dout_BTNH.astype(jnp.float32), axis=-1, keepdims=True)
    delta_BKGT = _split_heads(delta_BTN1, K)[..., 0]
    dq_BKGTH, dk_BKSH, dv_BKSH = _over_rows(
        problem,
        functools.partial(_backward_tiles, problem),
        *(k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)),
        *(k_start_BT[:, None, None, :], k_end_BT[:, None, None, :], _split_heads(q_BTNH, K)),
        *(_split_heads(dout_BTNH, K), lse_BKGT, delta_BKGT),
    )
    dsinks_N = None
    if sinks_N is not None:
        # A sink is a key whose value is zero.
        dsinks_KG = -jnp.sum(jnp.exp(_sinks_per_head(sinks_N, K) - lse_BKGT) * delta_BKGT, axis=(0, 3))
        dsinks_N = dsinks_KG.reshape(-1).astype(sinks_N.dtype)
    return _join_heads(dq_BKGTH), dk_BKSH.swapaxes(1, 2), dv_BKSH.swapaxes(1, 2), dsinks_N, None, None


_attend.defvjp(_forward_and_save, _backward)


def _forward_tiles(problem, sinks_1KG1, k_BKSH, v_BKSH, k_start_B11T, k_end_B11T, q_BKGTH):
    """Returns (out_BKGTH, lse_BKGT)."""

    def attend_tile(_, over_keys, k_start_B11T, k_end_B11T, q_BKGTH):
        def step(carry, first_key, num_keys):
            peak_BKGT, total_BKGT, sum_BKGTH = carry
            k_tile_BKSH, v_tile_BKSH = (_take(x, first_key, num_keys, axis=2) for x in (k_BKSH, v_BKSH))
            scores_BKGTS = _scores(problem, q_BKGTH, k_tile_BKSH, k_start_B11T, k_end_B11T, first_key)
            new_peak_BKGT = jnp.maximum(peak_BKGT, jnp.max(scores_BKGTS, axis=-1))
            shrink_BKGT = jnp.exp(peak_BKGT - new_peak_BKGT)
            weights_BKGTS = jnp.exp(scores_BKGTS - new_peak_BKGT[..., None])
            total_BKGT = total_BKGT * shrink_BKGT + jnp.sum(weights_BKGTS, axis=-1)
            part_BKMH = _dot("BKMS,BKSH->BKMH", _merge(weights_BKGTS.astype(v_BKSH.dtype)), v_tile_BKSH)
            sum_BKGTH = sum_BKGTH * shrink_BKGT[..., None] + part_BKMH.reshape(sum_BKGTH.shape)
            return new_peak_BKGT, total_BKGT, sum_BKGTH

        # A sink is a key whose value is zero, met before all others.
        peak_BKGT = jnp.broadcast_to(jnp.float32(_LOWEST) if sinks_1KG1 is None else sinks_1KG1, q_BKGTH.shape[:-1])
        total_BKGT = jnp.full_like(peak_BKGT, 0.0 if sinks_1KG1 is None else 1.0)
        carry = (peak_BKGT, total_BKGT, jnp.zeros(q_BKGTH.shape, jnp.float32))
        peak_BKGT, total_BKGT, sum_BKGTH = over_keys(step, carry)
        total_BKGT = jnp.where(total_BKGT == 0.0, 1.0, total_BKGT)  # a query that sees nothing: zeros
        out_BKGTH = (sum_BKGTH / total_BKGT[..., None]).astype(q_BKGTH.dtype)
        return None, (out_BKGTH, peak_BKGT + jnp.log(total_BKGT))

    return _over_q_tiles(problem, attend_tile, None, k_start_B11T, k_end_B11T, q_BKGTH)[1]


def _backward_tiles(problem, k_BKSH, v_BKSH, k_start_B11T, k_end_B11T, q_BKGTH, dout_BKGTH, lse_BKGT, delta_BKGT):
    """Returns (dq_BKGTH, dk_BKSH, dv_BKSH)."""

    def differentiate_tile(dk_and_dv, over_keys, k_start_B11T, k_end_B11T, q_BKGTH, dout_BKGTH, lse_BKGT, delta_BKGT):
        q_BKMH, dout_BKMH = _merge(q_BKGTH), _merge(dout_BKGTH)

        def step(carry, first_key, num_keys):
            dq_BKMH, dk_BKSH, dv_BKSH = carry
            k_tile_BKSH, v_tile_BKSH = (_take(x, first_key, num_keys, axis=2) for x in (k_BKSH, v_BKSH))
            scores_BKGTS = _scores(problem, q_BKGTH, k_tile_BKSH, k_start_B11T, k_end_B11T, first_key)
            weights_BKGTS = jnp.exp(scores_BKGTS - lse_BKGT[..., None])
            dweights_BKMS = _dot("BKMH,BKSH->BKMS", dout_BKMH, v_tile_BKSH)
            dscores_BKGTS = weights_BKGTS * (dweights_BKMS.reshape(scores_BKGTS.shape) - delta_BKGT[..., None])
            if problem.softcap is not None:
                # Capped scores are at least -softcap; the -inf of unseen keys would make a NaN.
                dscores_BKGTS *= 1.0 - jnp.square(jnp.maximum(scores_BKGTS, -problem.softcap) / problem.softcap)
            dscores_BKMS = _merge((problem.scale * dscores_BKGTS).astype(q_BKGTH.dtype))
            weights_BKMS = _merge(weights_BKGTS.astype(dout_BKGTH.dtype))
            dq_BKMH += _dot("BKMS,BKSH->BKMH", dscores_BKMS, k_tile_BKSH)
            dk_BKSH = _add(dk_BKSH, _dot("BKMS,BKMH->BKSH", dscores_BKMS, q_BKMH), first_key, axis=2)
            dv_BKSH = _add(dv_BKSH, _dot("BKMS,BKMH->BKSH", weights_BKMS, dout_BKMH), first_key, axis=2)
            return dq_BKMH, dk_BKSH, dv_BKSH

        dq_BKMH, *dk_and_dv = over_keys(step, (jnp.zeros(q_BKMH.shape, jnp.float32), *dk_and_dv))
        return tuple(dk_and_dv), dq_BKMH.reshape(q_BKGTH.shape).astype(q_BKGTH.dtype)

    zeros = (jnp.zeros(k_BKSH.shape, jnp.float32), jnp.zeros(v_BKSH.shape, jnp.float32))
    (dk_BKSH, dv_BKSH), dq_BKGTH = _over_q_tiles(
        problem, differentiate_tile, zeros, k_start_B11T, k_end_B11T, q_BKGTH, dout_BKGTH, lse_BKGT, delta_BKGT
    )
    return dq_BKGTH, dk_BKSH.astype(k_BKSH.dtype), dv_BKSH.astype(v_BKSH.dtype)


def _scores(problem, q_BKGTH, k_BKSH, k_start_B11T, k_end_B11T, first_key):
    """Returns the scores of a tile in float32, capped, and -inf where the query does not see the key."""
    scores_BKMS = problem.scale * _dot("BKMH,BKSH->BKMS", _merge(q_BKGTH), k_BKSH)
    if problem.softcap is not None:
        scores_BKMS = problem.softcap * jnp.tanh(scores_BKMS / problem.softcap)
    key_1111S = first_key + jnp.arange(k_BKSH.shape[2], dtype=jnp.int32)[None, None, None, None, :]
    seen_B11TS = (k_start_B11T[..., None] <= key_1111S) & (key_1111S < k_end_B11T[..., None])
    return jnp.where(seen_B11TS, scores_BKMS.reshape(*q_BKGTH.shape[:-1], -1), -jnp.inf)


def _over_rows(problem, tiles, *arrays):
    """Calls `tiles` on the whole batch, or on its rows one after the other."""
    if not problem.tiling.by_row or arrays[0].shape[0] == 1:
        return tiles(*arrays)
    results = jax.lax.map(lambda row: tiles(*(x[None] for x in row)), arrays)
    return jax.tree.map(lambda x_B1: x_B1[:, 0], results)


def _over_q_tiles(problem, per_tile, state, k_start_B11T, k_end_B11T, *arrays):
    """Calls per_tile(state, over_keys, *tile of the arrays) -> (state, results) on each tile of queries in turn.

    Queries lie along axis 3 of every array and result. `over_keys(step, carry)` calls step(carry, first_key, num_keys)
    for the keys that the tile may see.

    Returns:
      The last state, and the results of the tiles joined.
    """
    q_tile, k_tile = problem.tiling.q_tile, problem.tiling.k_tile
    arrays = (k_start_B11T, k_end_B11T, *arrays)
    T = k_start_B11T.shape[3]
    if problem.tiling.unrolled:
        results = []
        for i, (first, last) in enumerate(problem.static_keys):
            tile = (jax.lax.slice_in_dim(x, i * q_tile, min((i + 1) * q_tile, T), axis=3) for x in arrays)
            over_keys = functools.partial(_once, first, last - first)
            state, result = per_tile(state, over_keys, *tile)
            results.append(result)
        return state, jax.tree.map(lambda *tiles: jnp.concatenate(tiles, axis=3), *results)

    first_BI, last_BI = tile_bounds(k_start_B11T[:, 0, 0], k_end_B11T[:, 0, 0], q_tile=q_tile, k_tile=k_tile)
    first_I, last_I = jnp.min(jnp.where(last_BI == 0, _NO_TILE, first_BI), axis=0), jnp.max(last_BI, axis=0)

    def body(state, i):
        def over_keys(step, carry):
            return jax.lax.fori_loop(first_I[i], last_I[i], lambda j, carry: step(carry, j * k_tile, k_tile), carry)

        return per_tile(state, over_keys, *(_take(x, i * q_tile, q_tile, axis=3) for x in arrays))

    state, results = jax.lax.scan(body, state, jnp.arange(T // q_tile))
    return state, jax.tree.map(lambda x_I: jnp.moveaxis(x_I, 0, 3).reshape(*x_I.shape[1:4], T, *x_I.shape[5:]), results)


def _once(first_key, num_keys, step, carry):
    return step(carry, first_key, num_keys) if num_keys else carry


def _take(x, first, size, *, axis):
    return jax.lax.dynamic_slice_in_dim(x, first, size, axis)


def _add(x, part, first, *, axis):
    return jax.lax.dynamic_update_slice_in_dim(x, _take(x, first, part.shape[axis], axis=axis) + part, first, axis)


def _dot(equation, a, b):
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _merge(x_BKGTH):
    return x_BKGTH.reshape(*x_BKGTH.shape[:2], -1, x_BKGTH.shape[-1])


def _split_heads(x_BTNH, K):
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)


def _join_heads(x_BKGTH):
    B, K, G, T, H = x_BKGTH.shape
    return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def _sinks_per_head(sinks_N, K):
    return sinks_N.astype(jnp.float32).reshape(1, K, -1, 1)


def _pad(x_BT, tile):
    """Pads axis 1 with zeros to a multiple of `tile`."""
    return jnp.pad(x_BT, [(0, -x_BT.shape[i] % tile if i == 1 else 0) for i in range(x_BT.ndim)])
