"""XLA's options for the training step, each with its reason. They go to the step's compilation, not the environment."""


def compiler_options(platform: str) -> dict[str, bool | int | str]:
    """Returns the options to compile a training step with on `platform`, jax's name of a backend."""
    return {}
