"""The pipeline of matrix products on Hopper: one warpgroup copies to a ring in shared memory, two multiply.

Programs are persistent: program p takes the tiles p, p + programs, ... of the result. With two teams, each multiplying
warpgroup has every other of these tiles, so that one stores while the other computes (the ping-pong schedule of
CUTLASS); with one team both share a larger tile, each with half of its rows.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Columns of 16-bit numbers that the 128-byte swizzle covers, and the rows after which its pattern repeats.
SWIZZLED = 64
LEAST = 128  # rows, and widths
ALIGNED_ROWS = 8

_COPYING = 2  # the warpgroup that copies; 0 and 1 multiply
# Of 65,536 registers for 384 threads, in steps of 8.
_REGISTERS_COPYING, _REGISTERS_MULTIPLYING = 40, 232


@dataclasses.dataclass(frozen=True)
class MatmulBlocks:
    """How a product is divided.

    Attributes:
      rows: of a tile of the result.
      columns: of a tile of the result.
      contracted: how much of the contracted dimension a step of the ring holds.
      stages: steps that the ring holds.
      teams: 2, a tile for each multiplying warpgroup; or 1, a tile for both.
    """

    rows: int = 128
    columns: int = 128
    contracted: int = 64
    stages: int = 5
    teams: int = 2

    def __post_init__(self):
        if self.teams not in (1, 2):
            raise ValueError(f"MatmulBlocks.teams must be 1 or 2, got {self.teams}")
        if self.rows * self.teams % 128 or self.columns % SWIZZLED or self.contracted % SWIZZLED:
            raise ValueError(
                "MatmulBlocks: rows must be a multiple of 64 for each warpgroup that shares them, columns and "
                f"contracted multiples of {SWIZZLED}, got {self}"
            )

    @property
    def rows_of_warpgroup(self) -> int:
        """Rows of a tile that one warpgroup multiplies."""
        return self.rows * self.teams // 2


# Worth measuring: all fit the registers and the shared memory of an H100.
CANDIDATES = (
    MatmulBlocks(),
    MatmulBlocks(stages=4),
    MatmulBlocks(contracted=128, stages=2),
    MatmulBlocks(rows=64, columns=256, stages=4),
    MatmulBlocks(columns=256, stages=3, teams=1),
    MatmulBlocks(rows=256, stages=3, teams=1),
)


def why_not(a: jax.Array | jax.ShapeDtypeStruct, b: jax.Array | jax.ShapeDtypeStruct) -> str | None:
    """Returns why the kernels built on this cannot multiply these matrices, or None if they can."""
    if a.dtype != b.dtype or a.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, the same for both, got {a.dtype} and {b.dtype}"
    if any(width % SWIZZLED for width in (a.shape[-1], *b.shape[1:])):
        return f"needs widths that are multiples of {SWIZZLED}, got {a.shape} and {b.shape}"
    # A tile larger than the whole matrix came back wrong on an H200, though right in the simulator.
    if min(a.shape[0], a.shape[-1], *b.shape[1:]) < LEAST:
        return f"needs at least {LEAST} rows and widths of at least {LEAST}, got {a.shape} and {b.shape}"
    if a.shape[0] % ALIGNED_ROWS:
        return f"needs a number of rows that is a multiple of {ALIGNED_ROWS}, got {a.shape[0]}"
    return None


def num_programs() -> int:
    """Returns how many persistent programs fill the device: one for each multiprocessor."""
    return getattr(jax.devices()[0], "core_count", 132)  # an H100's, when compiling without one


def cumulative_sum(x_E: jax.Array) -> jax.Array:
    """Returns int32 cumulative sums of a few numbers: as comparisons, one program where jnp.cumsum is several."""
    E = x_E.shape[0]
    up_to_EE = np.tri(E, dtype=bool)
    return jnp.sum(jnp.where(up_to_EE, x_E[None], 0), axis=1, dtype=jnp.int32)


def swizzled(shape: tuple[int, ...], dtype: Any, *, tile_rows: int = ALIGNED_ROWS) -> Any:
    """Returns the type of shared memory in the form that copies write and products read."""
    transforms = (plgpu.TilingTransform((tile_rows, SWIZZLED)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def barriers(blocks: MatmulBlocks) -> tuple[Any, Any]:
    """Returns the types of the ring's barriers.

    A stage is full when two copies have arrived, and there is a barrier for each team, since a barrier must be awaited
    by the same threads each time; it is empty when all of the team have read it.
    """
    full = plgpu.Barrier(num_arrivals=2, num_barriers=blocks.teams * blocks.stages)
    return full, plgpu.Barrier(num_arrivals=2 // blocks.teams, num_barriers=blocks.stages)


def kernel(
    name: str, body: Callable[..., None], out_type: Any, scratch_types: Any, *, programs: int
) -> Callable[..., Any]:
    """Returns the kernel whose body calls `run`; profiles show its name. Exponentials and roots are approximate."""
    return plgpu.kernel(
        body,
        kernel_name=name,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=(programs,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )


def run(
    full: Any,
    empty: Any,
    *,
    blocks: MatmulBlocks,
    programs: int,
    num_tiles: Any,
    tile: Callable[[Any], tuple[Any, Any]],
    copy: Callable[[Any, Any, Any, Any], None],
    multiply: Callable[[Any, Any, Any, Any, Any], None],
    store: Callable[..., None],
    prepare: Callable[[Any, Any, Any], Any] | None = None,
) -> None:
    """Computes this program's tiles, in the body of a kernel.

    Args:
      full: scratch of the type of `barriers`.
      empty: likewise.
      blocks: how the product is divided.
      programs: how many programs there are.
      num_tiles: how many tiles the result has.
      tile: index -> (number of steps, whatever describes the tile to the other functions).
      copy: (tile, step, stage, barrier): starts the two copies of a step to a stage of the ring.
      multiply: (accumulator, tile, step, stage, part): starts one product; `part` is 0 or 1 where a team of two shares
        a tile and says which half of its rows is meant, else 0.
      store: (tile, float32 result, warpgroup, part): starts to store; it first waits for what it started before.
      prepare: (tile, warpgroup, part): called before a tile's products, to start reading what its store needs beside
        them; the store gets what it returns as a fifth argument.
    """
    stages, teams = blocks.stages, blocks.teams
    warpgroup, program = lax.axis_index("warpgroup"), lax.axis_index("program")

    def over_tiles(visit):
        """Calls visit(team, tile, number of steps, first step); steps are counted over all tiles of the program."""

        def body(i, first_step):
            num_steps, described = tile(program + i * programs)
            visit(lax.rem(i, teams), described, num_steps, first_step)
            return first_step + num_steps

        return lax.fori_loop(0, lax.div(num_tiles - program + programs - 1, programs), body, jnp.int32(0))

    @pl.when(warpgroup == _COPYING)
    def _():
        plgpu.set_max_registers(_REGISTERS_COPYING, action="decrease")

        def visit(team, described, num_steps, first_step):
            def one(k, _):
                stage = lax.rem(first_step + k, stages)

                @pl.when(first_step + k >= stages)
                def _():
                    plgpu.barrier_wait(empty.at[stage])

                copy(described, k, stage, full.at[team * stages + stage])

            lax.fori_loop(0, num_steps, one, None)

        end = over_tiles(visit)

        # A kernel must not end with a completion of a barrier that nobody awaited.
        def drain(step, _):
            plgpu.barrier_wait(empty.at[lax.rem(step, stages)])

        lax.fori_loop(jnp.maximum(end - stages, 0), end, drain, None)

    @pl.when(warpgroup != _COPYING)
    def _():
        plgpu.set_max_registers(_REGISTERS_MULTIPLYING, action="increase")
        my_team, part = (warpgroup, 0) if teams == 2 else (0, warpgroup)

        def result(described, num_steps, first_step):
            def accumulate(acc_ref):
                def one(k, _):
                    stage = lax.rem(first_step + k, stages)
                    plgpu.barrier_wait(full.at[my_team * stages + stage])
                    multiply(acc_ref, described, k, stage, part)
                    plgpu.wgmma_wait(1)  # for the step before this

                    @pl.when(k > 0)
                    def _():
                        plgpu.barrier_arrive(empty.at[lax.rem(first_step + k - 1, stages)])

                lax.fori_loop(0, num_steps, one, None)
                plgpu.wgmma_wait(0)

                @pl.when(num_steps > 0)
                def _():
                    plgpu.barrier_arrive(empty.at[lax.rem(first_step + num_steps - 1, stages)])

                return acc_ref[...]

            return pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef((blocks.rows_of_warpgroup, blocks.columns)))

        def visit(team, described, num_steps, first_step):
            @pl.when(team == my_team)
            def _():
                prepared = () if prepare is None else (prepare(described, warpgroup, part),)
                store(described, result(described, num_steps, first_step), warpgroup, part, *prepared)

        over_tiles(visit)
        plgpu.wait_smem_to_gmem(0)
