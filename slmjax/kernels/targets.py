"""Which accelerator there is; compiling for one that is not there, with its real compiler.

For Hopper this needs the packages of the extra `compile` (jax's CUDA plugin and NVIDIA's assembler, no driver), for
TPU the package libtpu. What compiles is proved to fit the device; how it computes and how fast is not.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


# The kind of Hopper GPU that programs are compiled for, where it is not the one at hand; None where it does not count.
_elsewhere: list[str | None] = []


@contextlib.contextmanager
def compiling_for_hopper(kind: str = "NVIDIA H200") -> Iterator[None]:
    """Within it kernels are chosen as on a GPU of this kind, for programs that are compiled here and run elsewhere.

    What is traced within stays in jax's caches: not for programs that also run here.
    """
    _elsewhere.append(kind)
    try:
        yield
    finally:
        _elsewhere.pop()


@contextlib.contextmanager
def without_hopper() -> Iterator[None]:
    """Within it no kernel is chosen for being on Hopper: for `jax.vmap`, which does not take all of ours.

    What is traced within stays in jax's caches, as above.
    """
    _elsewhere.append(None)
    try:
        yield
    finally:
        _elsewhere.pop()


def on_hopper() -> bool:
    """Whether programs run on a GPU with Hopper's instructions (sm_90a), which later GPUs do not have."""
    return _elsewhere[-1] is not None if _elsewhere else _hopper_is_here()


@functools.cache
def _hopper_is_here() -> bool:
    return jax.default_backend() == "gpu" and jax.devices()[0].compute_capability == "9.0"


def device_kind() -> str:
    """Returns the kind of device compiled for (`compiling_for_hopper`), of the mesh in use, or of the default one."""
    if _elsewhere and _elsewhere[-1] is not None:
        return _elsewhere[-1]
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


@functools.cache
def hopper_devices() -> Sequence[Any]:
    """Returns one H100 to compile for.

    Raises:
      RuntimeError: if jax's CUDA plugin is not installed.
    """
    from jax.experimental import topologies  # slow to import, and of use here only

    try:
        description = topologies.get_topology_desc(
            platform="cuda", topology_name="NVIDIA H100", target_config=_H100, topology="1x1x1"
        )
    except Exception as error:
        raise RuntimeError(
            "compiling for Hopper needs jax's CUDA plugin (pip install 'slmjax[compile]') and, where there is no GPU, "
            "JAX_PLATFORMS=cpu"
        ) from error
    return description.devices


@functools.cache
def tpu_devices(topology: str) -> Sequence[Any]:
    """Returns the devices of a TPU slice to compile for, by a name such as "v5e:2x2", "v5p:2x2x1" or "tpu7x:2x2x1".

    Raises:
      RuntimeError: if libtpu is not installed or does not know the name.
    """
    from jax.experimental import topologies  # slow to import, and of use here only

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else libtpu looks for a cloud machine's metadata, slowly
    os.environ.setdefault(
        "ALLOW_MULTIPLE_LIBTPU_LOAD", "1"
    )  # it compiles only: no device that another process may hold
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:
        raise RuntimeError(f"compiling for the TPU {topology!r} needs libtpu: pip install 'slmjax[compile]'") from error


def compile_for(devices: Sequence[Any], function: Callable[..., Any], *arguments: Any) -> jax.stages.Compiled:
    """Compiles `function` for the first device, from arguments of which only shapes and dtypes count.

    A function that is sharded over several devices brings its shardings: jit it and lower it with
    `lowering_platforms` instead.
    """
    sharding = jax.sharding.SingleDeviceSharding(devices[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    platform = "cuda" if devices[0].platform in ("cuda", "gpu") else "tpu"
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,)).compile()
