"""What the forward and the backward attention kernel have in common: the shapes, the scores, the blocks."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from slmjax.kernels.tpu.attention_schedule import Schedule, k_tile_of, q_tile_of
from slmjax.kernels.tpu.attention_tiling import Tiling

LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """All about one call that is known before the program runs.

    Attributes:
      scale: factor of the scores.
      softcap: c in c * tanh(scores / c), or None.
      tiling: how the work is cut.
      interpret: what `pl.pallas_call` takes.
    """

    scale: float
    softcap: float | None
    tiling: Tiling
    interpret: Any


def dot(a, b, a_dim: int, b_dim: int):
    """Returns the product of two matrices, summed over these dimensions of theirs, in float32.

    Float32 operands are multiplied as such, which the hardware does in several passes.
    """
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((a_dim,), (b_dim,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def scores_base_2(problem: Problem, k_HS, q_HM):
    """Returns (scores_SM, tanh_SM): the capped scores times log2(e), so that exp2 makes weights of them.

    tanh_SM, which the cap's derivative needs, is None without one.
    """
    scores_SM = dot(k_HS, q_HM, 0, 0)
    if problem.softcap is None:
        return scores_SM * (problem.scale * LOG2_E), None
    tanh_SM = jnp.tanh(scores_SM * (problem.scale / problem.softcap))
    return tanh_SM * (problem.softcap * LOG2_E), tanh_SM


def hide(scores_SM, ranges_2T, first_key, heads: int):
    """Returns the scores with -inf where a query does not see a key, `first_key` being the first of the tile."""
    k_start_1M, k_end_1M = (jnp.concatenate([ranges_2T[i : i + 1]] * heads, axis=1) for i in range(2))
    key_SM = first_key + jax.lax.broadcasted_iota(jnp.int32, scores_SM.shape, 0)
    return jnp.where((k_start_1M <= key_SM) & (key_SM < k_end_1M), scores_SM, -jnp.inf)


def join_heads(ref_GHT):
    """Returns the heads of a block side by side along the last dimension, each a whole number of registers wide."""
    return jnp.concatenate([ref_GHT[head] for head in range(ref_GHT.shape[0])], axis=-1)


def join_rows(ref_GT):
    """The same for a block that has one row for each head."""
    return jnp.concatenate([ref_GT[head : head + 1] for head in range(ref_GT.shape[0])], axis=-1)


def current_step(row_stride: int, steps_ref):
    """Returns the step of the schedule that the kernel is at."""
    return steps_ref[pl.program_id(0) * row_stride + pl.program_id(3)]


def block_specs(schedule: Schedule, *, heads: int, groups: int, head_dim: int, q_tile: int, k_tile: int):
    """Returns the block specs (ranges, of queries, a row for each query, of keys).

    The grid is (row of the batch, key/value head, group of `heads` of its query heads, step of the schedule), and the
    arrays are [X, 2, T], [B, N, H, T], [B, N / heads, heads, T] and [B, K, H, S].
    """

    def at(tile_of, position):
        def index_map(b, kv_head, group, s, steps_ref, *_):
            step = steps_ref[b * schedule.row_stride + s]
            return position(b, kv_head, kv_head * groups + group, tile_of(step))

        return index_map

    one_range = schedule.ranges_X2T.shape[0] == 1
    ranges = pl.BlockSpec((None, 2, q_tile), at(q_tile_of, lambda b, _, __, i: (0 if one_range else b, 0, i)))
    queries = pl.BlockSpec((None, heads, head_dim, q_tile), at(q_tile_of, lambda b, _, n, i: (b, n, 0, i)))
    rows = pl.BlockSpec((None, None, heads, q_tile), at(q_tile_of, lambda b, _, n, i: (b, n, 0, i)))
    keys = pl.BlockSpec((None, None, head_dim, k_tile), at(k_tile_of, lambda b, k, _, j: (b, k, 0, j)))
    return ranges, queries, rows, keys


def like(array: jax.Array, shape, dtype) -> jax.ShapeDtypeStruct:
    """Returns the shape of a kernel's result, which varies over the mesh axes of a shard_map as `array` does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(array).manual_axis_type)


def compiler_params(blocks, scratch, *, lanes: int, k_tile: int, dimension_semantics) -> pltpu.CompilerParams:
    """Returns parameters that grant the kernel the on-chip memory that it needs, and leave XLA the rest.

    Args:
      blocks: shape and dtype of each block, which are all double-buffered.
      scratch: the kernel's scratch memory.
      lanes: queries of all heads of a tile together.
      k_tile: keys of a tile.
      dimension_semantics: as Pallas takes them.
    """
    size = sum(2 * math.prod(x for x in shape if x) * jnp.dtype(dtype).itemsize for shape, dtype in blocks)
    size += sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in scratch)
    # The compiler keeps one to two tiles of float32 scores beside that, more where it makes products of float32 from
    # several of bfloat16. What is granted but not used is lost to XLA.
    tiles = 10 if jnp.dtype(blocks[0][1]).itemsize == 4 else 4
    return pltpu.CompilerParams(
        dimension_semantics=dimension_semantics, vmem_limit_bytes=size + tiles * 4 * lanes * k_tile + 4 * 2**20
    )
