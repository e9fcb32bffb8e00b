"""XLA's options for the training step, each with its reason. They go to the step's compilation, not the environment."""

from slmjax.config import ExecutionConfig


def compiler_options(platform: str, execution: ExecutionConfig) -> dict[str, bool | int | str]:
    """Returns the options to compile a training step with on `platform`, jax's name of a backend."""
    if platform != "gpu":
        return {}
    options: dict[str, bool | int | str] = {}
    if execution.products == "float8":
        # XLA gives a product to Triton before it looks for scaled 8-bit operands, and then multiplies in bfloat16.
        options["xla_gpu_enable_triton_gemm"] = False
    return options
