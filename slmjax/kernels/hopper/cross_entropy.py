"""Softmax cross-entropy of logits in memory and its gradient, in Pallas Mosaic GPU: one reading and one writing.

Persistent blocks, whose warpgroups share a row: each has every W-th piece of it, and a ring of pieces in shared memory
of its own, which it fills by asynchronous copies. The first pass over a row takes the maximum and the sum of
exponentials, online (Milakov & Gimelshein 2018); the second takes the gradient from the pieces that are still in the
ring, so that a row that fits is read once. Of a longer row the first pieces are read again, most likely from L2.
Meanwhile the ring receives what comes next, up to more than a row.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from slmjax.kernels.hopper.warpgroups import FIRST_NAMED_BARRIER, THREADS, div, load, rem, sm_count, sync

_LOG2E = math.log2(math.e)
_LOWEST = -(2.0**100)  # below all maxima, and finite when scaled
_COLUMNS = 128  # a row of logits is seen as rows of so many, which copies cut off at its end
_VECTOR_BYTES = 16
_STAGING = 2
_MOST_BARRIERS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowBlocks:
    """How rows are divided.

    Attributes:
      warpgroups: of a block.
      vectors: of 16 bytes that a thread has of a piece.
      slots: pieces that the ring of a warpgroup holds.
      ahead: slots that are never kept for the second pass.
      resident: blocks of a multiprocessor.
    """

    warpgroups: int = 4
    vectors: int = 4
    slots: int = 5
    ahead: int = 1
    resident: int = 1

    def __post_init__(self):
        if not 0 < self.ahead < self.slots or not 0 < self.warpgroups * self.slots <= _MOST_BARRIERS:
            raise ValueError(
                f"RowBlocks: expected more slots than those ahead, and at most {_MOST_BARRIERS} in all warpgroups, "
                f"got {self}"
            )


# Worth measuring. On an H200 the first is the fastest: 0.436 ms for 8192 x 49152 in bfloat16, the others 0.44.
CANDIDATES = (
    RowBlocks(),
    RowBlocks(warpgroups=2, vectors=8, slots=5),
    RowBlocks(warpgroups=3, slots=7),
)


def why_not(logits_XV: jax.Array, *, logit_scale: float = 1.0) -> str | None:
    """Returns why the kernel cannot take these logits, or None if it can."""
    if logits_XV.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"needs logits in bfloat16, float16 or float32, got {logits_XV.dtype}"
    least = THREADS * _vector(logits_XV.dtype)
    if logits_XV.shape[1] % _COLUMNS or logits_XV.shape[1] < least:
        return f"needs a vocabulary that is a multiple of {_COLUMNS}, at least {least}, got {logits_XV.shape[1]}"
    if logit_scale <= 0:
        return f"needs a positive logit_scale, got {logit_scale}"
    return None


def cross_entropy(
    logits_XV: jax.Array,
    targets_X: jax.Array,
    weights_X: jax.Array,
    *,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    dtype: jax.typing.DTypeLike,
    blocks: RowBlocks = RowBlocks(),
    programs: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns each row's logsumexp and its target's logit, float32 and scaled, and the gradient of the logits.

    The gradient is that of sum(weights * (lse - target + z_loss * lse^2)). In the dtype of the logits, it takes their
    place in memory, if they are not used otherwise.

    Args:
      logits_XV: bfloat16, float16 or float32, without `logit_scale`; -inf is allowed, except for a whole row.
      targets_X: int32; of one that is not in the vocabulary the logit is NaN.
      weights_X: float32.
      logit_scale: positive factor of the logits.
      z_loss: factor of the squared logsumexp.
      dtype: of the gradient.
      blocks: how to divide the work.
      programs: how many persistent programs; None is as many as run at one time.

    Raises:
      ValueError: the logits are not what the kernel is built for (`why_not`).
    """
    if (reason := why_not(logits_XV, logit_scale=logit_scale)) is not None:
        raise ValueError(f"cross_entropy on Hopper {reason}")
    X, V = logits_XV.shape
    in_place = logits_XV.dtype == jnp.dtype(dtype)
    W, slots = blocks.warpgroups, blocks.slots
    vector = _vector(logits_XV.dtype)
    layout = _layout(vector)
    lines = V // _COLUMNS
    vectors = min(blocks.vectors, lines // vector)
    piece_lines = vectors * vector
    pieces = pl.cdiv(lines, piece_lines)
    keep = slots - blocks.ahead
    programs = min(programs or blocks.resident * sm_count(), X)
    scale = logit_scale * _LOG2E
    shape = (vector, _COLUMNS)
    parts_width = pl.cdiv(W * vector, 32) * 32

    def body(targets, weights, logits, lse_out, target_out, gradient, ring, staging, parts, full):
        wg, block = lax.axis_index("wg"), lax.axis_index("block")
        mine = div(pieces - 1 - wg + W, W)
        again = jnp.maximum(mine - keep, 0)
        loads = mine + again

        def place(step):
            """First line of this warpgroup's piece: after all pieces come those that are read again."""
            return (wg + jnp.where(step < mine, step, step - mine) * W) * piece_lines

        def fill(slot, row, step):
            """Starts to copy one piece, and returns which is next."""

            @pl.when(row < X)
            def _():
                piece = logits.at[row, pl.ds(place(step), piece_lines)]
                plgpu.copy_gmem_to_smem(piece, ring.at[wg, slot], full.at[wg * slots + slot])

            last = step + 1 == loads
            return jnp.where(last, row + programs, row), jnp.where(last, 0, step + 1)

        def store(source, row, line):
            # What is contiguous in memory is copied without regard for the end of a row.
            cut = lines % piece_lines
            for size, wanted in ((piece_lines, line + piece_lines <= lines), (cut, line + cut == lines)):
                if size:

                    @pl.when(wanted)
                    def _(size=size):
                        plgpu.copy_smem_to_gmem(source.at[pl.ds(0, size)], gradient.at[row, pl.ds(line, size)])

        def after(slot, count: Any = 1):
            slot = slot + count
            return jnp.where(slot >= slots, slot - slots, slot)

        def read(slot):
            return [load(ring.at[wg, slot, pl.ds(i * vector, vector)], layout) for i in range(vectors)]

        def iota(dimension):
            return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=layout)

        def whole(value):
            return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

        def first_pass(step, carry):
            slot, following, top, total = carry
            plgpu.barrier_wait(full.at[wg * slots + slot])
            xs = read(slot)
            if lines % piece_lines:
                here = lines - place(step)

                def masked():
                    return [jnp.where(iota(0) < here - i * vector, x, -jnp.inf) for i, x in enumerate(xs)]

                xs = lax.cond(here < piece_lines, masked, lambda: xs)
            new = jnp.maximum(top, functools.reduce(jnp.maximum, xs).astype(jnp.float32))
            shift = new * scale
            total = total * jnp.exp2(top * scale - shift)
            for x in xs:
                total = total + jnp.exp2(x.astype(jnp.float32) * scale - shift)

            def free():
                plgpu.commit_smem()  # all threads have read it, as seen by copies
                return fill(slot, *following)

            following = lax.cond(step < again, free, lambda: following)
            return after(slot), following, new, total

        def over_block(top, total, turn):
            """Returns the maximum and the sum of all warpgroups."""
            top_L = jnp.max(top, axis=1)
            over_columns = plgpu.layout_cast(lax.broadcast_in_dim(top_L, shape, [0]), layout)
            total_L = jnp.sum(total * jnp.exp2((top - over_columns) * scale), axis=1)
            own = pl.ds(wg * vector, vector)
            parts[turn, 0, own] = top_L
            parts[turn, 1, own] = total_L
            sync(FIRST_NAMED_BARRIER, num_threads=W * THREADS)
            top_P, total_P = (load(parts.at[turn, i], _ONE_A_LANE) for i in range(2))
            top = jnp.max(top_P)
            return top, jnp.sum(total_P * jnp.exp2((top_P - top) * scale))

        def one_row(i, carry):
            slot, following, buffer = carry
            row = block + i * programs
            target, weight = targets[row], weights[row]
            # As jax indexes: from the end if negative, not a number if there is none, and never another's memory.
            index = jnp.where(target < 0, target + V, target)
            exists = (index >= 0) & (index < V)
            index = jnp.where(exists, index, 0)
            target_logit = logits[row, div(index, _COLUMNS), rem(index, _COLUMNS)].astype(jnp.float32)
            target_logit = jnp.where(exists, target_logit, jnp.nan)
            start = (slot, following, whole(_LOWEST), whole(0.0))
            _, following, top, total = lax.fori_loop(0, mine, first_pass, start)

            @pl.when(wg == 0)
            def _():
                target_out[row] = target_logit * logit_scale

            top, total = over_block(top, total, rem(i, 2))
            lse2 = top * scale + jnp.log2(total)
            lse = lse2 * (1 / _LOG2E)

            @pl.when(wg == 0)
            def _():
                lse_out[row] = lse

            subtract = weight * logit_scale
            factor = subtract * (1.0 + 2.0 * z_loss * lse)

            def second_pass(step, carry):
                slot, following, buffer = carry
                pl.when(step >= mine)(lambda: plgpu.barrier_wait(full.at[wg * slots + slot]))
                ds = [jnp.exp2(x.astype(jnp.float32) * scale - lse2) * factor for x in read(slot)]
                line = place(step)
                column = target - line * _COLUMNS

                def with_target():
                    column_VC = iota(0) * _COLUMNS + iota(1)
                    return [
                        d - jnp.where(column_VC == column - i * vector * _COLUMNS, subtract, 0.0)
                        for i, d in enumerate(ds)
                    ]

                has_target = (column >= 0) & (column < piece_lines * _COLUMNS)
                ds = lax.cond(has_target, with_target, lambda: ds)
                plgpu.wait_smem_to_gmem(_STAGING - 1, wait_read_only=True)
                for i, d in enumerate(ds):
                    staging[wg, buffer, pl.ds(i * vector, vector)] = d.astype(dtype)
                plgpu.commit_smem()
                store(staging.at[wg, buffer], row, line)
                return after(slot), fill(slot, *following), 1 - buffer

            return lax.fori_loop(again, loads, second_pass, (after(slot, rem(again, slots)), following, buffer))

        pl.when(wg == 0)(lambda: _clear(parts))
        sync(FIRST_NAMED_BARRIER, num_threads=W * THREADS)
        following = (jnp.where(mine > 0, block, X), jnp.int32(0))
        for slot in range(slots):
            following = fill(slot, *following)
        lax.fori_loop(0, div(X - 1 - block + programs, programs), one_row, (jnp.int32(0), following, jnp.int32(0)))
        plgpu.wait_smem_to_gmem(0)

    scratch = (
        plgpu.SMEM((W, slots, piece_lines, _COLUMNS), logits_XV.dtype),
        plgpu.SMEM((W, _STAGING, piece_lines, _COLUMNS), dtype),
        plgpu.SMEM((2, 2, parts_width), jnp.float32),
        plgpu.Barrier(num_barriers=W * slots),
    )

    def scoped(targets, weights, logits, *outputs):
        lse, target, gradient = (*outputs, logits) if in_place else outputs
        pl.run_scoped(
            functools.partial(body, targets, weights, logits, lse, target, gradient), *scratch, collective_axes="wg"
        )

    seen = logits_XV.reshape(X, lines, _COLUMNS)  # the same bytes
    statistic = jax.ShapeDtypeStruct((X,), jnp.float32)
    other = () if in_place else (jax.ShapeDtypeStruct(seen.shape, dtype),)
    kernel: Callable[..., Any] = pl.kernel(
        scoped,
        out_type=(statistic, statistic, *other),
        mesh=plgpu.Mesh(grid=(programs,), grid_names=("block",), num_threads=W, thread_name="wg"),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,  # no reduction is over warps
        ),
        name="hopper_cross_entropy",
    )
    operands = targets_X.astype(jnp.int32), weights_X.astype(jnp.float32)
    if in_place:
        ref = jax.new_ref(seen)
        lse_X, target_X = kernel(*operands, ref)
        gradient = jax.freeze(ref)
    else:
        lse_X, target_X, gradient = kernel(*operands, seen)
    return lse_X, target_X, gradient.reshape(X, V)


def _vector(dtype: jax.typing.DTypeLike) -> int:
    """Numbers of a thread's vector."""
    return _VECTOR_BYTES // jnp.dtype(dtype).itemsize


def _layout(vector: int):
    """One vector a thread, in the order of threads: a matrix of `vector` lines, a quarter of them for each warp."""
    if vector == 4:  # a line for each warp
        tiling = plgpu.Tiling(((4, _COLUMNS), (4,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
    tiling = plgpu.Tiling(((8, _COLUMNS), (2, _COLUMNS), (8,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


# Every warp has all of a vector, so that it need not ask the others for a reduction.
_ONE_A_LANE = plgpu.Layout.TILED(
    plgpu.Tiling(((32,), (1,))), warp_dims=(plgpu.Replicated(4),), lane_dims=(-2,), vector_dim=-1
)


def _clear(parts) -> None:
    """Gives the parts that no warpgroup writes the maximum and the sum of nothing."""
    for turn in range(2):
        for i, value in enumerate((_LOWEST, 0.0)):
            parts[turn, i, :] = plgpu.layout_cast(jnp.full(parts.shape[-1:], value, jnp.float32), _ONE_A_LANE)
