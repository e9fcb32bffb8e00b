"""From logical axes to mesh axes: the only module that knows both.

A weight's dim goes where PARAMETER_RULES says. If its size is not a multiple of that many devices, the first dim of
FALLBACK_ORDER that the weight has, that no rule shards and that does divide, takes its place; if there is none, the
weight is replicated. Either way one line is logged, since it costs communication or memory.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slmjax import axes

logger = logging.getLogger(__name__)

PARAMETER_RULES: dict[str, tuple[str, ...]] = {
    axes.LAYERS: (),
    axes.VOCAB: (),
    axes.EMBED: (axes.FSDP,),
    axes.MLP: (),
    axes.HEADS: (),
    axes.KV_HEADS: (),
    axes.HEAD_DIM: (),
    axes.EXPERT: (),
    axes.NORM: (),
}

ACTIVATION_RULES: dict[str, tuple[str, ...]] = {
    axes.BATCH: axes.BATCH_MESH_AXES,
    axes.LENGTH: (),
    axes.ACT_EMBED: (),
}

# Long dims first. Never LAYERS: a scan would gather every layer's weights to slice one.
FALLBACK_ORDER = (axes.VOCAB, axes.MLP, axes.EXPERT, axes.HEADS, axes.KV_HEADS, axes.HEAD_DIM)


class LogicalShape(Protocol):
    """What the rules need to know of a weight; slmjax.model's ParamSpec is one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dims."""
        ...

    @property
    def logical_axes(self) -> tuple[str | None, ...]:
        """One name per dim; None is never sharded."""
        ...


def sharding_for(spec: LogicalShape, mesh: Mesh, *, name: str = "weight") -> NamedSharding:
    """Returns where one weight lives. `name` is for messages.

    Raises:
      ValueError: an unknown logical axis, more or fewer axes than dims, or two dims on one mesh axis.
    """
    placed = _mesh_axes(spec.logical_axes, PARAMETER_RULES, name)
    if len(placed) != len(spec.shape):
        raise ValueError(f"{name}: shape {spec.shape} and logical axes {spec.logical_axes} differ in length")
    used = [mesh_axis for mesh_axes in placed for mesh_axis in mesh_axes]
    for mesh_axis in used:
        if used.count(mesh_axis) > 1:
            dims = [axis for axis, mesh_axes in zip(spec.logical_axes, placed, strict=True) if mesh_axis in mesh_axes]
            raise ValueError(
                f"{name}: logical axes {dims} both lie on mesh axis {mesh_axis!r}; a mesh axis can shard one dim of "
                "a weight, so give one of them another logical axis or another rule"
            )
    sharded = list(placed)
    for dim, mesh_axes in enumerate(placed):
        if spec.shape[dim] % _num_devices(mesh, mesh_axes):
            sharded[dim] = ()
            fallback = _fallback_dim(spec, placed=sharded, num_devices=_num_devices(mesh, mesh_axes))
            if fallback is not None:
                sharded[fallback] = mesh_axes
            logger.warning(
                "%s: %s of size %d is not a multiple of the %d devices on mesh axes %s; %s instead",
                name,
                spec.logical_axes[dim],
                spec.shape[dim],
                _num_devices(mesh, mesh_axes),
                mesh_axes,
                "replicated" if fallback is None else f"{spec.logical_axes[fallback]} is sharded",
            )
    return NamedSharding(mesh, _partition_spec(sharded))


def tree_shardings(specs: Any, mesh: Mesh) -> Any:
    """Returns the tree of `specs` with the sharding of each weight in its place."""

    def one(path, spec):
        return sharding_for(spec, mesh, name=jax.tree_util.keystr(path, simple=True, separator="/"))

    return jax.tree_util.tree_map_with_path(one, specs, is_leaf=lambda leaf: hasattr(leaf, "logical_axes"))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns where an array with leading dim B lives; all other dims are whole on every device."""
    return NamedSharding(mesh, _partition_spec([ACTIVATION_RULES[axes.BATCH]]))


def process_rows(batch_size: int, mesh: Mesh) -> tuple[int, ...]:
    """Returns which rows of a global batch the devices of this process hold, in the order `host_batch_to_global` takes.

    A loader that reads exactly these rows gives the same global batch on any number of processes.

    Raises:
      ValueError: the batch cannot be divided evenly among the devices.
    """
    mesh_axes = ACTIVATION_RULES[axes.BATCH]
    num_devices = _num_devices(mesh, mesh_axes)
    if batch_size % num_devices:
        raise ValueError(
            f"batch_size {batch_size} is not a multiple of the {num_devices} devices on mesh axes {mesh_axes}; "
            "change batch_size, or use fewer devices"
        )
    pieces = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return tuple(sorted({row for piece in pieces if piece is not None for row in range(batch_size)[piece[0]]}))


def host_batch_to_global(batch: Any, mesh: Mesh) -> Any:
    """Makes global arrays of a tree of host arrays (rows, ...), each process giving its own `process_rows`."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)


def constrain(mesh: Mesh) -> Callable[[jax.Array, Sequence[str | None]], jax.Array]:
    """Returns `(x, logical_axes) -> x`, which tells the compiler where an activation lives; identity on one device."""
    if mesh.size == 1:
        return lambda x, logical_axes: x

    def constrained(x: jax.Array, logical_axes: Sequence[str | None]) -> jax.Array:
        placed = _mesh_axes(logical_axes, ACTIVATION_RULES, "activation")
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, _partition_spec(placed)))

    return constrained


def _mesh_axes(logical_axes: Sequence[str | None], rules: dict[str, tuple[str, ...]], name: str) -> list[tuple]:
    unknown = [axis for axis in logical_axes if axis is not None and axis not in rules]
    if unknown:
        raise ValueError(f"{name}: no rule for logical axes {unknown}; known are {sorted(rules)}")
    return [() if axis is None else rules[axis] for axis in logical_axes]


def _num_devices(mesh: Mesh, mesh_axes: Sequence[str]) -> int:
    return math.prod(mesh.shape[axis] for axis in mesh_axes)


def _fallback_dim(spec: LogicalShape, *, placed: Sequence[tuple], num_devices: int) -> int | None:
    for axis in FALLBACK_ORDER:
        for dim, logical_axis in enumerate(spec.logical_axes):
            if logical_axis == axis and not placed[dim] and spec.shape[dim] % num_devices == 0:
                return dim
    return None


def _partition_spec(placed: Sequence[tuple[str, ...]]) -> PartitionSpec:
    """One entry per dim: None, the mesh axis, or the tuple of them; trailing None left out."""
    entries = [None if not mesh_axes else mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes for mesh_axes in placed]
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)
