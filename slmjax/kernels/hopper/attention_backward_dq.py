"""The gradient of queries: one half of the split backward of fused attention on Hopper.

A block has one producer warpgroup, which only copies, and one or two consumers with 64 rows of queries each. Keys and
values go through a ring of tiles in shared memory. The gradients of the weights are multiplied while the softmax of the
same tile is computed, and one consumer's softmax runs under the other's products. Blocks are persistent: what the next
piece of work needs is fetched while this one is computed and written.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from slmjax.kernels.hopper.attention_backward_pieces import (
    CACHE_BYTES,
    PER_ROW,
    TILE,
    WORK_FIELDS,
    PassTiling,
    fence_reads,
    hidden,
    meet_arrivals,
    softmax_weights,
    work_list,
)
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
    sm_count,
    sync,
    tiled_smem,
    transposed,
)
from slmjax.kernels.tiles import IntArray, inner_tile_bounds, tile_bounds


def gradient_of_queries(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    dout_BTNH: jax.Array,
    stats_BN2T: jax.Array,
    ranges_X2T: jax.Array,
    k_start_XT: IntArray,
    k_end_XT: IntArray,
    *,
    scale: float,
    softcap: float | None,
    tiling: PassTiling,
) -> jax.Array:
    """Returns dq_BTNH. `stats_BN2T` are lse to base 2 and -delta, `ranges_X2T` starts and lengths."""
    outer = tile_bounds(k_start_XT, k_end_XT, q_tile=ROWS, k_tile=tiling.tile)
    inner = inner_tile_bounds(k_start_XT, k_end_XT, q_tile=ROWS, k_tile=tiling.tile)
    work_XIC = work_list(outer, inner, warpgroups=tiling.warpgroups)
    arrays = (q_BTNH, k_BSKH, v_BSKH, dout_BTNH, stats_BN2T, ranges_X2T, work_XIC)
    return _launch(*arrays, scale=scale, softcap=softcap, tiling=tiling)


# Compiled apart, so that equal layers of a model are traced and lowered once. Work lists of masks that are known
# beforehand stay outside, where they are constants.
@functools.partial(jax.jit, static_argnames=("scale", "softcap", "tiling"))
def _launch(q_BTNH, k_BSKH, v_BSKH, dout_BTNH, stats_BN2T, ranges_X2T, work_XIC, *, scale, softcap, tiling):
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    G, W, k_tile, stages, dtype = N // K, tiling.warpgroups, tiling.tile, tiling.stages, q_BTNH.dtype
    X, q_tile = ranges_X2T.shape[0], ROWS * W
    num_tiles = T // q_tile
    num_items, together = B * N * num_tiles, slices_together(B * K, bytes_each=4 * S * H, cache_bytes=CACHE_BYTES)
    num_blocks = min(sm_count(), num_items)
    free, own_free = FIRST_NAMED_BARRIER, FIRST_NAMED_BARRIER + stages
    everyone = (W + 1) * THREADS

    def body(q_ref, k_ref, v_ref, dout_ref, stats_ref, ranges_ref, work_ref, dq_ref, *scratch):
        q_smem, dout_smem, dq_smem, stats_smem, work_smem, k_smem, v_smem, own_full, full = scratch
        wg, block = lax.axis_index("wg"), lax.axis_index("block")

        def place(i):
            """Row of the batch, its mask, head, and rank of the tile, of the block's i-th piece of work."""
            item = block + i * num_blocks
            section = div(item, together * num_tiles * G)
            item = item - section * (together * num_tiles * G)
            rank = div(item, together * G)
            item = item - rank * (together * G)
            kv_slice = section * together + div(item, G)
            b = div(kv_slice, K)
            return b, b if X > 1 else 0, (kv_slice - b * K) * G + rem(item, G), rank

        pieces = div(num_items - 1 - block, num_blocks) + 1

        @pl.when(wg == W)
        def _producer():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            def produce(i, done):
                b, x, head, rank = place(i)
                tile, start, count = (work_ref[x, rank, n] for n in range(3))
                kv_head = div(head, G)

                def copy(step, done):
                    slot, keys = rem(done, stages), pl.ds((start + step) * k_tile, k_tile)
                    pl.when(done >= stages)(lambda: sync(free + slot, num_threads=everyone))
                    plgpu.copy_gmem_to_smem(k_ref.at[b, keys, kv_head], k_smem.at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(v_ref.at[b, keys, kv_head], v_smem.at[slot], full.at[slot])
                    return done + 1

                # The place of the queries is free as soon as they are in registers; else not before the last product.
                early = 0 if tiling.resident else jnp.minimum(count, stages - 1)
                done = lax.fori_loop(0, early, copy, done)
                pl.when(i > 0)(lambda: sync(own_free, num_threads=everyone))
                for w in range(W):
                    queries = pl.ds((tile * W + w) * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(q_ref.at[b, queries, head], q_smem.at[w], own_full)
                    plgpu.copy_gmem_to_smem(dout_ref.at[b, queries, head], dout_smem.at[w], own_full)
                queries = pl.ds(tile * q_tile, q_tile)
                plgpu.copy_gmem_to_smem(stats_ref.at[b, head, :, queries], stats_smem, own_full)
                plgpu.copy_gmem_to_smem(work_ref.at[x, rank], work_smem, own_full)
                return lax.fori_loop(early, count, copy, done)

            total = lax.fori_loop(0, pieces, produce, jnp.int32(0))
            meet_arrivals(free, total, stages=stages, num_threads=everyone)
            sync(own_free, num_threads=everyone)

        @pl.when(wg < W)
        def _consumer():
            plgpu.set_max_registers(CONSUMER_REGISTERS[W], action="increase")
            own = wg if W > 1 else 0  # of one consumer, addresses are constants

            def over_keys(x_R):
                return lax.broadcast_in_dim(x_R, (ROWS, k_tile), [0])

            def consume(i, done):
                b, x, head, _ = place(i)
                plgpu.barrier_wait(own_full)
                tile, start, count = (work_smem[n] for n in range(3))
                first, last, inner_first, inner_last = (work_smem[3 + 4 * own + n] for n in range(4))
                lse_R, minus_delta_R = (load(stats_smem.at[n, pl.ds(own * ROWS, ROWS)], PER_ROW) for n in range(2))
                queries = pl.ds((tile * W + own) * ROWS, ROWS)
                start_R, length_R = (load(ranges_ref.at[x, n, queries], PER_ROW) for n in range(2))
                start_R = start_R - start * k_tile

                def release(slot):
                    arrive(free + slot, num_threads=everyone)

                def release_own():
                    fence_reads()
                    arrive(own_free, num_threads=everyone)

                def skip(step, _):
                    slot = rem(done + step, stages)
                    plgpu.barrier_wait(full.at[slot])
                    release(slot)

                def accumulate(dq_acc):
                    if tiling.resident:
                        q_RH, dout_RH = (load(smem.at[own], TILE) for smem in (q_smem, dout_smem))
                        release_own()

                    def multiply(step, late_RS):
                        slot = rem(done + step, stages)
                        if tiling.resident:
                            q, dout = q_RH, dout_RH
                        else:
                            # Zero, but the compiler does not know, or it would keep all addresses of a wide q at hand.
                            zero = step >> 31 if H > 128 else 0
                            q, dout = q_smem.at[own + zero], dout_smem.at[own + zero]

                        def gradients(s_acc, dp_acc):
                            dp_acc[...] = over_keys(minus_delta_R)
                            plgpu.barrier_wait(full.at[slot])
                            plgpu.wgmma(s_acc, q, transposed(k_smem.at[slot]))
                            if tiling.lookahead:
                                before = rem(done + jnp.maximum(step - 1, first), stages)
                                plgpu.wgmma(dq_acc, late_RS, k_smem.at[before])
                            plgpu.wgmma(dp_acc, dout, transposed(v_smem.at[slot]))
                            s_RS = plgpu.wgmma_accumulator_load(s_acc, wait_n=2 if tiling.lookahead else 1)

                            def masked(x_RS):
                                key_RS = plgpu.broadcasted_iota(jnp.int32, (ROWS, k_tile), 1, layout=TILE)
                                return hidden(x_RS, key_RS + step * k_tile, over_keys(start_R), over_keys(length_R))

                            at_edge = (step < inner_first) | (step >= inner_last)
                            hide = functools.partial(lax.cond, at_edge, masked, lambda x_RS: x_RS)
                            _, p_RS = softmax_weights(s_RS, over_keys(lse_R), hide, scale=scale, softcap=softcap)
                            dp_RS = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
                            if tiling.lookahead:
                                pl.when(step > first)(lambda: release(before))
                            return (p_RS * dp_RS).astype(dtype)

                        acc = plgpu.WGMMAAccumulatorRef((ROWS, k_tile), jnp.float32)
                        ds_RS = pl.run_scoped(gradients, acc, acc)
                        if tiling.lookahead:
                            return ds_RS
                        plgpu.wgmma(dq_acc, ds_RS, k_smem.at[slot])
                        plgpu.wgmma_wait(0)
                        release(slot)

                    if not tiling.lookahead:
                        lax.fori_loop(first, last, multiply, None)
                        return dq_acc[...]
                    none_RS = plgpu.layout_cast(jnp.zeros((ROWS, k_tile), dtype), TILE)
                    late_RS = lax.fori_loop(first, last, multiply, none_RS)
                    slot = rem(done + jnp.maximum(last - 1, 0), stages)
                    plgpu.wgmma(dq_acc, late_RS, k_smem.at[slot])
                    dq_RH = dq_acc[...]
                    pl.when(first < last)(lambda: release(slot))
                    return jnp.where(first < last, dq_RH, 0.0)  # without keys the product is zero times anything

                lax.fori_loop(0, first, skip, None)
                dq_RH = pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef((ROWS, H), jnp.float32))
                if not tiling.resident:
                    release_own()
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                dq_smem[own] = (dq_RH * scale).astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(dq_smem.at[own], dq_ref.at[b, queries, head])
                lax.fori_loop(last, count, skip, None)
                return done + count

            lax.fori_loop(0, pieces, consume, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q_BTNH.shape, dtype),
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=W + 1,
        thread_name="wg",
        scratch_types=(
            tiled_smem((W, ROWS, H), dtype),
            tiled_smem((W, ROWS, H), dtype),
            tiled_smem((W, ROWS, H), dtype),
            plgpu.SMEM((2, q_tile), jnp.float32),
            plgpu.SMEM((WORK_FIELDS,), jnp.int32),
            tiled_smem((stages, k_tile, H), dtype),
            tiled_smem((stages, k_tile, H), dtype),
            plgpu.Barrier(num_arrivals=2 * W + 2),
            plgpu.Barrier(num_barriers=stages, num_arrivals=2),
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        kernel_name="hopper_attention_backward_dq",
    )(q_BTNH, k_BSKH, v_BSKH, dout_BTNH, stats_BN2T, ranges_X2T, work_XIC)
