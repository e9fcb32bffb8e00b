"""How attention is cut on Hopper: tilings that were measured on the device at hand, or defaults, and what to measure.

The measurements are in attention_tilings.json, which benchmarks/tune_attention.py writes: for each kind of device rows
with a head_dim, a number of heads in a group, a kind of mask and a length, and the tilings that were fastest there.
"""

import dataclasses
import functools
import importlib.resources
import itertools
import json
from typing import Any, Literal

import numpy as np

from slmjax.kernels.hopper.attention_backward_fused import FusedTiling
from slmjax.kernels.hopper.attention_backward_pieces import PassTiling
from slmjax.kernels.hopper.attention_backward_split import SplitTiling, split_tilings
from slmjax.kernels.hopper.attention_forward import ForwardTiling
from slmjax.kernels.tiles import IntArray

MaskKind = Literal["causal", "window", "documents"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionTiling:
    """Tilings of the two directions; that of the backward chooses its kernels, too."""

    forward: ForwardTiling
    backward: FusedTiling | SplitTiling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """The fastest tilings of one case.

    Attributes:
      head_dim: of the case, a multiple of 16.
      heads_per_group: heads of queries that share a head of keys and values.
      mask: whether every query sees the keys before it, those in a window, or those of its document.
      length: number of queries, and of keys.
      forward: the fastest.
      backward: the fastest of any kind.
      deterministic: the fastest backward of those that give the same bits every time.
    """

    head_dim: int
    heads_per_group: int
    mask: MaskKind
    length: int
    forward: ForwardTiling
    backward: FusedTiling | SplitTiling
    deterministic: SplitTiling

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values; a backward tiling says its class."""
        content = dataclasses.asdict(self)
        content["backward"] = {"fused" if isinstance(self.backward, FusedTiling) else "split": content["backward"]}
        return content

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Measured":
        """Reads what `to_json` returned."""
        ((kind, backward),) = content["backward"].items()
        return cls(
            **{name: content[name] for name in ("head_dim", "heads_per_group", "mask", "length")},
            forward=ForwardTiling(**content["forward"]),
            backward=FusedTiling(**backward) if kind == "fused" else _split(backward),
            deterministic=_split(content["deterministic"]),
        )


def choose_tiling(
    *,
    device_kind: str,
    head_dim: int,
    heads_per_group: int,
    mask: MaskKind,
    length: int,
    deterministic: bool = False,
) -> AttentionTiling:
    """Returns what was measured on this kind of device for the nearest case, or the default if there is none.

    That is the nearest number of heads in a group, up to twice or half as many, and the next length up or the longest.
    """

    def away(row: Measured) -> float:
        return max(row.heads_per_group / heads_per_group, heads_per_group / row.heads_per_group)

    rows = [row for row in measured(device_kind) if (row.head_dim, row.mask) == (head_dim, mask) and away(row) <= 2]
    if not rows:
        return default_tiling(head_dim, heads_per_group=heads_per_group, deterministic=deterministic)
    nearest = min(rows, key=away).heads_per_group
    rows = [row for row in rows if row.heads_per_group == nearest]
    longer = [row for row in rows if row.length >= length]
    row = min(longer, key=lambda row: row.length) if longer else max(rows, key=lambda row: row.length)
    return AttentionTiling(forward=row.forward, backward=row.deterministic if deterministic else row.backward)


@functools.cache
def measured(device_kind: str) -> tuple[Measured, ...]:
    """Returns what was measured on devices of this kind, as jax names it."""
    path = importlib.resources.files("slmjax.kernels.hopper") / "attention_tilings.json"
    return tuple(map(Measured.from_json, json.loads(path.read_text(encoding="utf-8")).get(device_kind, ())))


def default_tiling(head_dim: int, *, heads_per_group: int, deterministic: bool = False) -> AttentionTiling:
    """Returns a tiling for a case that nobody measured; above a head_dim of 128 one that fits.

    The fused backward is built for head_dim 64 and 128 and sums dq in any order; the split one is for the others, and
    where all has to be the same bit for bit every time.
    """
    if head_dim > 128:
        forward = ForwardTiling(k_tile=64, stages=2 if head_dim <= 192 else 1)  # what the shared memory holds
    elif head_dim <= 64 and heads_per_group > 2:
        # Three consumers fit with narrow heads only. Over neighbouring queries they would wait for the diagonal's last.
        forward = ForwardTiling(warpgroups=3, heads_together=True)
    else:
        forward = ForwardTiling()
    if deterministic or head_dim not in (64, 128):
        return AttentionTiling(forward=forward, backward=split_tilings(head_dim)[0])
    fused = FusedTiling() if head_dim == 64 else FusedTiling(q_tile=64, ahead=False)
    return AttentionTiling(forward=forward, backward=fused)


def forward_tilings(head_dim: int, *, heads_per_group: int) -> list[ForwardTiling]:
    """Returns tilings of the forward pass worth measuring; some spill registers or do not fit the shared memory."""
    tiles = [(128, 2), (64, 3)] if head_dim <= 128 else [(64, 1), (64, 2)]
    return [
        ForwardTiling(warpgroups=warpgroups, k_tile=k_tile, stages=stages, heads_together=together, turns=turns)
        for warpgroups, (k_tile, stages), together, turns in itertools.product(
            (2, 3), tiles, (False, True) if heads_per_group > 1 else (False,), (True, False)
        )
    ]


def backward_tilings(head_dim: int) -> list[FusedTiling | SplitTiling]:
    """Returns tilings of the backward pass worth measuring, of both kinds."""
    passes = split_tilings(head_dim)
    split = [SplitTiling(dq=one.dq, dkv=other.dkv) for one, other in itertools.product(passes, passes)]
    fused = [
        FusedTiling(q_tile=q_tile, stages=stages, ahead=ahead)
        for q_tile in {64: (128,), 128: (64, 128)}.get(head_dim, ())
        for stages in (1, 2, 3)
        for ahead in (True, False)
    ]
    return [*fused, *dict.fromkeys(split)]


def mask_kind(k_start_XT: IntArray) -> MaskKind:
    """Tells from the ranges what kind of mask they are: only documents make them depend on the batch."""
    if not isinstance(k_start_XT, np.ndarray):
        return "documents"
    return "window" if k_start_XT.any() else "causal"


def _split(content: dict[str, Any]) -> SplitTiling:
    return SplitTiling(**{name: PassTiling(**fields) for name, fields in content.items()})
