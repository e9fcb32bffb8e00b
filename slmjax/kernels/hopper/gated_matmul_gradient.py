"""The gradient of a gated feed-forward's activations on Hopper, in the product that brings it, in Pallas Mosaic GPU.

What the activations were computed from is copied to shared memory while the tensor cores multiply, and its gradient
takes its place there, from where it is stored.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from slmjax.kernels.hopper import ring
from slmjax.kernels.hopper.gated_matmul import activation, load_factors, padded, tile_place
from slmjax.kernels.hopper.ring import SWIZZLED, MatmulBlocks
from slmjax.kernels.hopper.warpgroups import ROWS

# Worth measuring: all fit the registers and the shared memory of an H100; those of the second also with hidden numbers.
# On an H200 the first of each is the fastest: a deep ring counts most.
CANDIDATES = (
    MatmulBlocks(rows=64, stages=6),
    MatmulBlocks(columns=64, stages=6),
    MatmulBlocks(stages=3),
    MatmulBlocks(stages=5, teams=1),
)
CANDIDATES_WITH_HIDDEN = (
    MatmulBlocks(rows=64, stages=5),
    MatmulBlocks(stages=4, teams=1),
    MatmulBlocks(columns=64, stages=5),
)


# Compiled apart, so that equal layers of a model are traced and lowered once.
@functools.partial(jax.jit, static_argnames=("with_hidden", "blocks", "programs"))
def gated_matmul_gradient(
    dy_XD: jax.Array,
    w_FD: jax.Array,
    in_XG: jax.Array,
    factor_X: jax.Array | None = None,
    *,
    with_hidden: bool = False,
    blocks: MatmulBlocks | None = None,
    programs: int | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Returns din_XG, the gradient of `gated_matmul`'s product, where dy is that of h @ w.

    The gradient of the hidden numbers stays in float32 until it is multiplied with the activation's.

    Args:
      dy_XD: bfloat16 or float16, the gradient of the rows of the result.
      w_FD: the matrix that hidden numbers are multiplied with, in the same dtype.
      in_XG: what `gated_matmul` returned: gate and up side by side (G = 2 F), in the same dtype.
      factor_X: float32, of each row, as `gated_matmul` had it; its own gradient is not computed.
      with_hidden: also return h_XF, computed anew.
      blocks: how to divide the work; None is what suits.
      programs: how many persistent programs; None is one a multiprocessor.

    Raises:
      ValueError: shapes disagree, or are not what the kernel is built for (`why_not`).
    """
    (X, D), F = dy_XD.shape, w_FD.shape[0]
    wrong_factor = factor_X is not None and factor_X.shape != (X,)
    if w_FD.shape != (F, D) or in_XG.shape != (X, 2 * F) or in_XG.dtype != dy_XD.dtype or wrong_factor:
        raise ValueError(
            f"gated_matmul_gradient: expected w (F, {D}), in ({X}, 2 F) of {dy_XD.dtype} and factor ({X},) or None for "
            f"dy {dy_XD.shape}, got {w_FD.shape}, {in_XG.shape} of {in_XG.dtype} and "
            f"{None if factor_X is None else factor_X.shape}"
        )
    if (reason := why_not(dy_XD, w_FD)) is not None:
        raise ValueError(f"gated_matmul_gradient on Hopper {reason}")
    blocks = blocks or (CANDIDATES_WITH_HIDDEN if with_hidden else CANDIDATES)[0]
    dtype, rows, chunks = dy_XD.dtype, blocks.rows_of_warpgroup, blocks.columns // SWIZZLED
    programs = programs or ring.num_programs()
    tiles = pl.cdiv(X, blocks.rows), pl.cdiv(F, blocks.columns)
    num_tiles, steps = math.prod(tiles), pl.cdiv(D, blocks.contracted)

    def body(dy, w, in_, *refs):
        factor = None if factor_X is None else refs[0]
        h_out, h_smem = (refs[-8], refs[-1]) if with_hidden else (None, None)
        dy_smem, w_smem, in_smem, full, empty, loaded = refs[-7:-1] if with_hidden else refs[-6:]
        din = refs[-9] if with_hidden else refs[-7]

        def tile(index):
            # Always `steps`, which the compiler must not know: it would unroll the loop, and run out of registers.
            num_steps = jnp.where(index < num_tiles, steps, index)
            row, column = tile_place(index, *tiles)
            return num_steps, (row * blocks.rows, column * blocks.columns)

        def copy(tile, step, stage, barrier):
            row, column = tile
            contracted = pl.ds(step * blocks.contracted, blocks.contracted)
            plgpu.copy_gmem_to_smem(dy.at[pl.ds(row, blocks.rows), contracted], dy_smem.at[stage], barrier)
            plgpu.copy_gmem_to_smem(w.at[pl.ds(column, blocks.columns), contracted], w_smem.at[stage], barrier)

        def multiply(acc_ref, tile, step, stage, part):
            plgpu.wgmma(acc_ref, dy_smem.at[stage, pl.ds(part * rows, rows)], w_smem.at[stage].transpose((1, 0)))

        def place(tile, part, chunk):
            row, column = tile
            return pl.ds(row + part * rows, rows), pl.ds(column + chunk * SWIZZLED, SWIZZLED)

        def prepare(tile, warpgroup, part):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for chunk in range(chunks):
                here, columns = place(tile, part, chunk)
                for half in range(2):
                    in_tile, barrier = in_.at[here, half, columns], loaded.at[warpgroup]
                    plgpu.copy_gmem_to_smem(in_tile, in_smem.at[warpgroup, chunk, half], barrier)
            return load_factors(factor, tile[0] + part * rows, rows)

        def store(tile, acc, warpgroup, part, factors):
            plgpu.barrier_wait(loaded.at[warpgroup])
            for chunk in range(chunks):
                for i, factor_R in enumerate(factors):
                    dh_RC = acc[i * ROWS : (i + 1) * ROWS, chunk * SWIZZLED : (chunk + 1) * SWIZZLED]
                    here = pl.ds(i * ROWS, ROWS)
                    gate_RC, up_RC = (in_smem[warpgroup, chunk, half, here] for half in range(2))
                    g_RC, u_RC, s_RC = activation(gate_RC, up_RC, factor_R)
                    silu_RC = g_RC * s_RC
                    if factor_R is not None:
                        dh_RC = dh_RC * lax.broadcast_in_dim(factor_R, dh_RC.shape, [0])
                    slope_RC = s_RC + silu_RC * (1.0 - s_RC)
                    in_smem[warpgroup, chunk, 0, here] = (dh_RC * u_RC * slope_RC).astype(dtype)
                    in_smem[warpgroup, chunk, 1, here] = (dh_RC * silu_RC).astype(dtype)
                    if h_smem is not None:
                        h_smem[warpgroup, chunk, here] = (silu_RC * u_RC).astype(dtype)
                plgpu.commit_smem()
                here, columns = place(tile, part, chunk)
                for half in range(2):
                    plgpu.copy_smem_to_gmem(in_smem.at[warpgroup, chunk, half], din.at[here, half, columns])
                if h_smem is not None and h_out is not None:
                    plgpu.copy_smem_to_gmem(h_smem.at[warpgroup, chunk], h_out.at[here, columns])

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

    out_types = [jax.ShapeDtypeStruct((X, 2, F), dtype)] + [jax.ShapeDtypeStruct((X, F), dtype)] * with_hidden
    kernel = ring.kernel(
        "gated_matmul_gradient",
        body,
        out_types,
        [
            ring.swizzled((blocks.stages, blocks.rows, blocks.contracted), dtype),
            ring.swizzled((blocks.stages, blocks.columns, blocks.contracted), dtype),
            ring.swizzled((2, chunks, 2, rows, SWIZZLED), dtype),
            *ring.barriers(blocks),
            plgpu.Barrier(num_arrivals=2 * chunks, num_barriers=2),
            *([ring.swizzled((2, chunks, rows, SWIZZLED), dtype)] if with_hidden else []),
        ],
        programs=programs,
    )
    # The halves are a dimension of their own, so that copies are cut off at the end of each.
    din_X2F, *h_XF = kernel(dy_XD, w_FD, in_XG.reshape(X, 2, F), *padded(factor_X, tiles[0] * blocks.rows))
    din_XG = din_X2F.reshape(X, 2 * F)
    return (din_XG, h_XF[0]) if with_hidden else din_XG


def why_not(dy_XD: jax.Array, w_FD: jax.Array) -> str | None:
    """Returns why `gated_matmul_gradient` cannot take these matrices, or None if it can."""
    return ring.why_not(dy_XD, jax.ShapeDtypeStruct(w_FD.shape[::-1], w_FD.dtype))
