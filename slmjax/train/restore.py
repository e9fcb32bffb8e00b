"""A trained run, ready to be used: parameters and tokenizer."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from slmjax import model
from slmjax.config import ModelConfig, RunConfig
from slmjax.data.tokenizer import Tokenizer
from slmjax.parallel.rules import tree_shardings
from slmjax.train.checkpoint import Restored, checksum, restore_params


class LoadedRun(NamedTuple):
    """A run's parameters after `step` updates, and what belongs to them."""

    params: model.Params
    model_config: ModelConfig
    tokenizer: Tokenizer
    step: int


def require_tokenizer(restored: Restored, tokenizer: Tokenizer, run_dir: str) -> None:
    """Refuses a checkpoint whose parameters belong to another tokenizer.

    Raises:
      ValueError: the checkpoint was saved with a tokenizer of another hash.
    """
    saved = restored.extra.get("tokenizer_sha256")
    if saved is not None and saved != tokenizer.sha256:
        raise ValueError(
            f"the checkpoint of step {restored.step} in {run_dir} was trained with the tokenizer {saved[:12]}, but "
            f"InputConfig.tokenizer is now {tokenizer.sha256[:12]}; make the old one again, or train anew"
        )


def params_sha256(params: model.Params) -> str:
    """Returns a digest of parameters, of the name and the checksum of each; the same however they are sharded."""
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    sums = jax.device_get(
        jax.jit(lambda tree: jax.tree.map(checksum, tree))(leaves)
    )  # one program, as in checkpoint.py
    content = json.dumps({name: int(each) for name, each in sorted(sums.items())})
    return hashlib.sha256(content.encode()).hexdigest()


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
    require_tokenizer(restored, tokenizer, run_config.output_dir)
    return LoadedRun(restored.state["params"], run_config.model, tokenizer, restored.step)
