"""What warpgroups of one block share: named barriers, and shared memory laid out for the tensor cores."""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

ROWS = 64  # of one warpgroup's tile: the height of a wgmma instruction
THREADS = 128  # of a warpgroup

# The hardware has sixteen named barriers. Mosaic GPU takes 0 for the block and one for each warpgroup, four at most.
FIRST_NAMED_BARRIER = 5
NAMED_BARRIERS = 16 - FIRST_NAMED_BARRIER

# Registers of a thread, by the number of consumer warpgroups beside one producer. A block has 65536: with more asked
# for than there are, its consumers wait for them for ever.
PRODUCER_REGISTERS = 24
CONSUMER_REGISTERS = {1: 240, 2: 240, 3: 160}

# plgpu.load takes an index as well before jax 0.11, and warns of one since.
_NO_INDEX = ((),) if jax.__version_info__ < (0, 11) else ()

_SM_COUNT = 132  # of H100 and H200, where no device can be asked


def _named_barrier(operation: str, barrier_id: int | jax.Array, *, num_threads: int) -> None:
    # The names `bar_op`, `operation`, `barrier_id` and `num_threads` are those by which jax's GPU interpreter knows
    # such a function.
    if isinstance(barrier_id, int):

        @plgpu.inline_mgpu()
        def bar_op(_context=None):  # pyright: ignore[reportRedeclaration]
            asm = f"bar.{operation} {barrier_id}, {num_threads};"
            llvm.inline_asm(ir.Type.parse("!llvm.void"), [], asm, "", has_side_effects=True)

        bar_op()
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))
    def bar_op(_context, barrier_id=None):
        asm = f"bar.{operation} $0, {num_threads};"
        registers = [barrier_id.registers[()]]  # pyright: ignore[reportOptionalMemberAccess]
        llvm.inline_asm(ir.Type.parse("!llvm.void"), registers, asm, "r", has_side_effects=True)

    bar_op(barrier_id)


# Arriving does not wait; syncing arrives and waits until `num_threads` threads have done one or the other. Unlike an
# mbarrier, on which each thread arrives by itself, a named barrier costs one instruction a warp.
arrive = functools.partial(_named_barrier, "arrive")
sync = functools.partial(_named_barrier, "sync")


def tiled_smem(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> pl.MemoryRef:
    """Shared memory in the widest swizzle that its last dimension allows, as wgmma and TMA want it."""
    bits = jnp.finfo(dtype).bits
    swizzle = plgpu.find_swizzle(shape[-1] * bits)
    transforms = (plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def transposed(ref):
    """The last two dimensions of a reference to shared memory, exchanged."""
    return ref.transpose((*range(ref.ndim - 2), ref.ndim - 1, ref.ndim - 2))


def load(ref, layout) -> jax.Array:
    """A vector or matrix in shared or global memory, as registers."""
    return plgpu.load(ref, *_NO_INDEX, layout=layout, optimized=False)


def sm_count() -> int:
    """Streaming multiprocessors of the GPU that programs are compiled for, as far as it is known."""
    if jax.default_backend() == "gpu":
        return jax.devices()[0].core_count
    return _SM_COUNT


def rem(a: jax.Array, b: int) -> jax.Array:
    """The remainder of non-negative int32 `a`, by powers of two without a division."""
    return a & (b - 1) if b & (b - 1) == 0 else lax.rem(a, jnp.int32(b))


def div(a: jax.Array, b: int) -> jax.Array:
    """The quotient of non-negative int32 `a`, rounded down."""
    return a >> (b.bit_length() - 1) if b & (b - 1) == 0 else lax.div(a, jnp.int32(b))


_L2_BYTES = 32 << 20  # that blocks share at one time, of the 50 MB of second-level cache


def slices_together(num_slices: int, *, bytes_each: int, cache_bytes: int = _L2_BYTES) -> int:
    """How many slices (heads of batch rows) to go through at one time, so that the L2 cache holds what blocks share.

    A slice has `bytes_each` of that, and all together may have `cache_bytes`.

    Among these the longest tiles come first, and all tiles before the next slices: the last blocks to end are short.
    """
    limit = max(1, cache_bytes // bytes_each)
    return max(n for n in range(1, num_slices + 1) if num_slices % n == 0 and n <= limit)
