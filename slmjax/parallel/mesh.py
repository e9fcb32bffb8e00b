"""The device mesh of a run. Its axes are the fields of MeshConfig, in their order: slowest network first."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from slmjax.config import MeshConfig


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:  # pyright: ignore[reportInvalidTypeForm]
    """Lays `devices` (None is all devices of all processes) out as `config` says.

    Axes are of type Auto: the compiler partitions, the rules say where weights and batches start. (The default of
    jax.make_mesh is Explicit, under which code written for automatic partitioning fails.)

    Raises:
      ValueError: the axis sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = _axis_sizes(config, len(devices))
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def on_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function`, to be jitted, with `mesh` as the ambient one while it is traced: ops.partition reads it.

    Its arguments must lie on that mesh.
    """

    @functools.wraps(function)
    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def _axis_sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
    sizes = dataclasses.asdict(config)
    asked = ", ".join(f"{name} = {size}" for name, size in sizes.items())
    fixed = math.prod(size for size in sizes.values() if size != -1)
    for name, size in sizes.items():
        if size == -1:
            if num_devices % fixed:
                raise ValueError(
                    f"MeshConfig {asked}: {num_devices} devices cannot be divided by {fixed}, the product of the fixed "
                    f"axes, so {name} = -1 has no whole size; change a fixed axis or the number of devices"
                )
            sizes[name] = num_devices // fixed
    if math.prod(sizes.values()) != num_devices:
        raise ValueError(
            f"MeshConfig {asked} needs {fixed} devices, {num_devices} are present; "
            "set one axis to -1 to give it whatever is left"
        )
    return sizes
