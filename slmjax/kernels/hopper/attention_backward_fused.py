"""Fused attention on Hopper, backward in one kernel: five products a tile, as FlashAttention-3 does (arXiv:2407.08608).

A block owns a tile of keys and values, half of it in each of two consumer warpgroups, and goes through the queries that
see it, of all heads of the group. Scores are held transposed, keys by queries, so that weights and their gradients feed
the products of dv and dk from registers. Only the gradient of the scores goes through shared memory, for dq, which is
summed in float32 in global memory by the copy engine: in whatever order blocks come, so that dq is not bitwise
reproducible. dk and dv are: they are summed in registers, over the heads of the group too.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from slmjax.kernels.hopper.attention_backward_pieces import fence_reads
from slmjax.kernels.hopper.warpgroups import (
    CONSUMER_REGISTERS,
    FIRST_NAMED_BARRIER,
    PRODUCER_REGISTERS,
    ROWS,
    THREADS,
    arrive,
    div,
    load,
    rem,
    slices_together,
    sync,
    tiled_smem,
    transposed,
)
from slmjax.kernels.tiles import (
    IntArray,
    inner_tile_bounds,
    inverse_inner_tile_bounds,
    inverse_tile_bounds,
    pad_ranges,
    tile_bounds,
)

_LOG2E = math.log2(math.e)
_WARPGROUPS = 2
_K_TILE = ROWS * _WARPGROUPS


@dataclasses.dataclass(frozen=True, kw_only=True)
class FusedTiling:
    """How the fused backward kernel cuts its work.

    Attributes:
      q_tile: queries of a tile, 64 or 128. With 128 each warpgroup sums dq of half of the queries, with 64 of half of
        head_dim, which must then be a multiple of 128.
      stages: tiles of queries and output gradients in shared memory.
      ahead: whether the scores of the next tile of queries are started before the last products of this one end. It
        takes registers, which head_dim 128 does not leave.
    """

    q_tile: int = 128
    stages: int = 2
    ahead: bool = True


# Compiled apart, so that equal layers of a model are traced and lowered once.
@functools.partial(jax.jit, static_argnames=("scale", "softcap", "tiling"))
def attention_backward_fused(
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
    tiling: FusedTiling,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns dq_BTNH, dk_BSKH and dv_BSKH in the dtype of q.

    T must be a multiple of the tile of queries and S of 128; head_dim 64 or 128. `delta_BNT` is the sum over head_dim
    of out * dout. `k_start_XT` and `k_end_XT` have one row for all, or one for each of the batch.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    G, M, W, stages, dtype = N // K, tiling.q_tile, _WARPGROUPS, tiling.stages, q_BTNH.dtype
    by_rows = M == ROWS * W
    if T % M or S % _K_TILE or not (by_rows or (M == ROWS and H % (64 * W) == 0)):
        raise ValueError(f"attention_backward_fused: T={T}, S={S}, head_dim={H} do not fit {tiling}")
    dq_rows, dq_columns = ROWS, H if by_rows else H // W
    num_k_tiles = S // _K_TILE
    k_start_XT, k_end_XT = pad_ranges(k_start_XT, k_end_XT, T)
    bounds_XJ4 = _bounds(k_start_XT, k_end_XT, q_tile=M, num_k_tiles=num_k_tiles)
    ranges_X2T = jnp.stack([k_start_XT, k_end_XT], axis=1).astype(jnp.int32)
    X = ranges_X2T.shape[0]
    together = slices_together(B * K, bytes_each=T * G * H * 8)  # queries and dout in 16 bits, dq in 32
    free, dscores_ready = FIRST_NAMED_BARRIER, FIRST_NAMED_BARRIER + stages
    everyone, consumers = (W + 1) * THREADS, W * THREADS
    exponent = (scale if softcap is None else softcap) * _LOG2E

    def body(q_ref, k_ref, v_ref, dout_ref, stats_ref, ranges_ref, bounds_ref, dq_ref, dk_ref, dv_ref, *scratch):
        (q_smem, k_smem, v_smem, dout_smem, stats_smem, ranges_smem, ds_smem, dq_smem, kv_full, q_full, dout_full) = (
            scratch
        )
        wg = lax.axis_index("wg")
        block = lax.axis_index("block")
        group = div(block, together * num_k_tiles)
        within = block - group * (together * num_k_tiles)
        tile = div(within, together)  # under causality the first tiles are seen by the most queries
        slice_ = group * together + within - tile * together
        b = div(slice_, K)
        kv_head = slice_ - b * K
        x = b if X > 1 else 0
        first, last, inner_first, inner_last = (bounds_ref[x, tile, n] for n in range(4))
        per_head = last - first
        key = tile * _K_TILE

        def each_step(step):
            """Does step(head, tile of queries, steps before this one) over heads and tiles; one loop, not two."""

            def now(count, place):
                head, i = place
                step(head, i, count)
                done = i + 1 == last
                return jnp.where(done, head + 1, head), jnp.where(done, first, i + 1)

            lax.fori_loop(0, G * per_head, now, (kv_head * G, first))

        @pl.when(wg == W)
        def _producer():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
            keys = pl.ds(key, _K_TILE)
            plgpu.copy_gmem_to_smem(k_ref.at[b, keys, kv_head], k_smem, kv_full)
            plgpu.copy_gmem_to_smem(v_ref.at[b, keys, kv_head], v_smem, kv_full)

            def fetch(head, i, slot):
                queries = pl.ds(i * M, M)
                plgpu.copy_gmem_to_smem(q_ref.at[b, queries, head], q_smem.at[slot], q_full.at[slot])
                plgpu.copy_gmem_to_smem(stats_ref.at[b, head, :, queries], stats_smem.at[slot], q_full.at[slot])
                plgpu.copy_gmem_to_smem(ranges_ref.at[x, :, queries], ranges_smem.at[slot], q_full.at[slot])

            def produce(head, i, count):
                slot = rem(count, stages)
                pl.when(count >= stages)(lambda: sync(free + slot, num_threads=everyone))
                fetch(head, i, slot)
                plgpu.copy_gmem_to_smem(dout_ref.at[b, pl.ds(i * M, M), head], dout_smem.at[slot], dout_full.at[slot])

            each_step(produce)
            total = G * per_head
            if tiling.ahead:  # after the last tile of queries, too
                slot = rem(total, stages)
                pl.when(total >= stages)(lambda: sync(free + slot, num_threads=everyone))
                fetch(kv_head * G, 0, slot)
            for behind in range(stages - tiling.ahead):  # every arrival is met

                @pl.when(total > behind)
                def _(behind=behind):
                    sync(free + rem(total - 1 - behind + stages, stages), num_threads=everyone)

        @pl.when(wg < W)
        def _consumer():
            plgpu.set_max_registers(CONSUMER_REGISTERS[W], action="increase")
            own = pl.ds(wg * ROWS, ROWS)
            plgpu.barrier_wait(kv_full)

            def accumulate(dk_acc, dv_acc, s_acc):
                def start_scores(slot):
                    s_acc[...] = plgpu.layout_cast(jnp.zeros((ROWS, M), jnp.float32), plgpu.Layout.WGMMA)
                    plgpu.barrier_wait(q_full.at[slot])
                    plgpu.wgmma(s_acc, k_smem.at[own], transposed(q_smem.at[slot]))

                def consume(head, i, count):
                    slot, buffer = rem(count, stages), rem(count, 2)

                    def of_queries(ref):
                        return lax.broadcast_in_dim(load(ref, plgpu.Layout.WGMMA.reduce(0)), (ROWS, M), [1])

                    if tiling.ahead:
                        plgpu.wgmma_wait(0)
                        before = rem(count - 1 + stages, stages)
                        pl.when(count > 0)(lambda: arrive(free + before, num_threads=everyone))
                    else:
                        start_scores(slot)

                    def scores(dp_acc):
                        plgpu.barrier_wait(dout_full.at[slot])
                        plgpu.wgmma(dp_acc, v_smem.at[own], transposed(dout_smem.at[slot]))
                        s_RM = plgpu.wgmma_accumulator_load(s_acc, wait_n=None if tiling.ahead else 1)
                        slope_RM = None
                        if softcap is not None:
                            s_RM = jnp.tanh(s_RM * (scale / softcap))
                            slope_RM = 1.0 - s_RM * s_RM
                        p_RM = jnp.exp2(s_RM * exponent - of_queries(stats_smem.at[slot, 0]))

                        def masked():
                            key_RM = plgpu.broadcasted_iota(jnp.int32, (ROWS, M), 0, layout=plgpu.Layout.WGMMA)
                            key_RM = key_RM + (key + wg * ROWS)
                            start_RM, end_RM = of_queries(ranges_smem.at[slot, 0]), of_queries(ranges_smem.at[slot, 1])
                            return jnp.where((key_RM >= start_RM) & (key_RM < end_RM), p_RM, 0.0)

                        p_RM = lax.cond((i < inner_first) | (i >= inner_last), masked, lambda: p_RM)
                        dp_RM = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
                        ds_RM = p_RM * (dp_RM - of_queries(stats_smem.at[slot, 1]))
                        if slope_RM is not None:
                            ds_RM = ds_RM * slope_RM
                        return p_RM.astype(dtype), ds_RM.astype(dtype)

                    p_RM, ds_RM = pl.run_scoped(scores, plgpu.WGMMAAccumulatorRef((ROWS, M), jnp.float32))
                    fence_reads()  # of what belongs to the queries, which the next copies overwrite
                    ds_smem[buffer, own] = ds_RM
                    plgpu.commit_smem()
                    plgpu.wgmma(dv_acc, p_RM, dout_smem.at[slot])
                    sync(dscores_ready, num_threads=consumers)

                    def queries(dq_acc):
                        if by_rows:
                            ds_ref, k_part = ds_smem.at[buffer, :, own], k_smem
                        else:
                            ds_ref, k_part = ds_smem.at[buffer], k_smem.at[:, pl.ds(wg * dq_columns, dq_columns)]
                        plgpu.wgmma(dq_acc, transposed(ds_ref), k_part)
                        # From shared memory, though they are in registers: these are wanted for the next scores.
                        plgpu.wgmma(dk_acc, ds_smem.at[buffer, own], q_smem.at[slot])
                        if tiling.ahead:
                            plgpu.wgmma_wait(2)  # the weights, in registers, are used up
                            start_scores(rem(count + 1, stages))
                        return plgpu.wgmma_accumulator_load(dq_acc, wait_n=1 + tiling.ahead)

                    dq_MH = pl.run_scoped(queries, plgpu.WGMMAAccumulatorRef((dq_rows, dq_columns), jnp.float32))
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    dq_smem[wg, ...] = dq_MH
                    plgpu.commit_smem()
                    if by_rows:
                        target = dq_ref.at[b, pl.ds(i * M + wg * ROWS, ROWS), head]
                    else:
                        target = dq_ref.at[b, pl.ds(i * M, ROWS), head, pl.ds(wg * dq_columns, dq_columns)]
                    plgpu.copy_smem_to_gmem(dq_smem.at[wg], target, reduction_op="add")
                    if not tiling.ahead:
                        plgpu.wgmma_wait(0)
                        arrive(free + slot, num_threads=everyone)

                if tiling.ahead:
                    start_scores(0)
                each_step(consume)
                dk_RH, dv_RH = dk_acc[...], dv_acc[...]
                if tiling.ahead:
                    total = G * per_head
                    pl.when(total > 0)(lambda: arrive(free + rem(total - 1 + stages, stages), num_threads=everyone))
                return dk_RH, dv_RH

            acc = plgpu.WGMMAAccumulatorRef((ROWS, H), jnp.float32)
            dk_RH, dv_RH = pl.run_scoped(accumulate, acc, acc, plgpu.WGMMAAccumulatorRef((ROWS, M), jnp.float32))
            sync(dscores_ready, num_threads=consumers)  # until both have read the keys for the last time
            k_smem[own] = (dk_RH * scale).astype(dtype)
            v_smem[own] = dv_RH.astype(dtype)
            plgpu.commit_smem()
            keys = pl.ds(key + wg * ROWS, ROWS)
            plgpu.copy_smem_to_gmem(k_smem.at[own], dk_ref.at[b, keys, kv_head], commit_group=False)
            plgpu.copy_smem_to_gmem(v_smem.at[own], dv_ref.at[b, keys, kv_head])
            plgpu.wait_smem_to_gmem(0)

    scratch = (
        tiled_smem((stages, M, H), dtype),
        tiled_smem((_K_TILE, H), dtype),
        tiled_smem((_K_TILE, H), dtype),
        tiled_smem((stages, M, H), dtype),
        plgpu.SMEM((stages, 2, M), jnp.float32),
        plgpu.SMEM((stages, 2, M), jnp.int32),
        tiled_smem((2, _K_TILE, M), dtype),
        tiled_smem((W, dq_rows, dq_columns), jnp.float32),
        plgpu.Barrier(num_arrivals=2),
        plgpu.Barrier(num_arrivals=3, num_barriers=stages),
        plgpu.Barrier(num_barriers=stages),
    )
    # The sum of dq has to start at zero (plgpu.kernel takes no references, pl.kernel does), and not before it is
    # wanted: XLA would else fill those of all layers at once, and hold them.
    zero, delta_BNT = lax.optimization_barrier((jnp.float32(0.0), delta_BNT))
    dq_sum = jax.new_ref(jnp.full((B, T, N, H), zero))
    stats_BN2T = jnp.stack([lse_BNT * _LOG2E, delta_BNT], axis=2)
    kernel: Any = pl.kernel(
        lambda *refs: pl.run_scoped(functools.partial(body, *refs), *scratch, collective_axes="wg"),
        out_type=(jax.ShapeDtypeStruct(k_BSKH.shape, dtype), jax.ShapeDtypeStruct(v_BSKH.shape, dtype)),
        mesh=plgpu.Mesh(
            grid=(num_k_tiles * B * K,),
            grid_names=("block",),
            num_threads=W + 1,
            thread_name="wg",
            kernel_name="hopper_attention_backward",
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        name="hopper_attention_backward",
    )
    dk_BSKH, dv_BSKH = kernel(q_BTNH, k_BSKH, v_BSKH, dout_BTNH, stats_BN2T, ranges_X2T, bounds_XJ4, dq_sum)
    return (jax.freeze(dq_sum) * scale).astype(dtype), dk_BSKH, dv_BSKH


def _bounds(k_start_XT: IntArray, k_end_XT: IntArray, *, q_tile: int, num_k_tiles: int) -> jax.Array:
    first_XI, last_XI = tile_bounds(k_start_XT, k_end_XT, q_tile=q_tile, k_tile=_K_TILE)
    outer = inverse_tile_bounds(first_XI, last_XI, num_k_tiles=num_k_tiles)
    first_XI, last_XI = inner_tile_bounds(k_start_XT, k_end_XT, q_tile=q_tile, k_tile=_K_TILE)
    inner = inverse_inner_tile_bounds(first_XI, last_XI, num_k_tiles=num_k_tiles)
    return jnp.stack([*outer, *inner], axis=-1).astype(jnp.int32)
