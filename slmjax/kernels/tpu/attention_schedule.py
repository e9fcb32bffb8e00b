"""The list of tiles that an attention kernel visits: only those in which some query sees some key.

A kernel's grid runs over the list rather than over all pairs of tiles, so that what is skipped costs neither compute
nor copies nor grid steps. The list lies in scalar memory, where index maps read it; its length may depend on the data.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.kernels.tiles import tile_bounds

# A step is one int32: tile of queries << 17 | tile of keys << 4 | what to do there.
BEGIN = 1  # the first step of this tile of queries
END = 2  # its last
WORK = 4  # some query sees some key
EDGE = 8  # some query does not see some key
_K_SHIFT, _Q_SHIFT, _MAX_TILES = 4, 17, 1 << 13
# A core has 1 MiB of scalar memory; some is left for the rest.
_MAX_STEPS = (1 << 18) - (1 << 12)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """The steps of each row of the batch, or of all rows alike.

    Attributes:
      steps: int32, the steps of one row after those of another, each row's list filled up to `stride` with idle steps.
      ranges_X2T: int32 k_start and k_end of each query, T a multiple of the tile.
      longest: how many steps the kernel runs, as an array; None if that is known in advance, and then it is `stride`.
      stride: steps stored for a row.
      expected: about how many steps a row has.
    """

    steps: Any
    ranges_X2T: Any
    longest: jax.Array | None
    stride: int = dataclasses.field(metadata={"static": True})
    expected: int = dataclasses.field(metadata={"static": True})

    @property
    def num_steps(self) -> int | jax.Array:
        """The size of the grid along the list; idle steps follow where a row has fewer."""
        return self.stride if self.longest is None else self.longest

    @property
    def row_stride(self) -> int:
        """How far apart the lists of two rows of the batch begin: 0 if they share one."""
        return 0 if self.ranges_X2T.shape[0] == 1 else self.stride


def q_tile_of(step):
    """Returns the index of the tile of queries."""
    return step >> _Q_SHIFT


def k_tile_of(step):
    """Returns the index of the tile of keys."""
    return (step >> _K_SHIFT) & (_MAX_TILES - 1)


def make_schedule(k_start_XT: Any, k_end_XT: Any, *, q_tile: int, k_tile: int, num_k_tiles: int) -> Schedule:
    """Returns the schedule by tiles of queries, each tile's keys in ascending order.

    Every tile of queries has at least one step, so that its output gets written. A T that is no multiple of the tile is
    filled up with copies of the last query, which make no tile an edge that is not one already.

    Raises:
      ValueError: if there are more tiles than a step can name, or more steps than scalar memory holds.
    """
    xp = np if isinstance(k_start_XT, np.ndarray) and isinstance(k_end_XT, np.ndarray) else jnp
    short = -k_start_XT.shape[1] % q_tile
    ranges_X2T = xp.stack([k_start_XT, k_end_XT], axis=1).astype(np.int32)
    ranges_X2T = xp.pad(ranges_X2T, [(0, 0), (0, 0), (0, short)], mode="edge")
    k_start_XT, k_end_XT = ranges_X2T[:, 0], ranges_X2T[:, 1]
    X, num_q_tiles = k_start_XT.shape[0], k_start_XT.shape[1] // q_tile
    if max(num_q_tiles, num_k_tiles) > _MAX_TILES:
        raise ValueError(
            f"tpu_attention: {num_q_tiles} tiles of queries and {num_k_tiles} of keys, at most {_MAX_TILES}; "
            "use larger tiles"
        )
    first_XI, last_XI = tile_bounds(k_start_XT, k_end_XT, q_tile=q_tile, k_tile=k_tile)
    length_XI = xp.maximum(last_XI - first_XI, 1)
    after_XI = xp.cumsum(length_XI, axis=1)
    if xp is np:
        stride = expected = int(after_XI[:, -1].max())
        longest = None
    else:
        # Half of all pairs is what one causal document has.
        stride, expected = num_q_tiles * num_k_tiles, num_q_tiles * (num_k_tiles + 1) // 2
        longest = jnp.max(after_XI[:, -1]).astype(jnp.int32)
    if X * stride > _MAX_STEPS:
        raise ValueError(
            f"tpu_attention: {X} rows of up to {stride} tiles of scores, together at most {_MAX_STEPS}; "
            "use larger tiles or fewer rows at a time"
        )

    step_1L = np.arange(stride, dtype=np.int32)[None]
    i_XL = xp.minimum(xp.sum(after_XI[:, None, :] <= step_1L[:, :, None], axis=-1), num_q_tiles - 1)
    is_tile_XLI = i_XL[:, :, None] == np.arange(num_q_tiles, dtype=np.int32)[None, None]

    def of_tile(values_XI):
        return xp.sum(xp.where(is_tile_XLI, values_XI[:, None, :], 0), axis=-1)  # a gather, but of vector operations

    tiles = (X, num_q_tiles, q_tile)
    all_see_from_XL = of_tile(k_start_XT.reshape(tiles).max(-1))
    all_see_until_XL = of_tile(k_end_XT.reshape(tiles).min(-1))
    first_XL, last_XL, after_XL = of_tile(first_XI), of_tile(last_XI), of_tile(after_XI)
    begin_XL = after_XL - of_tile(length_XI)
    exists_XL = step_1L < after_XL
    j_XL = xp.minimum(first_XL + step_1L - begin_XL, xp.maximum(last_XL - 1, 0))
    edge_XL = (j_XL * k_tile < all_see_from_XL) | ((j_XL + 1) * k_tile > all_see_until_XL)
    flags_XL = (
        BEGIN * (step_1L == begin_XL)
        + END * (step_1L == after_XL - 1)
        + WORK * (exists_XL & (first_XL < last_XL))
        + EDGE * edge_XL
    )
    steps_XL = (i_XL << _Q_SHIFT) | (j_XL << _K_SHIFT) | flags_XL
    return Schedule(
        steps=steps_XL.astype(np.int32).reshape(-1),
        ranges_X2T=ranges_X2T,
        longest=longest,
        stride=stride,
        expected=expected,
    )
