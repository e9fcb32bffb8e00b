"""A trained run, ready to be used: parameters and tokenizer."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, SingleDeviceSharding

from slmjax import model
from slmjax.config import ModelConfig, RunConfig
from slmjax.data.tokenizer import Tokenizer
from slmjax.optim.build import make_optimizer
from slmjax.parallel.rules import tree_shardings
from slmjax.train.checkpoint import Restored, checksum, restore_params, restore_part


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


class AdamMoments(NamedTuple):
    """State of Adam of some parameters by path, without the correction of their start: means, squares, steps."""

    mean: dict[str, jax.Array]
    square: dict[str, jax.Array]
    count: jax.Array


def load_adam_moments(run_config: RunConfig, paths: Sequence[str], *, step: int) -> AdamMoments | None:
    """Loads the moments of some parameters, such as "group_0/layer_0/mixer/w_q_DNH", to the first device.

    Returns None where the checkpoint of `step` has none for one of them: they were trained by another rule than Adam,
    or the optimizer's state was not saved.
    """
    specs = model.specs(run_config.model)
    abstract = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), specs)
    optimizer = make_optimizer(run_config.optimizer, lambda step: jnp.ones(()), specs)
    state = jax.eval_shape(optimizer.init, abstract)
    try:
        restored = restore_part(Path(run_config.output_dir) / "checkpoints", {"opt_state": state}, step=step)
    except ValueError:  # a whole checkpoint without these leaves
        return None

    def is_adam(node: Any) -> bool:
        return isinstance(node, optax.ScaleByAdamState)

    for found in filter(is_adam, jax.tree.leaves(restored.state["opt_state"], is_leaf=is_adam)):
        mean, square = (
            {
                jax.tree_util.keystr(path, simple=True, separator="/"): leaf
                for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
            }
            for tree in (found.mu, found.nu)
        )
        if all(path in mean for path in paths):
            return AdamMoments(
                {path: mean[path] for path in paths}, {path: square[path] for path in paths}, found.count
            )
    return None


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
