"""Fused attention on Hopper, forward: FlashAttention-3's pipeline (arXiv:2407.08608) over ranges of keys.

A block has one producer warpgroup, which only copies, and two or three consumers with 64 rows of queries each. Keys and
values go through a ring of tiles in shared memory. A consumer issues the scores of tile j together with the values of
tile j - 1, and computes the softmax of j while the values are still being multiplied; consumers take turns at issuing,
so that one's softmax runs under the other's products. Blocks are persistent and take the longest tiles of queries
first; the queries of the next tile are fetched while the last one is written.
"""

import dataclasses
import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from slmjax.kernels.hopper.warpgroups import (
    CONSUMER_REGISTERS,
    FIRST_NAMED_BARRIER,
    NAMED_BARRIERS,
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
from slmjax.kernels.tiles import IntArray, inner_tile_bounds, pad_ranges, tile_bounds

_LOG2E = math.log2(math.e)
_LOWEST = -1e30  # maximum of no scores: finite, so that its differences are numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardTiling:
    """How the forward kernel cuts its work.

    Attributes:
      warpgroups: consumers of a block, each with 64 rows of queries.
      k_tile: keys of a tile.
      stages: tiles of keys, and of values, in shared memory.
      heads_together: consumers take the same queries of the heads of one key/value head, then the next queries; instead
        of neighbouring queries of one head.
      turns: whether consumers take turns at the tensor cores.
    """

    warpgroups: int = 2
    k_tile: int = 128
    stages: int = 2
    heads_together: bool = False
    turns: bool = True

    def __post_init__(self):
        if self.warpgroups + 2 * self.stages + 1 > NAMED_BARRIERS:
            raise ValueError(f"ForwardTiling: more barriers than the hardware has, got {self}")


# Compiled apart, so that equal layers of a model are traced and lowered once.
@functools.partial(jax.jit, static_argnames=("scale", "softcap", "tiling"))
def attention_forward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    k_start_XT: IntArray,
    k_end_XT: IntArray,
    sinks_N: jax.Array | None,
    *,
    scale: float,
    softcap: float | None,
    tiling: ForwardTiling,
) -> tuple[jax.Array, jax.Array]:
    """Returns out_BTNH and the natural logarithm of the softmax's denominator, lse_BNT in float32.

    T must be a multiple of 64 and S of the tile of keys; head_dim a multiple of 16. Queries whose range is empty give
    zeros and an lse of +infinity. `k_start_XT` and `k_end_XT` have one row for all, or one for each of the batch.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    W, G, dtype = tiling.warpgroups, N // K, q_BTNH.dtype
    k_tile, stages = tiling.k_tile, tiling.stages
    if T % ROWS or S % k_tile:
        raise ValueError(f"attention_forward: T={T}, S={S} do not fit {tiling}")
    # A unit is one consumer's work: 64 rows of queries of one head. A block takes W units of a slice at one time, which
    # is a head or a group of heads of one batch row.
    heads = G if tiling.heads_together else 1
    num_slices, num_units = B * (N // heads), T // ROWS * heads
    num_tiles = pl.cdiv(num_units, W)
    bounds_XI4 = _bounds(k_start_XT, k_end_XT, k_tile=k_tile, units=num_tiles * W, heads=heads, warpgroups=W)
    k_start_XT, k_end_XT = pad_ranges(k_start_XT, k_end_XT, pl.cdiv(num_tiles * W, heads) * ROWS)
    X = k_start_XT.shape[0]

    num_blocks = min(sm_count(), num_tiles * num_slices)
    together = slices_together(num_slices, bytes_each=4 * S * H * heads // G)

    turn, k_free = FIRST_NAMED_BARRIER, FIRST_NAMED_BARRIER + W
    v_free, q_free = k_free + stages, k_free + 2 * stages
    both = (W + 1) * THREADS
    softmax_scale = (scale if softcap is None else softcap) * _LOG2E

    def body(q_ref, k_ref, v_ref, start_ref, end_ref, bounds_ref, *refs):
        sinks_ref = None if sinks_N is None else refs[0]
        out_ref, lse_ref, q_smem, k_smem, v_smem, out_smem, lse_smem, q_full, k_full, v_full = refs[-10:]
        wg, block = lax.axis_index("wg"), lax.axis_index("block")

        def place(i):
            """Batch row, first head, tile, and its tiles of keys, of the block's i-th piece of work."""
            item = block + i * num_blocks
            group = div(item, together * num_tiles)
            within = item - group * (together * num_tiles)
            rank = div(within, together)  # the longest tiles first
            slice_ = group * together + within - rank * together
            b = div(slice_, N // heads)
            tile = num_tiles - 1 - rank
            bounds = tuple(bounds_ref[b if X > 1 else 0, tile, n] for n in range(4))
            return b, (slice_ - b * (N // heads)) * heads, tile, bounds

        def unit_of(tile, head, w):
            """First row of queries, and head, of a consumer."""
            unit = tile * W + w
            q_tile = div(unit, heads)
            return q_tile * ROWS, head + unit - q_tile * heads

        num_items = div(num_tiles * num_slices - 1 - block, num_blocks) + 1

        def each_item(work, ahead, count):
            """Folds work(place, what `ahead` said of it, count) over the items, asking `ahead` one item early."""

            def now(i, carry):
                count, here, known = carry
                there = place(jnp.minimum(i + 1, num_items - 1))
                then = ahead(there)
                return work(i, here, known, count), there, then

            first = place(0)
            return lax.fori_loop(0, num_items, now, (count, first, ahead(first)))[0]

        @pl.when(wg == W)
        def _producer():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            def produce(i, here, _, count):
                b, head, tile, (first, last, *_) = here
                kv_head = div(head, G)
                pl.when(i > 0)(lambda: sync(q_free, num_threads=both))
                for w in range(W):
                    row, q_head = unit_of(tile, head, w)
                    plgpu.copy_gmem_to_smem(q_ref.at[b, pl.ds(row, ROWS), q_head], q_smem.at[w], q_full)

                def copy(j, count):
                    slot = rem(count, stages)
                    source = (b, pl.ds(j * k_tile, k_tile), kv_head)
                    pl.when(count >= stages)(lambda: sync(k_free + slot, num_threads=both))
                    plgpu.copy_gmem_to_smem(k_ref.at[source], k_smem.at[slot], k_full.at[slot])
                    pl.when(count >= stages)(lambda: sync(v_free + slot, num_threads=both))
                    plgpu.copy_gmem_to_smem(v_ref.at[source], v_smem.at[slot], v_full.at[slot])
                    return count + 1

                return lax.fori_loop(first, last, copy, count)

            total = each_item(produce, lambda _: (), jnp.int32(0))
            for behind in range(stages):  # every arrival is met

                @pl.when(total > behind)
                def _(behind=behind):
                    slot = rem(total - 1 - behind + stages, stages)
                    sync(k_free + slot, num_threads=both)
                    sync(v_free + slot, num_threads=both)

            sync(q_free, num_threads=both)

        @pl.when(wg < W)
        def _consumer():
            plgpu.set_max_registers(CONSUMER_REGISTERS[W], action="increase")
            if tiling.turns:
                pl.when(wg == W - 1)(lambda: arrive(turn, num_threads=2 * THREADS))

            def take_turn():
                if tiling.turns:
                    sync(turn + wg, num_threads=2 * THREADS)

            def pass_turn():
                if tiling.turns:
                    arrive(turn + rem(wg + 1, W), num_threads=2 * THREADS)

            def rows_ahead(there):
                b, head, tile, _ = there
                rows = pl.ds(unit_of(tile, head, wg)[0], ROWS)
                return tuple(
                    load(ref.at[b if X > 1 else 0, rows], plgpu.Layout.WGMMA.reduce(1)) for ref in (start_ref, end_ref)
                )

            def consume(i, here, known, count):
                b, head, tile, (first, last, inner_first, inner_last) = here
                row, head = unit_of(tile, head, wg)
                start_R, end_R = known

                def over_keys(x_R):
                    return lax.broadcast_in_dim(x_R, (ROWS, k_tile), [0])

                def scores(s_RS, j):
                    if softcap is not None:
                        s_RS = jnp.tanh(s_RS * (scale / softcap))

                    def masked():
                        key_RS = plgpu.broadcasted_iota(jnp.int32, (ROWS, k_tile), 1, layout=plgpu.Layout.WGMMA)
                        key_RS = key_RS + j * k_tile
                        seen_RS = (key_RS >= over_keys(start_R)) & (key_RS < over_keys(end_R))
                        return jnp.where(seen_RS, s_RS, -jnp.inf)

                    return lax.cond((j < inner_first) | (j >= inner_last), masked, lambda: s_RS)

                def softmax(s_RS, top_R, total_R):
                    new_R = jnp.maximum(top_R, s_RS.max(axis=1) * softmax_scale)
                    shrink_R = jnp.exp2(top_R - new_R)
                    p_RS = jnp.exp2(s_RS * softmax_scale - over_keys(new_R))
                    total_R = total_R * shrink_R + p_RS.sum(axis=1)
                    return p_RS.astype(dtype), new_R, total_R, shrink_R

                def multiply(out_acc):
                    plgpu.barrier_wait(q_full)
                    slot = rem(count, stages)
                    plgpu.barrier_wait(k_full.at[slot])

                    def first_scores(s_acc):
                        plgpu.wgmma(s_acc, q_smem.at[wg], transposed(k_smem.at[slot]))
                        return s_acc[...]

                    s_RS = pl.run_scoped(first_scores, plgpu.WGMMAAccumulatorRef((ROWS, k_tile), jnp.float32))
                    arrive(k_free + slot, num_threads=both)
                    # A sink is a key whose value is zero, met before all others.
                    start = (_LOWEST, 0.0) if sinks_ref is None else (sinks_ref[head] * _LOG2E, 1.0)
                    top_R, total_R = (
                        plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))
                        for value in start
                    )
                    p_RS, top_R, total_R, _ = softmax(scores(s_RS, first), top_R, total_R)

                    def step(j, carry):
                        p_RS, top_R, total_R = carry
                        now = count + j - first
                        slot, before = rem(now, stages), rem(now - 1 + stages, stages)
                        plgpu.barrier_wait(k_full.at[slot])
                        take_turn()

                        def products(s_acc):
                            plgpu.wgmma(s_acc, q_smem.at[wg], transposed(k_smem.at[slot]))
                            plgpu.barrier_wait(v_full.at[before])
                            plgpu.wgmma(out_acc, p_RS, v_smem.at[before])
                            pass_turn()
                            return plgpu.wgmma_accumulator_load(s_acc, wait_n=1)

                        s_RS = pl.run_scoped(products, plgpu.WGMMAAccumulatorRef((ROWS, k_tile), jnp.float32))
                        arrive(k_free + slot, num_threads=both)
                        new = softmax(scores(s_RS, j), top_R, total_R)
                        new_RS, top_R, total_R, shrink_R = lax.optimization_barrier(new)
                        plgpu.wgmma_wait(0)
                        # The old weights stay alive until here: else the new ones get their registers while the tensor
                        # cores still read these, and the assembler serialises the products.
                        new_RS, _ = lax.optimization_barrier((new_RS, p_RS))
                        arrive(v_free + before, num_threads=both)
                        out_RH = plgpu.wgmma_accumulator_load(out_acc, wait_n=None)
                        out_acc[...] = out_RH * lax.broadcast_in_dim(shrink_R, (ROWS, H), [0])
                        return new_RS, top_R, total_R

                    p_RS, top_R, total_R = lax.fori_loop(first + 1, last, step, (p_RS, top_R, total_R))
                    arrive(q_free, num_threads=both)
                    slot = rem(count + last - 1 - first, stages)
                    plgpu.barrier_wait(v_full.at[slot])
                    plgpu.wgmma(out_acc, p_RS, v_smem.at[slot])
                    out_RH = out_acc[...]
                    arrive(v_free + slot, num_threads=both)
                    return out_RH, top_R, total_R

                out_RH, top_R, total_R = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((ROWS, H), jnp.float32))
                some_R = start_R < end_R
                inverse_R = jnp.where(some_R, 1.0 / total_R, 0.0)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_smem[wg, ...] = (out_RH * lax.broadcast_in_dim(inverse_R, (ROWS, H), [0])).astype(dtype)
                lse_smem[wg, ...] = jnp.where(some_R, (top_R + jnp.log2(total_R)) * (1 / _LOG2E), jnp.inf)
                plgpu.commit_smem()

                @pl.when(row < T)
                def _():
                    rows = pl.ds(row, ROWS)
                    plgpu.copy_smem_to_gmem(out_smem.at[wg], out_ref.at[b, rows, head], commit_group=False)
                    plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_ref.at[b, head, rows])

                return count + last - first

            each_item(consume, rows_ahead, jnp.int32(0))
            if tiling.turns:
                pl.when(wg == 0)(lambda: sync(turn, num_threads=2 * THREADS))
            plgpu.wait_smem_to_gmem(0)

    inputs = [q_BTNH, k_BSKH, v_BSKH, k_start_XT, k_end_XT, bounds_XI4]
    inputs += [] if sinks_N is None else [sinks_N.astype(jnp.float32)]
    return plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct(q_BTNH.shape, dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)),
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=W + 1,
        thread_name="wg",
        scratch_types=(
            tiled_smem((W, ROWS, H), dtype),
            tiled_smem((stages, k_tile, H), dtype),
            tiled_smem((stages, k_tile, H), dtype),
            tiled_smem((W, ROWS, H), dtype),
            plgpu.SMEM((W, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=W),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        kernel_name="hopper_attention_forward",
    )(*inputs)


def _bounds(
    k_start_XT: IntArray, k_end_XT: IntArray, *, k_tile: int, units: int, heads: int, warpgroups: int
) -> jax.Array:
    """Returns (X, blocks' tiles, 4): the tiles of keys first <= j < last, and of them those that need no mask."""
    first_XI, last_XI = tile_bounds(k_start_XT, k_end_XT, q_tile=ROWS, k_tile=k_tile)
    inner_first_XI, inner_last_XI = inner_tile_bounds(k_start_XT, k_end_XT, q_tile=ROWS, k_tile=k_tile)
    q_tile_U = np.minimum(np.arange(units) // heads, first_XI.shape[-1] - 1)
    xp = np if isinstance(first_XI, np.ndarray) else jnp

    def of_units(bound_XI):
        return bound_XI[:, q_tile_U].reshape(bound_XI.shape[0], -1, warpgroups)

    first_XI = of_units(xp.where(last_XI == 0, np.iinfo(np.int32).max, first_XI)).min(-1)
    last_XI = of_units(last_XI).max(-1)
    # Where nobody sees anything, one tile of keys is looked at all the same, and all of it is masked.
    first_XI, last_XI = xp.where(last_XI == 0, 0, first_XI), xp.maximum(last_XI, 1)
    inner = of_units(inner_first_XI).max(-1), of_units(inner_last_XI).min(-1)
    return jnp.stack([first_XI, last_XI, *inner], axis=-1).astype(jnp.int32)
