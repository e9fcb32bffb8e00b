"""How attention is cut for a TPU: a table by generation and head_dim, and what follows from it for given shapes.

No device has measured it: it comes from the instructions that the compiler schedules for tiles of different sizes, see
docs/decisions/0009-tpu-attention-layout.md.
"""

import dataclasses

# Queries and keys lie along lanes, of which a register has 128; every tile is a multiple of that on a device.
LANES = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileSize:
    """A tile of scores: `q` queries, of each head that shares the tile, by `k` keys."""

    q: int
    k: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """How the work of one call is cut.

    Attributes:
      heads: query heads of one key/value head that share a tile; divides their number.
      forward: the tile of the forward pass.
      backward: the tile of the backward pass.
      resident_keys: the backward pass holds the gradients of at most so many keys on chip, and runs once for each piece
        of a longer sequence.
    """

    heads: int
    forward: TileSize
    backward: TileSize
    resident_keys: int

    def __post_init__(self):
        if self.resident_keys < self.backward.k:
            raise ValueError(
                f"Tiling: resident_keys must be at least the backward tile's {self.backward.k} keys, "
                f"got {self.resident_keys}"
            )


@dataclasses.dataclass(frozen=True)
class _Limits:
    """The largest tile of a pass: queries of one head, keys, and queries of all its heads together."""

    q: int
    k: int
    queries: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Row:
    """The limits of a device for head_dims up to `head_dim`, and bytes to hold the gradients of keys and values."""

    head_dim: int
    forward: _Limits
    backward: _Limits
    resident_bytes: int


_MIB = 2**20
# Square tiles waste least on the diagonal; larger ones pay less for each step, smaller ones waste less on short
# documents. On v5e and v5p the MXUs, 128 x 128, bound the backward pass, which gains nothing from a larger tile. A core
# has 128 MiB of VMEM on v5e and v6e, 64 on v5p and tpu7x.
_V5E = (
    _Row(head_dim=128, forward=_Limits(512, 512, 2048), backward=_Limits(512, 512, 1024), resident_bytes=48 * _MIB),
    _Row(head_dim=256, forward=_Limits(256, 512, 1024), backward=_Limits(512, 512, 1024), resident_bytes=48 * _MIB),
)
_V6E = (
    _Row(head_dim=256, forward=_Limits(512, 512, 2048), backward=_Limits(512, 512, 2048), resident_bytes=48 * _MIB),
)
# By device kind as jax names it, a row for each range of head_dim, ascending; a head_dim beyond the last has the last.
_TABLE = {
    "TPU v5 lite": _V5E,
    "TPU v5": tuple(dataclasses.replace(row, resident_bytes=16 * _MIB) for row in _V5E),
    "TPU v6 lite": _V6E,
    "TPU7x": tuple(dataclasses.replace(row, resident_bytes=16 * _MIB) for row in _V6E),
}
# For every other TPU: fits the 16 MiB of a v4.
_FALLBACK = (
    _Row(head_dim=256, forward=_Limits(256, 256, 512), backward=_Limits(256, 256, 512), resident_bytes=4 * _MIB),
)


def choose_tiling(*, device_kind: str, head_dim: int, group: int, T: int, S: int, itemsize: int = 2) -> Tiling:
    """Returns the tiling for `group` query heads on each key/value head, T queries and S keys.

    Numbers have `itemsize` bytes. A device kind that is not in the table gets small tiles.
    """
    rows = _TABLE.get(device_kind, _FALLBACK)
    row = next((row for row in rows if head_dim <= row.head_dim), rows[-1])

    def tile(limits, heads):
        q = max(min(limits.q, limits.queries // heads), LANES)
        return TileSize(q=_even(T, q), k=_even(S, limits.k))

    # The number of heads that makes the forward tile largest, and of such the one with most queries a head.
    most = min(row.forward.queries, row.backward.queries) // LANES
    candidates = [heads for heads in range(1, most + 1) if group % heads == 0]
    heads = max(candidates, key=lambda heads: (heads * tile(row.forward, heads).q, -heads))
    backward = tile(row.backward, heads)
    # For each key a float32 sum and two buffers to write it out, of the gradients of key and value.
    resident_tiles = row.resident_bytes // (2 * (4 + 2 * itemsize) * head_dim * backward.k)
    return Tiling(
        heads=heads,
        forward=tile(row.forward, heads),
        backward=backward,
        resident_keys=max(resident_tiles, 1) * backward.k,
    )


def _even(length: int, limit: int) -> int:
    """Returns the multiple of 128, at most about `limit`, that cuts `length` into as few tiles with least left over."""
    lanes = -(-length // LANES)
    num_tiles = -(-lanes // (limit // LANES))
    return -(-lanes // num_tiles) * LANES
