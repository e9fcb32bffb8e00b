"""From ranges to tiles: which tiles of keys a tile of queries needs, and the inverse.

Every fast attention gets the half-open range of keys that each query sees, and from there skips tiles by these.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

# int32 arrays; numpy where the mask does not depend on the batch, so that bounds are constants of the program.
IntArray = Any

_NEVER = np.iinfo(np.int32).max


def tile_bounds(k_start_BT: IntArray, k_end_BT: IntArray, *, q_tile: int, k_tile: int) -> tuple[IntArray, IntArray]:
    """Returns (first_BI, last_BI): tile i of `q_tile` queries needs the tiles first <= j < last of `k_tile` keys.

    The tightest such interval; 0, 0 where no query of the tile sees anything. Tiles start at multiples of their size,
    the last one may be short. Leading dimensions are free; numpy arrays give numpy arrays.
    """
    xp = np if isinstance(k_start_BT, np.ndarray) else jnp
    short = -k_start_BT.shape[-1] % q_tile
    padding = [(0, 0)] * (k_start_BT.ndim - 1) + [(0, short)]
    empty_BT = k_start_BT >= k_end_BT
    start_BT = xp.pad(xp.where(empty_BT, _NEVER, k_start_BT), padding, constant_values=_NEVER)
    end_BT = xp.pad(xp.where(empty_BT, 0, k_end_BT), padding)
    tiles = (*start_BT.shape[:-1], -1, q_tile)
    last_BI = -(-end_BT.reshape(tiles).max(-1) // k_tile)
    first_BI = xp.where(last_BI == 0, 0, start_BT.reshape(tiles).min(-1) // k_tile)
    return first_BI, last_BI


def inverse_tile_bounds(first_BI: IntArray, last_BI: IntArray, *, num_k_tiles: int) -> tuple[IntArray, IntArray]:
    """Returns (first_BJ, last_BJ): tile j of keys is needed by no tile of queries outside first <= i < last.

    `first_BI` and `last_BI` are those of `tile_bounds`; the gradients of keys and values loop over this inverse. 0, 0
    where nobody needs the tile.
    """
    xp = np if isinstance(first_BI, np.ndarray) else jnp
    num_q_tiles = first_BI.shape[-1]
    leading = (1,) * (first_BI.ndim - 1)
    tile_I1, tile_1J = np.arange(num_q_tiles).reshape(*leading, -1, 1), np.arange(num_k_tiles).reshape(*leading, 1, -1)
    needed_BIJ = (first_BI[..., None] <= tile_1J) & (tile_1J < last_BI[..., None])
    last_BJ = xp.where(needed_BIJ, tile_I1 + 1, 0).max(-2)
    first_BJ = xp.where(last_BJ == 0, 0, xp.where(needed_BIJ, tile_I1, num_q_tiles).min(-2))
    return first_BJ, last_BJ


def inner_tile_bounds(
    k_start_BT: IntArray, k_end_BT: IntArray, *, q_tile: int, k_tile: int
) -> tuple[IntArray, IntArray]:
    """Returns (first_BI, last_BI): all queries of tile i see all keys of the tiles first <= j < last: no mask needed.

    0, 0 where there is no such tile.
    """
    xp = np if isinstance(k_start_BT, np.ndarray) else jnp
    short = -k_start_BT.shape[-1] % q_tile
    padding = [(0, 0)] * (k_start_BT.ndim - 1) + [(0, short)]
    empty_BT = k_start_BT >= k_end_BT
    start_BT = xp.pad(xp.where(empty_BT, _NEVER, k_start_BT), padding, constant_values=0)
    end_BT = xp.pad(xp.where(empty_BT, 0, k_end_BT), padding, constant_values=_NEVER)
    tiles = (*start_BT.shape[:-1], -1, q_tile)
    start_BI, last_BI = start_BT.reshape(tiles).max(-1), end_BT.reshape(tiles).min(-1) // k_tile
    first_BI = start_BI // k_tile + (start_BI % k_tile > 0)
    some_BI = first_BI < last_BI
    return xp.where(some_BI, first_BI, 0), xp.where(some_BI, last_BI, 0)


def inverse_inner_tile_bounds(first_BI: IntArray, last_BI: IntArray, *, num_k_tiles: int) -> tuple[IntArray, IntArray]:
    """Returns (first_BJ, last_BJ): all queries of the tiles first <= i < last see all keys of tile j.

    `first_BI` and `last_BI` are those of `inner_tile_bounds`. Where such tiles are not in one run, the first run.
    """
    xp = np if isinstance(first_BI, np.ndarray) else jnp
    num_q_tiles = first_BI.shape[-1]
    leading = (1,) * (first_BI.ndim - 1)
    tile_I1, tile_1J = np.arange(num_q_tiles).reshape(*leading, -1, 1), np.arange(num_k_tiles).reshape(*leading, 1, -1)
    whole_BIJ = (first_BI[..., None] <= tile_1J) & (tile_1J < last_BI[..., None])
    first_BJ = xp.where(whole_BIJ, tile_I1, num_q_tiles).min(-2)
    last_BJ = xp.where(~whole_BIJ & (tile_I1 > first_BJ[..., None, :]), tile_I1, num_q_tiles).min(-2)
    some_BJ = first_BJ < num_q_tiles
    return xp.where(some_BJ, first_BJ, 0), xp.where(some_BJ, last_BJ, 0)


def pad_ranges(k_start_BT: IntArray, k_end_BT: IntArray, length: int) -> tuple[IntArray, IntArray]:
    """Returns the ranges of `length` queries; those that are added see nothing."""
    xp = np if isinstance(k_start_BT, np.ndarray) else jnp
    padding = [(0, 0)] * (k_start_BT.ndim - 1) + [(0, length - k_start_BT.shape[-1])]
    return xp.pad(k_start_BT, padding), xp.pad(k_end_BT, padding)
