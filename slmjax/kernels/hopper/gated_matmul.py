"""The first half of a gated feed-forward (SwiGLU) on Hopper: one product with its activation, in Pallas Mosaic GPU.

Columns of the gate's and of the other matrix take turns, SWIZZLED of each, so that a tile of the product has both of
what an activation needs, in the same threads. One warpgroup computes activations and stores while the other multiplies.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from slmjax.kernels.hopper import ring
from slmjax.kernels.hopper.ring import SWIZZLED, MatmulBlocks
from slmjax.kernels.hopper.warpgroups import ROWS, load

# Worth measuring: all fit the registers and the shared memory of an H100; on an H200 the first is the fastest.
CANDIDATES = (
    MatmulBlocks(rows=64, columns=256, stages=4),
    MatmulBlocks(stages=4),
    MatmulBlocks(columns=256, stages=3, teams=1),
)
# Tiles of rows, at most, that are gone through together, down the rows first. The tiles that run at one time are then
# about as many rows as columns of tiles, so that what they read has the most uses in the L2 cache: with all columns of
# a few rows, matrices larger than it would be read from memory for every few rows.
_ROW_TILES_TOGETHER = 16


# Compiled apart, so that equal layers of a model are traced and lowered once.
@functools.partial(jax.jit, static_argnames=("blocks", "programs"))
def gated_matmul(
    x_XD: jax.Array,
    w_DG: jax.Array,
    factor_X: jax.Array | None = None,
    *,
    blocks: MatmulBlocks = CANDIDATES[0],
    programs: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns in_XG, the product x @ w, and h_XF = silu(factor * gate) * (factor * up), its halves being gate and up.

    Sums and activations are float32, results have the dtype of `x`; activations are of the rounded product.

    Args:
      x_XD: bfloat16 or float16, the rows.
      w_DG: the gate's matrix and the other one side by side (G = 2 F), in the same dtype.
      factor_X: float32, of each row; it does not go into the product that is returned.
      blocks: how to divide the work, `columns` being those of both halves.
      programs: how many persistent programs; None is one a multiprocessor.

    Raises:
      ValueError: shapes disagree, or are not what the kernel is built for (`why_not`).
    """
    (X, D), G = x_XD.shape, w_DG.shape[1]
    if w_DG.shape[0] != D or G % 2 or (factor_X is not None and factor_X.shape != (X,)):
        raise ValueError(
            f"gated_matmul: expected w ({D}, an even number) and factor ({X},) or None for x {x_XD.shape}, "
            f"got {w_DG.shape} and {None if factor_X is None else factor_X.shape}"
        )
    if (reason := why_not(x_XD, w_DG)) is not None:
        raise ValueError(f"gated_matmul on Hopper {reason}")
    if blocks.columns % (2 * SWIZZLED):
        raise ValueError(f"gated_matmul: columns of blocks must be a multiple of {2 * SWIZZLED}, got {blocks}")
    F, dtype, rows, pairs = G // 2, x_XD.dtype, blocks.rows_of_warpgroup, blocks.columns // (2 * SWIZZLED)
    programs = programs or ring.num_programs()
    tiles = pl.cdiv(X, blocks.rows), pl.cdiv(F, pairs * SWIZZLED)
    num_tiles, steps = math.prod(tiles), pl.cdiv(D, blocks.contracted)

    def body(x, w, *refs):
        factor = None if factor_X is None else refs[0]
        in_out, h_out, x_smem, w_smem, out_smem, full, empty = refs[-7:]

        def tile(index):
            # Always `steps`, which the compiler must not know: it would unroll the loop, and run out of registers.
            num_steps = jnp.where(index < num_tiles, steps, index)
            row, column = tile_place(index, *tiles)
            return num_steps, (row * blocks.rows, column)

        def copy(tile, step, stage, barrier):
            row, column = tile
            contracted = pl.ds(step * blocks.contracted, blocks.contracted)
            columns = pl.ds(column * blocks.columns, blocks.columns)
            plgpu.copy_gmem_to_smem(x.at[pl.ds(row, blocks.rows), contracted], x_smem.at[stage], barrier)
            plgpu.copy_gmem_to_smem(w.at[contracted, columns], w_smem.at[stage], barrier)

        def multiply(acc_ref, tile, step, stage, part):
            plgpu.wgmma(acc_ref, x_smem.at[stage, pl.ds(part * rows, rows)], w_smem.at[stage])

        def prepare(tile, warpgroup, part):
            return load_factors(factor, tile[0] + part * rows, rows)

        def store(tile, acc, warpgroup, part, factors):
            row, column = tile
            for pair in range(pairs):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for i, factor_R in enumerate(factors):
                    here = pl.ds(i * ROWS, ROWS)
                    gate_RC, up_RC = (
                        acc[i * ROWS : (i + 1) * ROWS, c * SWIZZLED : (c + 1) * SWIZZLED].astype(dtype)
                        for c in (2 * pair, 2 * pair + 1)
                    )
                    g_RC, u_RC, s_RC = activation(gate_RC, up_RC, factor_R)
                    out_smem[warpgroup, 0, here] = gate_RC
                    out_smem[warpgroup, 1, here] = up_RC
                    out_smem[warpgroup, 2, here] = (g_RC * s_RC * u_RC).astype(dtype)
                plgpu.commit_smem()
                at = pl.ds(row + part * rows, rows), pl.ds((column * pairs + pair) * SWIZZLED, SWIZZLED)
                plgpu.copy_smem_to_gmem(out_smem.at[warpgroup, 0], in_out.at[at[0], 0, at[1]])
                plgpu.copy_smem_to_gmem(out_smem.at[warpgroup, 1], in_out.at[at[0], 1, at[1]])
                plgpu.copy_smem_to_gmem(out_smem.at[warpgroup, 2], h_out.at[at])

        ring.run(
            *(full, empty),
            blocks=blocks,
            programs=programs,
            num_tiles=num_tiles,
            tile=tile,
            copy=copy,
            multiply=multiply,
            store=store,
            prepare=prepare,
        )

    kernel = ring.kernel(
        "gated_matmul",
        body,
        # The halves are a dimension of their own, so that copies are cut off at the end of each.
        (jax.ShapeDtypeStruct((X, 2, F), dtype), jax.ShapeDtypeStruct((X, F), dtype)),
        [
            ring.swizzled((blocks.stages, blocks.rows, blocks.contracted), dtype),
            ring.swizzled((blocks.stages, blocks.contracted, blocks.columns), dtype),
            ring.swizzled((2, 3, rows, SWIZZLED), dtype),
            *ring.barriers(blocks),
        ],
        programs=programs,
    )
    taking_turns_DG = w_DG.reshape(D, 2, F // SWIZZLED, SWIZZLED).swapaxes(1, 2).reshape(D, G)
    in_X2F, h_XF = kernel(x_XD, taking_turns_DG, *padded(factor_X, tiles[0] * blocks.rows))
    return in_X2F.reshape(X, G), h_XF


def why_not(x_XD: jax.Array, w_DG: jax.Array) -> str | None:
    """Returns why `gated_matmul` cannot take these matrices, or None if it can."""
    return ring.why_not(x_XD, jax.ShapeDtypeStruct((w_DG.shape[0], w_DG.shape[1] // 2), w_DG.dtype))


def tile_place(index: Any, row_tiles: int, column_tiles: int) -> tuple[Any, Any]:
    """Returns which of the tiles of rows, and of columns, is the tile of this index."""
    # A divisor, so that all groups are alike and the numbers below constants.
    together = max(n for n in range(1, _ROW_TILES_TOGETHER + 1) if row_tiles % n == 0)
    group, within = lax.div(index, together * column_tiles), lax.rem(index, together * column_tiles)
    return group * together + lax.rem(within, together), lax.div(within, together)


def padded(factor_X: jax.Array | None, length: int) -> tuple[jax.Array, ...]:
    """Returns the operands that factors are, with ones after the end: threads read those of whole tiles."""
    if factor_X is None:
        return ()
    return (jnp.pad(factor_X.astype(jnp.float32), (0, length - factor_X.shape[0]), constant_values=1.0),)


def load_factors(factor: Any, row: Any, rows: int) -> tuple[jax.Array | None, ...]:
    """Returns the factors of `rows` rows from `row` on in registers, for ROWS at a time; None for each without."""
    pieces = rows // ROWS
    if factor is None:
        return (None,) * pieces
    return tuple(load(factor.at[pl.ds(row + i * ROWS, ROWS)], plgpu.Layout.WGMMA.reduce(1)) for i in range(pieces))


def activation(
    gate_RC: jax.Array, up_RC: jax.Array, factor_R: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns factor * gate, factor * up and the sigmoid of the first, in float32."""
    g_RC, u_RC = gate_RC.astype(jnp.float32), up_RC.astype(jnp.float32)
    if factor_R is not None:
        factor_RC = lax.broadcast_in_dim(factor_R, g_RC.shape, [0])
        g_RC, u_RC = g_RC * factor_RC, u_RC * factor_RC
    # The square of the root is one instruction of the special unit, as the exponential; a division would be many.
    root_RC = lax.rsqrt(1.0 + jnp.exp2(g_RC * -math.log2(math.e)))
    return g_RC, u_RC, root_RC * root_RC
