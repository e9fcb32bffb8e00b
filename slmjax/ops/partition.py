"""Running a function on each device's own rows of the batch, for what XLA cannot partition or would partition badly.

XLA does not divide a Pallas kernel, and sorts or gathers over all rows of all devices where each could keep to its own.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from slmjax import axes
from slmjax.kernels import targets


def over_batch(function: Callable[..., Any], batched: Sequence[Any], replicated: Sequence[Any] = ()) -> Any:
    """Returns function(*batched, *replicated), computed by each device for its own rows of `batched`.

    The arguments are arrays, trees of arrays or None. The rows are the leading dimension of every array in `batched`
    and in the result; arrays in `replicated` are whole on every device, and their gradients are summed over devices.
    The mesh is the ambient one (`slmjax.parallel.on_mesh`); with none, with one device, and where a shard_map has
    already divided the batch, this is a plain call.

    Raises:
      ValueError: the rows cannot be divided evenly among the devices, or `batched` disagrees about their number.
    """
    mesh_axes, num_devices = _mesh_axes(), devices_of_batch()
    if num_devices == 1:
        return function(*batched, *replicated)
    rows = {array.shape[0] for array in jax.tree.leaves(batched)}
    if len(rows) != 1 or min(rows) % num_devices:
        raise ValueError(
            f"over_batch: expected one number of rows, a multiple of the {num_devices} devices on mesh axes "
            f"{mesh_axes}, got {sorted(rows)}; change the batch size, or pass what has no rows as replicated"
        )
    rowwise = PartitionSpec(mesh_axes)
    return jax.shard_map(
        function,
        in_specs=(rowwise,) * len(batched) + (PartitionSpec(),) * len(replicated),
        out_specs=rowwise,
        axis_names=set(mesh_axes),
        check_vma=False,  # neither kernels nor hand-written gradients say over which axes their results vary
    )(*batched, *replicated)


def devices_of_batch() -> int:
    """Returns among how many devices `over_batch` divides the rows."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in _mesh_axes())


def _mesh_axes() -> tuple[str, ...]:
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in axes.BATCH_MESH_AXES if axis in mesh.axis_names and axis not in mesh.manual_axes)


def over_examples(function: Callable[..., Any], *batched: Any) -> Any:
    """Returns jax.vmap(function)(*batched), without the kernels for Hopper, not all of which jax can batch."""
    with targets.without_hopper():
        return jax.vmap(function)(*batched)
