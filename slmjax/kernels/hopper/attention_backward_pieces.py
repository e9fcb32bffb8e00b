"""What the two kernels of the split backward share: tilings, lists of work, fences, softmax weights."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jaxlib.mlir.dialects import nvvm

from slmjax.kernels.hopper.warpgroups import rem, sync
from slmjax.kernels.tiles import IntArray

LOG2E = math.log2(math.e)
LOWEST = -1e18  # its exponential is zero, and its square a number: zero times that is zero

# Layouts of a tile in registers, and of one value for each of its rows or columns.
TILE = plgpu.Layout.WGMMA
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)

WORK_FIELDS = 32  # of a tile in the list of work: 128 bytes, the least that TMA copies

CACHE_BYTES = 24 << 20  # of what blocks stream at one time, of the 50 MB of second-level cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassTiling:
    """How one of the two kernels cuts its work.

    Attributes:
      tile: rows of a tile that streams through shared memory: keys for dq, queries for dk and dv.
      stages: such tiles in shared memory.
      warpgroups: consumers of a block, each with 64 rows of its own.
      resident: whether those rows are multiplied from registers instead of from shared memory.
      lookahead: whether the last product of a tile is issued with the first ones of the next, instead of awaited.
    """

    tile: int
    stages: int
    warpgroups: int = 2
    resident: bool = False
    lookahead: bool = False

    def __post_init__(self):
        if self.tile not in (64, 128) or self.warpgroups not in (1, 2) or self.stages < 1 + self.lookahead:
            raise ValueError(
                "PassTiling: expected a tile of 64 or 128, one or two warpgroups, and a stage, two with lookahead, "
                f"got {self}"
            )


def fence_reads() -> None:
    """Orders what this thread has read from shared memory before copies that will overwrite it."""

    # By this name jax's GPU interpreter knows the function.
    @plgpu.inline_mgpu()
    def fence_async_shared_cta(_context=None):
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

    fence_async_shared_cta()


def meet_arrivals(free: int, total: jax.Array, *, stages: int, num_threads: int) -> None:
    """Meets the arrivals at the barriers of the last tiles of a ring, for which no copy has waited."""
    for behind in range(stages):
        slot = rem(total - 1 - behind + stages, stages)
        pl.when(total > behind)(functools.partial(sync, free + slot, num_threads=num_threads))


def softmax_weights(
    s_RC: jax.Array, lse_RC: jax.Array, hide: Callable[[jax.Array], jax.Array], *, scale: float, softcap: float | None
) -> tuple[jax.Array, jax.Array]:
    """Returns the weights of the softmax, and what multiplies their gradients: the same but for the softcap's slope.

    `lse_RC` is a logarithm to base 2; `hide` puts LOWEST where a query does not see a key.
    """
    if softcap is None:
        p_RC = jnp.exp2(hide(s_RC) * (scale * LOG2E) - lse_RC)
        return p_RC, p_RC
    t_RC = hide(jnp.tanh(s_RC * (scale / softcap)))
    p_RC = jnp.exp2(t_RC * (softcap * LOG2E) - lse_RC)
    return p_RC, p_RC * (1.0 - t_RC * t_RC)


def hidden(x_RC: jax.Array, index_RC: jax.Array, start_RC: jax.Array, length_RC: jax.Array) -> jax.Array:
    """`x_RC` where start <= index < start + length, else LOWEST; in one comparison instead of two."""
    seen_RC = (index_RC - start_RC).astype(jnp.uint32) < length_RC.astype(jnp.uint32)
    return jnp.where(seen_RC, x_RC, LOWEST)


def work_list(outer: tuple[IntArray, IntArray], inner: tuple[IntArray, IntArray], *, warpgroups: int) -> jax.Array:
    """Returns int32 (X, I, WORK_FIELDS): the tiles of a row of the batch, those with the most work first.

    `outer` are the first and last tile of the other side that the 64 rows of a warpgroup need at all, `inner` those
    that need no mask. The rows of `warpgroups` warpgroups are a tile. Its fields: its index; the first tile of the
    other side that it needs, and their number; for each warpgroup the outer and inner first and last, counted from
    there.
    """
    xp: Any = np if isinstance(outer[0], np.ndarray) else jnp
    bounds = (bound.reshape(bound.shape[0], -1, warpgroups) for bound in (*outer, *inner))
    first_XIW, last_XIW, inner_first_XIW, inner_last_XIW = bounds
    some_XIW = first_XIW < last_XIW
    start_XI1 = xp.where(some_XIW, first_XIW, np.iinfo(np.int32).max).min(-1, keepdims=True)
    start_XI1 = xp.where(some_XIW.any(-1, keepdims=True), start_XI1, 0)
    count_XI1 = last_XIW.max(-1, keepdims=True) - start_XI1
    index_XI1 = xp.broadcast_to(xp.arange(first_XIW.shape[1])[None, :, None], count_XI1.shape)
    relative_XIW4 = xp.stack([first_XIW, last_XIW, inner_first_XIW, inner_last_XIW], axis=-1) - start_XI1[..., None]
    relative_XIC = xp.where(some_XIW[..., None], relative_XIW4, 0).reshape(*first_XIW.shape[:2], 4 * warpgroups)
    list_XIC = xp.concatenate([index_XI1, start_XI1, count_XI1, relative_XIC], axis=-1)
    list_XIC = xp.take_along_axis(list_XIC, xp.argsort(-count_XI1, axis=1, stable=True), axis=1)
    padding = [(0, 0), (0, 0), (0, WORK_FIELDS - list_XIC.shape[-1])]
    return jnp.asarray(xp.pad(list_XIC, padding), jnp.int32)
