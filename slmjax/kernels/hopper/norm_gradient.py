"""The gradient of an RMS norm that is folded into a projection, and that of the residual, in Pallas Mosaic GPU.

Three arrays are read once and one is written, and nothing else happens: time is that of memory. Each warp has whole
rows in its registers, so that a row's sum needs only shuffles, no shared memory, and no warp waits for another. Its
loads come before all else (of wide rows the assembler puts off those of the residual's gradient), and there are more of
them under way in all warps than memory's latency needs.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from slmjax.kernels.hopper.warpgroups import div, load, sm_count

_WARPS = 4  # of a warpgroup
_LANES = 32
_VECTORS = (8, 4, 2)  # 16-bit numbers that a lane loads at once
_LEAST = _LANES * _VECTORS[-1]
_MOST = 3072  # a row of x and one of dx, widened, and one of dresidual are what a warp's registers hold


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormBlocks:
    """How rows are divided.

    Attributes:
      rows: that a warp has at one time.
      warpgroups: of a block.
      resident: blocks of a multiprocessor that go through all rows; None is one block for each few rows.
    """

    rows: int = 1
    warpgroups: int = 1
    resident: int | None = None

    def __post_init__(self):
        if self.rows < 1 or self.warpgroups < 1 or (self.resident is not None and self.resident < 1):
            raise ValueError(f"NormBlocks: expected positive numbers, got {self}")


# Worth measuring.
CANDIDATES = (
    NormBlocks(),
    NormBlocks(warpgroups=2),
    NormBlocks(rows=2),
    NormBlocks(resident=8),
    NormBlocks(warpgroups=2, resident=4),
)


def why_not(x_XD: jax.Array) -> str | None:
    """Returns why the kernel cannot take such rows, or None if it can."""
    if x_XD.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, got {x_XD.dtype}"
    if x_XD.shape[1] % _LEAST or not 0 < x_XD.shape[1] <= _MOST:
        return f"needs a width that is a multiple of {_LEAST}, at most {_MOST}, got {x_XD.shape[1]}"
    return None


# Compiled apart, so that equal layers of a model are traced and lowered once.
@functools.partial(jax.jit, static_argnames=("blocks",))
def norm_gradient(
    dx_XD: jax.Array,
    x_XD: jax.Array,
    factor_X: jax.Array,
    dresidual_XD: jax.Array,
    *,
    blocks: NormBlocks = NormBlocks(),
) -> jax.Array:
    """Returns dx - x * mean(dx * x) * factor^2 + dresidual, computed in float32 and rounded once.

    Args:
      dx_XD: bfloat16 or float16, the gradient of x as it was multiplied, without its token's factor.
      x_XD: what is normalised, in the same dtype.
      factor_X: float32, 1 / rms(x).
      dresidual_XD: the gradient of x from elsewhere, in the same dtype.
      blocks: how to divide the work.

    Raises:
      ValueError: shapes or dtypes disagree, or are not what the kernel is built for (`why_not`).
    """
    X, D = x_XD.shape
    arrays = dx_XD, x_XD, dresidual_XD
    if any(each.shape != (X, D) or each.dtype != x_XD.dtype for each in arrays) or factor_X.shape != (X,):
        raise ValueError(
            f"norm_gradient: expected three arrays {(X, D)} of {x_XD.dtype} and factor ({X},), got "
            f"{', '.join(f'{each.shape} of {each.dtype}' for each in arrays)} and {factor_X.shape}"
        )
    if (reason := why_not(x_XD)) is not None:
        raise ValueError(f"norm_gradient on Hopper {reason}")
    tile_rows = blocks.rows * _WARPS
    num_rows = max(X, tile_rows)
    if num_rows > X:
        arrays = [jnp.pad(each, ((0, num_rows - X), (0, 0))) for each in arrays]
        factor_X = jnp.pad(factor_X, (0, num_rows - X))
    tiles = pl.cdiv(num_rows, tile_rows)
    programs = pl.cdiv(tiles, blocks.warpgroups)
    if blocks.resident is not None:
        programs = min(programs, blocks.resident * sm_count())
    pieces = _pieces(D)

    def body(dx, x, factor, dresidual, out):
        first = lax.axis_index("block") * blocks.warpgroups + lax.axis_index("wg")

        def of_four(row):
            """Gives all that the four warps read of as many rows, one each."""
            rows = pl.ds(row, _WARPS)
            factor_R = load(factor.at[rows], _ONE_A_WARP)
            return factor_R, *(
                [load(each.at[rows, pl.ds(column, columns)], _layout(columns)) for column, columns in pieces]
                for each in (x, dx, dresidual)
            )

        def one_tile(tile):
            # The last tile begins earlier instead of ending later, and repeats what another has done.
            row = jnp.minimum(tile * tile_rows, num_rows - tile_rows)
            loaded = [of_four(row + i * _WARPS) for i in range(blocks.rows)]
            for i, (factor_R, xs, dxs, dresiduals) in enumerate(loaded):
                along_R = _dot(xs, dxs) * factor_R * factor_R * (1 / D)
                for (column, columns), *each in zip(pieces, xs, dxs, dresiduals, strict=True):
                    x_RP, dx_RP, dresidual_RP = (piece.astype(jnp.float32) for piece in each)
                    along_RP = lax.broadcast_in_dim(along_R, x_RP.shape, [0])
                    along_RP = plgpu.layout_cast(along_RP, _layout(columns))
                    total_RP = dx_RP - x_RP * along_RP + dresidual_RP
                    out[pl.ds(row + i * _WARPS, _WARPS), pl.ds(column, columns)] = total_RP.astype(out.dtype)

        if blocks.resident is None:
            pl.when(first < tiles)(lambda: one_tile(first))
            return
        step = programs * blocks.warpgroups
        lax.fori_loop(0, div(tiles - 1 - first + step, step), lambda i, _: one_tile(first + i * step), None)

    kernel: Callable[..., Any] = pl.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((num_rows, D), x_XD.dtype),
        mesh=plgpu.Mesh(grid=(programs,), grid_names=("block",), num_threads=blocks.warpgroups, thread_name="wg"),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,  # no reduction is over warps
        ),
        name="hopper_norm_gradient",
    )
    dx_XD, x_XD, dresidual_XD = arrays
    return kernel(dx_XD, x_XD, factor_X.astype(jnp.float32), dresidual_XD)[:X]


def _pieces(width: int) -> list[tuple[int, int]]:
    """Start and width of a row's pieces, one vector a lane: as wide as there are, and narrower ones for the rest."""
    pieces, column = [], 0
    for vector in _VECTORS:
        while width - column >= _LANES * vector:
            pieces.append((column, _LANES * vector))
            column += _LANES * vector
    return pieces


def _layout(columns: int):
    """Four rows, one a warp, of one vector a lane."""
    vector = columns // _LANES
    tiling = plgpu.Tiling(((_WARPS, columns), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


# One number a row, which all lanes of its warp have.
_ONE_A_WARP = plgpu.Layout.TILED(
    plgpu.Tiling(((_WARPS,), (1,))), warp_dims=(-2,), lane_dims=(plgpu.Replicated(_LANES),), vector_dim=-1
)


def _dot(xs: list[jax.Array], ys: list[jax.Array]) -> jax.Array:
    """Sums of products over rows that are cut into pieces, float32."""
    sums: dict[int, jax.Array] = {}
    for x_RP, y_RP in zip(xs, ys, strict=True):
        columns = x_RP.shape[1]
        product_RP = x_RP.astype(jnp.float32) * y_RP.astype(jnp.float32)
        sums[columns] = sums[columns] + product_RP if columns in sums else product_RP
    return functools.reduce(jnp.add, [jnp.sum(each_RP, axis=1) for each_RP in sums.values()])
