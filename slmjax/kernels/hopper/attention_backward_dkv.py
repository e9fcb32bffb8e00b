"""The gradients of keys and values: the other half of the split backward of fused attention on Hopper.

A block has one producer warpgroup, which only copies, and one or two consumers. Queries, gradients of the output and
what belongs to them go through a ring of tiles in shared memory, once for each head of the group that shares the keys,
so that sums need no atomics. Scores are transposed: softmax weights and score gradients multiply from registers.

Up to a head_dim of 128 a consumer has 64 rows of keys of its own. Above it the sums of both gradients do not fit its
registers: two consumers share 64 rows, the first computes the weights and the gradient of values, the second takes the
weights through shared memory and computes the gradient of keys.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from slmjax.kernels.hopper.attention_backward_pieces import (
    CACHE_BYTES,
    PER_COLUMN,
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
from slmjax.kernels.tiles import (
    IntArray,
    inner_tile_bounds,
    inverse_inner_tile_bounds,
    inverse_tile_bounds,
    tile_bounds,
)


def gradients_of_keys_and_values(
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
) -> tuple[jax.Array, jax.Array]:
    """Returns dk_BSKH and dv_BSKH. `stats_BN2T` are lse to base 2 and -delta, `ranges_X2T` starts and lengths."""
    num_rows = k_BSKH.shape[1] // ROWS
    outer = tile_bounds(k_start_XT, k_end_XT, q_tile=tiling.tile, k_tile=ROWS)
    inner = inner_tile_bounds(k_start_XT, k_end_XT, q_tile=tiling.tile, k_tile=ROWS)
    work_XJC = work_list(
        inverse_tile_bounds(*outer, num_k_tiles=num_rows),
        inverse_inner_tile_bounds(*inner, num_k_tiles=num_rows),
        warpgroups=_owners(q_BTNH.shape[3], tiling),
    )
    arrays = (q_BTNH, k_BSKH, v_BSKH, dout_BTNH, stats_BN2T, ranges_X2T, work_XJC)
    return _launch(*arrays, scale=scale, softcap=softcap, tiling=tiling)


def _owners(head_dim: int, tiling: PassTiling) -> int:
    """How many warpgroups have keys of their own; wide heads need both for the same keys."""
    return 1 if head_dim > 128 else tiling.warpgroups


# Compiled apart, so that equal layers of a model are traced and lowered once. Work lists of masks that are known
# beforehand stay outside, where they are constants.
@functools.partial(jax.jit, static_argnames=("scale", "softcap", "tiling"))
def _launch(q_BTNH, k_BSKH, v_BSKH, dout_BTNH, stats_BN2T, ranges_X2T, work_XJC, *, scale, softcap, tiling):
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    G, W, M, stages, dtype = N // K, tiling.warpgroups, tiling.tile, tiling.stages, q_BTNH.dtype
    shared = H > 128
    X, owners, num_rows = ranges_X2T.shape[0], _owners(H, tiling), S // ROWS
    num_tiles = num_rows // owners
    num_items, together = B * K * num_tiles, slices_together(B * K, bytes_each=4 * T * H * G, cache_bytes=CACHE_BYTES)
    num_blocks = min(sm_count(), num_items)
    free, own_free = FIRST_NAMED_BARRIER, FIRST_NAMED_BARRIER + stages
    weights_ready, weights_taken = own_free + 1, own_free + 2
    everyone, consumers = (W + 1) * THREADS, W * THREADS

    def body(q_ref, k_ref, v_ref, dout_ref, stats_ref, ranges_ref, work_ref, dk_ref, dv_ref, *scratch):
        k_smem, v_smem, spare_smem, work_smem, q_smem, dout_smem, stats_smem, ranges_smem, own_full, full = scratch
        wg, block = lax.axis_index("wg"), lax.axis_index("block")

        def place(i):
            """Row of the batch, its mask, head, and rank of the tile, of the block's i-th piece of work."""
            item = block + i * num_blocks
            section = div(item, together * num_tiles)
            item = item - section * (together * num_tiles)
            rank = div(item, together)
            kv_slice = section * together + item - rank * together
            b = div(kv_slice, K)
            return b, b if X > 1 else 0, kv_slice - b * K, rank

        pieces = div(num_items - 1 - block, num_blocks) + 1

        @pl.when(wg == W)
        def _producer():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            def produce(i, done):
                b, x, kv_head, rank = place(i)
                tile, start, count = (work_ref[x, rank, n] for n in range(3))

                def copy(step, done):
                    slot = rem(done, stages)
                    q_step = div(step, G)
                    queries, head = pl.ds((start + q_step) * M, M), kv_head * G + step - q_step * G
                    pl.when(done >= stages)(lambda: sync(free + slot, num_threads=everyone))
                    plgpu.copy_gmem_to_smem(q_ref.at[b, queries, head], q_smem.at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(stats_ref.at[b, head, :, queries], stats_smem.at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(ranges_ref.at[x, :, queries], ranges_smem.at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(dout_ref.at[b, queries, head], dout_smem.at[slot], full.at[slot])
                    return done + 1

                # The place of the keys is free as soon as they are in registers; else not before the last product.
                early = 0 if tiling.resident else jnp.minimum(count * G, stages - 1)
                done = lax.fori_loop(0, early, copy, done)
                pl.when(i > 0)(lambda: sync(own_free, num_threads=everyone))
                for w in range(owners):
                    keys = pl.ds((tile * owners + w) * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(k_ref.at[b, keys, kv_head], k_smem.at[w], own_full)
                    plgpu.copy_gmem_to_smem(v_ref.at[b, keys, kv_head], v_smem.at[w], own_full)
                plgpu.copy_gmem_to_smem(work_ref.at[x, rank], work_smem, own_full)
                return lax.fori_loop(early, count * G, copy, done)

            total = lax.fori_loop(0, pieces, produce, jnp.int32(0))
            meet_arrivals(free, total, stages=stages, num_threads=everyone)
            sync(own_free, num_threads=everyone)

        @pl.when(wg < W)
        def _consumer():
            plgpu.set_max_registers(CONSUMER_REGISTERS[W], action="increase")
            own = wg if owners > 1 else 0
            tile_acc, sum_acc = (
                plgpu.WGMMAAccumulatorRef((ROWS, M), jnp.float32),
                plgpu.WGMMAAccumulatorRef((ROWS, H), jnp.float32),
            )

            def of_queries(ref):
                return lax.broadcast_in_dim(load(ref, PER_COLUMN), (ROWS, M), [1])

            def release(slot):  # after fence_reads, which has a product to hide under
                arrive(free + slot, num_threads=everyone)

            def release_own():
                fence_reads()
                arrive(own_free, num_threads=everyone)

            def consume(i, done):
                b, _, kv_head, _ = place(i)
                plgpu.barrier_wait(own_full)
                row = (work_smem[0] * owners + own) * ROWS
                count = work_smem[2] * G  # a step is a tile of queries of one head
                first, last, inner_first, inner_last = (work_smem[3 + 4 * own + n] * G for n in range(4))

                def await_slot(step):
                    slot = rem(done + step, stages)
                    plgpu.barrier_wait(full.at[slot])
                    return slot

                def skip(step, _):
                    release(await_slot(step))

                def weights(s_RM, step, slot):
                    def masked(x_RM):
                        key_RM = plgpu.broadcasted_iota(jnp.int32, (ROWS, M), 0, layout=TILE) + row
                        return hidden(x_RM, key_RM, *(of_queries(ranges_smem.at[slot, n]) for n in range(2)))

                    at_edge = (step < inner_first) | (step >= inner_last)
                    hide = functools.partial(lax.cond, at_edge, masked, lambda x_RM: x_RM)
                    return softmax_weights(s_RM, of_queries(stats_smem.at[slot, 0]), hide, scale=scale, softcap=softcap)

                def both(dk_acc, dv_acc):
                    if tiling.resident:
                        k_RH, v_RH = (load(smem.at[own], TILE) for smem in (k_smem, v_smem))
                        release_own()

                    def multiply(step, late_RM):
                        slot = await_slot(step)
                        if tiling.resident:
                            k, v = k_RH, v_RH
                        else:
                            # Zero, but the compiler does not know, or it would keep all addresses of a wide k at hand.
                            zero = step >> 31 if H == 128 else 0
                            k, v = k_smem.at[own + zero], v_smem.at[own + zero]

                        def gradients(s_acc, dp_acc):
                            dp_acc[...] = of_queries(stats_smem.at[slot, 1])
                            if tiling.lookahead:
                                before = rem(done + jnp.maximum(step - 1, first), stages)
                                plgpu.wgmma(dk_acc, late_RM, q_smem.at[before])
                            plgpu.wgmma(s_acc, k, transposed(q_smem.at[slot]))
                            plgpu.wgmma(dp_acc, v, transposed(dout_smem.at[slot]))
                            s_RM = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
                            if tiling.lookahead:
                                pl.when(step > first)(lambda: release(before))
                            p_RM, sloped_RM = weights(s_RM, step, slot)
                            plgpu.wgmma(dv_acc, p_RM.astype(dtype), dout_smem.at[slot])
                            return (sloped_RM * plgpu.wgmma_accumulator_load(dp_acc, wait_n=1)).astype(dtype)

                        ds_RM = pl.run_scoped(gradients, tile_acc, tile_acc)
                        if tiling.lookahead:
                            fence_reads()
                            plgpu.wgmma_wait(0)
                            return ds_RM
                        plgpu.wgmma(dk_acc, ds_RM, q_smem.at[slot])
                        fence_reads()
                        plgpu.wgmma_wait(0)
                        release(slot)

                    if not tiling.lookahead:
                        lax.fori_loop(first, last, multiply, None)
                        return dk_acc[...], dv_acc[...]
                    none_RM = plgpu.layout_cast(jnp.zeros((ROWS, M), dtype), TILE)
                    late_RM = lax.fori_loop(first, last, multiply, none_RM)
                    slot = rem(done + jnp.maximum(last - 1, 0), stages)
                    plgpu.wgmma(dk_acc, late_RM, q_smem.at[slot])
                    dk_RH = dk_acc[...]
                    pl.when(first < last)(lambda: release(slot))
                    # Without queries the product is zero times anything.
                    return jnp.where(first < last, dk_RH, 0.0), dv_acc[...]

                def of_values(dv_acc):
                    def multiply(step, _):
                        slot = await_slot(step)

                        def scores(s_acc):
                            plgpu.wgmma(s_acc, k_smem.at[0], transposed(q_smem.at[slot]))
                            return s_acc[...]

                        p_RM, sloped_RM = weights(pl.run_scoped(scores, tile_acc), step, slot)
                        plgpu.wgmma(dv_acc, p_RM.astype(dtype), dout_smem.at[slot])
                        pl.when(done + step > 0)(lambda: sync(weights_taken, num_threads=consumers))
                        spare_smem[...] = sloped_RM
                        arrive(weights_ready, num_threads=consumers)
                        fence_reads()
                        plgpu.wgmma_wait(0)
                        release(slot)

                    lax.fori_loop(0, count, multiply, None)
                    return dv_acc[...]

                def of_keys(dk_acc):
                    def multiply(step, _):
                        slot = await_slot(step)

                        def gradients(dp_acc):
                            dp_acc[...] = of_queries(stats_smem.at[slot, 1])
                            plgpu.wgmma(dp_acc, v_smem.at[0], transposed(dout_smem.at[slot]))
                            sync(weights_ready, num_threads=consumers)
                            sloped_RM = load(spare_smem, TILE)
                            arrive(weights_taken, num_threads=consumers)
                            return (sloped_RM * dp_acc[...]).astype(dtype)

                        ds_RM = pl.run_scoped(gradients, tile_acc)
                        plgpu.wgmma(dk_acc, ds_RM, q_smem.at[slot])
                        fence_reads()
                        plgpu.wgmma_wait(0)
                        release(slot)

                    lax.fori_loop(0, count, multiply, None)
                    return dk_acc[...]

                def write(values_RH, smem, ref):
                    # Waiting for the last copy is also where the four warps meet, which all have read `smem`.
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    smem[own] = values_RH.astype(dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(smem.at[own], ref.at[b, pl.ds(row, ROWS), kv_head])

                if shared:
                    # Each sum takes the place of what its own warpgroup alone has read.
                    pl.when(wg == 0)(lambda: write(pl.run_scoped(of_values, sum_acc), k_smem, dv_ref))
                    pl.when(wg == 1)(lambda: write(pl.run_scoped(of_keys, sum_acc) * scale, v_smem, dk_ref))
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    release_own()
                else:
                    lax.fori_loop(0, first, skip, None)
                    dk_RH, dv_RH = pl.run_scoped(both, sum_acc, sum_acc)
                    if not tiling.resident:
                        release_own()
                    write(dk_RH * scale, spare_smem, dk_ref)
                    write(dv_RH, spare_smem, dv_ref)
                    lax.fori_loop(last, count, skip, None)
                return done + count

            total = lax.fori_loop(0, pieces, consume, jnp.int32(0))
            if shared:
                pl.when((wg == 0) & (total > 0))(lambda: sync(weights_taken, num_threads=consumers))
            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct(k_BSKH.shape, dtype), jax.ShapeDtypeStruct(v_BSKH.shape, dtype)),
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=W + 1,
        thread_name="wg",
        scratch_types=(
            tiled_smem((owners, ROWS, H), dtype),
            tiled_smem((owners, ROWS, H), dtype),
            tiled_smem((ROWS, M), jnp.float32) if shared else tiled_smem((owners, ROWS, H), dtype),
            plgpu.SMEM((WORK_FIELDS,), jnp.int32),
            tiled_smem((stages, M, H), dtype),
            tiled_smem((stages, M, H), dtype),
            plgpu.SMEM((stages, 2, M), jnp.float32),
            plgpu.SMEM((stages, 2, M), jnp.int32),
            plgpu.Barrier(num_arrivals=2 * owners + 1),
            plgpu.Barrier(num_barriers=stages, num_arrivals=4),
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        kernel_name="hopper_attention_backward_dkv",
    )(q_BTNH, k_BSKH, v_BSKH, dout_BTNH, stats_BN2T, ranges_X2T, work_XJC)
