"""A trained run, ready to be used: parameters and tokenizer."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from slmjax import model
from slmjax.config import ModelConfig, RunConfig
from slmjax.data.tokenizer import Tokenizer
from slmjax.parallel.rules import tree_shardings
from slmjax.train.checkpoint import restore_params


class LoadedRun(NamedTuple):
    """A run's parameters after `step` updates, and what belongs to them."""

    params: model.Params
    model_config: ModelConfig
    tokenizer: Tokenizer
    step: int


def load_run(run_config: RunConfig, *, step: int | None = None, mesh: Mesh | None = None) -> LoadedRun:
    """Loads the newest whole checkpoint of `run_config`, or that of `step`.

    Args:
      run_config: the run, as it was trained.
      step: the checkpoint to load.
      mesh: devices to spread the parameters over; None is the first device alone.

    Raises:
      ValueError: the run has no checkpoint, or one of another model, or the tokenizer cannot be read.
      CheckpointError: there is none of `step`, or none that is whole.
    """
    tokenizer = Tokenizer.load(run_config.input.tokenizer)
    specs = model.specs(run_config.model)
    if mesh is None:
        alone = SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda spec: alone, specs)
    else:
        shardings = tree_shardings(specs, mesh)
    abstract = jax.tree.map(
        lambda spec, sharding: jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=sharding), specs, shardings
    )
    try:
        restored = restore_params(Path(run_config.output_dir) / "checkpoints", abstract, step=step)
    except FileNotFoundError as error:
        raise ValueError(
            f"the run in {run_config.output_dir} has no finished checkpoint; "
            "train it first with `slmjax train` and the same config"
        ) from error
    return LoadedRun(restored.state["params"], run_config.model, tokenizer, restored.step)
