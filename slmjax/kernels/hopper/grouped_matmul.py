"""Groups of rows times a matrix of their own, in Pallas Mosaic GPU: the forward product and the inputs' gradient.

Groups are cut into tiles of rows. Tiles are numbered group by group, the columns of a tile of rows first, so that what
runs at one time reads few rows and few matrices, which stay in L2. A tile may overlap its neighbours' rows: it computes
them too, and stores only its own.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from slmjax.kernels.hopper import ring
from slmjax.kernels.hopper.ring import ALIGNED_ROWS, SWIZZLED, MatmulBlocks

DEFAULT_BLOCKS = MatmulBlocks()


class RowTiles(NamedTuple):
    """The tiles of rows of all groups, in order; the rows after the last group are one more group, number E.

    Attributes:
      group_I: of each tile.
      row_I: where a tile starts, a multiple of ALIGNED_ROWS.
      first_I: the first of its rows that is the group's.
      last_I: the end of those.
      last_tile_G: the end of each group's tiles; the last is the number of tiles, and what follows them in the arrays
        above means nothing.
    """

    group_I: jax.Array
    row_I: jax.Array
    first_I: jax.Array
    last_I: jax.Array
    last_tile_G: jax.Array


def row_tiles(group_sizes_E: jax.Array, *, num_rows: int, tile_rows: int) -> RowTiles:
    """Cuts each group into tiles, from the last aligned row at or before its start."""
    end_E = ring.cumulative_sum(group_sizes_E)
    start_G, end_G = jnp.pad(end_E, (1, 0)), jnp.pad(end_E, (0, 1), constant_values=num_rows)
    aligned_G = start_G // ALIGNED_ROWS * ALIGNED_ROWS
    tiles_G = jnp.where(end_G > start_G, -(-(end_G - aligned_G) // tile_rows), 0)
    last_tile_G = ring.cumulative_sum(tiles_G)
    # A group of s rows has at most (s + ALIGNED_ROWS - 1 + tile_rows - 1) / tile_rows tiles.
    most = (num_rows + start_G.shape[0] * (ALIGNED_ROWS + tile_rows - 2)) // tile_rows
    tile_I = jnp.arange(most, dtype=jnp.int32)
    group_I = jnp.sum(tile_I[:, None] >= last_tile_G[None, :-1], axis=1, dtype=jnp.int32)
    row_I = aligned_G[group_I] + (tile_I - (last_tile_G - tiles_G)[group_I]) * tile_rows
    first_I, last_I = jnp.maximum(row_I, start_G[group_I]), jnp.minimum(row_I + tile_rows, end_G[group_I])
    return RowTiles(group_I, row_I, first_I, last_I, last_tile_G)


# Compiled apart, so that equal layers of a model are traced and lowered once: the assembler takes a second for each.
@functools.partial(jax.jit, static_argnames=("transposed", "blocks", "programs"))
def grouped_matmul(
    x_XD: jax.Array,
    w_EDF: jax.Array,
    group_sizes_E: jax.Array,
    *,
    transposed: bool = False,
    blocks: MatmulBlocks = DEFAULT_BLOCKS,
    programs: int | None = None,
) -> jax.Array:
    """Multiplies the first group_sizes[0] rows with w[0], the next group_sizes[1] with w[1], and so on.

    Sums are float32, the result has the dtype of `x`. Rows after the last group give zeros.

    Args:
      x_XD: bfloat16 or float16, the rows.
      w_EDF: a matrix for each group, in the same dtype.
      group_sizes_E: rows of each group; their sum is at most X.
      transposed: x is (X, F) and is multiplied with the transposed matrices, as for the gradient of the rows.
      blocks: how to divide the work.
      programs: how many persistent programs; None is one a multiprocessor.

    Raises:
      ValueError: shapes disagree, or are not what the kernel is built for (`ring.why_not`).
    """
    E, D, F = (w_EDF.shape[0], *w_EDF.shape[:0:-1]) if transposed else w_EDF.shape
    if x_XD.shape[1] != D or group_sizes_E.shape != (E,):
        raise ValueError(
            f"grouped_matmul: expected x (X, {D}) and group_sizes ({E},) for w {w_EDF.shape} "
            f"{'transposed ' if transposed else ''}, got {x_XD.shape} and {group_sizes_E.shape}"
        )
    if (reason := ring.why_not(x_XD, w_EDF)) is not None:
        raise ValueError(f"grouped_matmul on Hopper {reason}")
    programs = programs or ring.num_programs()
    column_tiles, steps = pl.cdiv(F, blocks.columns), pl.cdiv(D, blocks.contracted)
    rows, chunks = blocks.rows_of_warpgroup, blocks.columns // SWIZZLED
    w_block = (blocks.columns, blocks.contracted) if transposed else (blocks.contracted, blocks.columns)

    def body(x, w, group_of, row_of, first_of, last_of, last_tile_of, out, x_smem, w_smem, out_smem, full, empty):
        def tile(index):
            i = lax.div(index, column_tiles)
            group = group_of[i]
            num_steps = jnp.where(group < E, steps, 0)  # what belongs to no group is left at zero
            row = pl.multiple_of(row_of[i], ALIGNED_ROWS)
            # All is read here, so that what the store needs has arrived when the product is done.
            return num_steps, (group, row, first_of[i], last_of[i], lax.rem(index, column_tiles) * blocks.columns)

        def copy(tile, step, stage, barrier):
            group, row, _, _, column = tile
            columns, contracted = pl.ds(column, blocks.columns), pl.ds(step * blocks.contracted, blocks.contracted)
            w_tile = w.at[group, columns, contracted] if transposed else w.at[group, contracted, columns]
            plgpu.copy_gmem_to_smem(x.at[pl.ds(row, blocks.rows), contracted], x_smem.at[stage], barrier)
            plgpu.copy_gmem_to_smem(w_tile, w_smem.at[stage], barrier)

        def multiply(acc_ref, tile, step, stage, part):
            w_tile = w_smem.at[stage]
            w_tile = w_tile.transpose((1, 0)) if transposed else w_tile
            plgpu.wgmma(acc_ref, x_smem.at[stage, pl.ds(part * rows, rows)], w_tile)

        def store(tile, acc, warpgroup, part):
            _, row, first, last, column = tile
            row = row + part * rows
            first, last = jnp.clip(first - row, 0, rows), jnp.clip(last - row, 0, rows)
            acc = acc.astype(out.dtype)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for chunk in range(chunks):
                out_smem[warpgroup, chunk] = acc[:, chunk * SWIZZLED : (chunk + 1) * SWIZZLED]
            plgpu.commit_smem()
            for chunk in range(chunks):
                columns = pl.ds(column + chunk * SWIZZLED, SWIZZLED)
                _store_rows(out_smem.at[warpgroup, chunk], out.at[:, columns], row, first, last)

        ring.run(
            *(full, empty),
            blocks=blocks,
            programs=programs,
            num_tiles=last_tile_of[E] * column_tiles,
            tile=tile,
            copy=copy,
            multiply=multiply,
            store=store,
        )

    dtype = x_XD.dtype
    kernel = ring.kernel(
        "grouped_matmul_transposed" if transposed else "grouped_matmul",
        body,
        jax.ShapeDtypeStruct((x_XD.shape[0], F), dtype),
        [
            ring.swizzled((blocks.stages, blocks.rows, blocks.contracted), dtype),
            ring.swizzled((blocks.stages, *w_block), dtype),
            ring.swizzled((2, chunks, rows, SWIZZLED), dtype, tile_rows=1),  # any of its rows can start a copy
            *ring.barriers(blocks),
        ],
        programs=programs,
    )
    return kernel(x_XD, w_EDF, *row_tiles(group_sizes_E, num_rows=x_XD.shape[0], tile_rows=blocks.rows))


def _store_rows(chunk_smem, out, row, first, last):
    """Copies the rows first <= i < last of a chunk to the rows row + i of `out`.

    The size of a copy is constant: there is one for each power of two in the number of rows.
    """
    size = chunk_smem.shape[0]
    while size:

        @pl.when((last - first) & size != 0)
        def _(size=size, first=first):
            plgpu.copy_smem_to_gmem(chunk_smem.at[pl.ds(first, size)], out.at[pl.ds(row + first, size)])

        first = first + ((last - first) & size)
        size //= 2
