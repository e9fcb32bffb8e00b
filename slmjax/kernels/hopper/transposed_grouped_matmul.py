"""For each group of rows, the product of its rows of x, transposed, with its rows of dy: the matrices' gradient."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from slmjax.kernels.hopper import ring
from slmjax.kernels.hopper.ring import ALIGNED_ROWS, SWIZZLED, MatmulBlocks

DEFAULT_BLOCKS = MatmulBlocks()


# Compiled apart, so that equal layers of a model are traced and lowered once.
@functools.partial(jax.jit, static_argnames=("blocks", "programs"))
def transposed_grouped_matmul(
    x_XD: jax.Array,
    dy_XF: jax.Array,
    group_sizes_E: jax.Array,
    *,
    blocks: MatmulBlocks = DEFAULT_BLOCKS,
    programs: int | None = None,
) -> jax.Array:
    """Returns x[rows of e].T @ dy[rows of e] for each group e, as (E, D, F); zeros for a group without rows.

    Sums are float32, the result has the dtype of `x`. Rows after the last group count for nothing.

    Args:
      x_XD: bfloat16 or float16.
      dy_XF: of the same dtype.
      group_sizes_E: rows of each group, which follow each other; their sum is at most X.
      blocks: how to divide the work; `rows` are columns of x.
      programs: how many persistent programs; None is one a multiprocessor.

    Raises:
      ValueError: shapes disagree, or are not what the kernel is built for (`ring.why_not`).
    """
    X, D, F, E = x_XD.shape[0], x_XD.shape[1], dy_XF.shape[1], group_sizes_E.shape[0]
    if dy_XF.shape[0] != X:
        raise ValueError(
            f"transposed_grouped_matmul: expected as many rows of x as of dy, got {X} and {dy_XF.shape[0]}"
        )
    if (reason := ring.why_not(x_XD, dy_XF)) is not None:
        raise ValueError(f"transposed_grouped_matmul on Hopper {reason}")
    programs = programs or ring.num_programs()
    row_tiles, column_tiles = pl.cdiv(D, blocks.rows), pl.cdiv(F, blocks.columns)
    rows, chunks = blocks.rows_of_warpgroup, blocks.columns // SWIZZLED
    end_E = ring.cumulative_sum(group_sizes_E)
    # Large groups first: with a fixed order, programs then differ by less than the work of one tile.
    order_E = jnp.argsort(-group_sizes_E).astype(jnp.int32)

    def body(x, dy, order_of, start_of, end_of, out, x_smem, dy_smem, out_smem, full, empty, *zeroed):
        def tile(index):
            group = order_of[lax.div(index, row_tiles * column_tiles)]
            within = lax.rem(index, row_tiles * column_tiles)
            start, end = start_of[group], end_of[group]
            aligned = lax.div(start, ALIGNED_ROWS) * ALIGNED_ROWS
            num_steps = jnp.where(end > start, pl.cdiv(end - aligned, blocks.contracted), 0)
            row, column = lax.div(within, column_tiles) * blocks.rows, lax.rem(within, column_tiles) * blocks.columns
            return num_steps, (group, start, end, aligned, row, column)

        def copy(tile, step, stage, barrier):
            _, _, _, aligned, row, column = tile
            contracted = pl.ds(pl.multiple_of(aligned + step * blocks.contracted, ALIGNED_ROWS), blocks.contracted)
            plgpu.copy_gmem_to_smem(x.at[contracted, pl.ds(row, blocks.rows)], x_smem.at[stage], barrier)
            plgpu.copy_gmem_to_smem(dy.at[contracted, pl.ds(column, blocks.columns)], dy_smem.at[stage], barrier)

        def multiply(acc_ref, tile, step, stage, part):
            _, start, end, aligned, _, _ = tile
            first, last = start - aligned - step * blocks.contracted, end - aligned - step * blocks.contracted
            x_tile = x_smem.at[stage, :, pl.ds(part * rows, rows)]

            # The neighbours' rows, in a group's first and last step. In both, since zero times inf is not zero.
            @pl.when((first > 0) | (last < blocks.contracted))
            def _():
                share = blocks.columns * blocks.teams // 2
                _keep_rows(x_tile, first, last)
                _keep_rows(dy_smem.at[stage, :, pl.ds(part * share, share)], first, last)
                plgpu.commit_smem()
                for barrier in zeroed:  # with one team, each warpgroup zeroes one half of what both read
                    plgpu.barrier_arrive(barrier)
                    plgpu.barrier_wait(barrier)

            plgpu.wgmma(acc_ref, x_tile.transpose((1, 0)), dy_smem.at[stage])

        def store(tile, acc, warpgroup, part):
            group, _, _, _, row, column = tile
            acc = acc.astype(out.dtype)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for chunk in range(chunks):
                out_smem[warpgroup, chunk] = acc[:, chunk * SWIZZLED : (chunk + 1) * SWIZZLED]
            plgpu.commit_smem()
            for chunk in range(chunks):
                columns = pl.ds(column + chunk * SWIZZLED, SWIZZLED)
                out_tile = out.at[group, pl.ds(row + part * rows, rows), columns]
                plgpu.copy_smem_to_gmem(out_smem.at[warpgroup, chunk], out_tile)

        ring.run(
            *(full, empty),
            blocks=blocks,
            programs=programs,
            num_tiles=E * row_tiles * column_tiles,
            tile=tile,
            copy=copy,
            multiply=multiply,
            store=store,
        )

    dtype = x_XD.dtype
    kernel = ring.kernel(
        "transposed_grouped_matmul",
        body,
        jax.ShapeDtypeStruct((E, D, F), dtype),
        [
            ring.swizzled((blocks.stages, blocks.contracted, blocks.rows), dtype),
            ring.swizzled((blocks.stages, blocks.contracted, blocks.columns), dtype),
            ring.swizzled((2, chunks, rows, SWIZZLED), dtype),
            *ring.barriers(blocks),
            *([plgpu.Barrier(num_arrivals=2)] if blocks.teams == 1 else []),
        ],
        programs=programs,
    )
    return kernel(x_XD, dy_XF, order_E, jnp.pad(end_E, (1, 0)), end_E)


def _keep_rows(ref, first, last):
    """Sets the rows of `ref` outside of first <= row < last to zero."""
    values = ref[...]
    row = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=plgpu.Layout.WGMMA)
    ref[...] = jnp.where((row >= first) & (row < last), values, jnp.zeros_like(values))
