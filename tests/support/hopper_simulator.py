"""jax's simulator of Hopper kernels, with what our kernels need and it lacks; there is none before jax 0.11."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

AVAILABLE = hasattr(plgpu, "force_gpu_interpret_mode")


@contextlib.contextmanager
def simulated(*, detect_races: bool = True) -> Iterator[None]:
    """Runs Hopper kernels traced inside on the CPU; races are printed, with the word RACE.

    Adds wgmma with its left operand in registers, and stores to accumulators. All wgmma are done at once, so that a
    missing wait is not noticed.
    """
    from jax._src.pallas.mosaic_gpu import primitives
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    callbacks: Any = gpu_callbacks

    def store(acc, value):
        # A product whose left operand is float32, which no real one of ours is, stands for a store.
        trees = dict.fromkeys(("acc_transforms_tree", "a_transforms_tree", "b_transforms_tree"))
        primitives.wgmma_ref_p.bind(acc, value, acc, **trees)

    def wgmma(*, token, mesh_location, thread, source_info=None, **operands):
        memory = callbacks._get_shared_memory()
        log = callbacks.memory.GPULoggingInfo(mesh_location, thread, source_info)

        def place(name):
            key = callbacks.HostAllocationKey.from_array(operands[f"{name}_allocation_key_as_array"])
            transforms = callbacks._remove_noop_transforms(operands[f"{name}_transforms"])
            return key, memory.access(key, jax.tree.map(int, transforms))

        def content(name):
            value = np.asarray(operands[f"{name}_allocation_key_as_array"])
            if value.ndim == 1:  # a reference's key
                value = memory.get_buffer_content(*place(name), thread, logging_info=log)[0]
            return np.asarray(value, np.float32)

        left = np.asarray(operands["a_allocation_key_as_array"])
        result = left if left.dtype == np.float32 else content("acc") + content("a") @ content("b")
        memory.store_buffer_content(*place("acc"), result, thread, logging_info=log)
        return token

    # Named barriers and fences are inline code, which it knows only under this setting.
    params: Any = plgpu.InterpretGPUParams(  # pyright: ignore[reportAttributeAccessIssue]
        inline_mgpu="_hack_model_inline_mgpu_tokamax", detect_races=detect_races
    )
    with (
        mock.patch.object(primitives, "wgmma_accumulator_store", store),
        mock.patch.object(callbacks, "wgmma", callbacks.fail_on_exception(wgmma)),
        plgpu.force_gpu_interpret_mode(params),  # pyright: ignore[reportAttributeAccessIssue]
    ):
        yield
