"""What a training run carries from step to step, and how it lies on the mesh."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slmjax import model
from slmjax.config import RunConfig
from slmjax.optim.build import make_optimizer
from slmjax.optim.schedule import Schedule, make_schedule
from slmjax.parallel.rules import tree_shardings
from slmjax.train.guard import GuardState, initial_guard


class TrainState(NamedTuple):
    """A plain tree: float32 parameters, optimizer state, number of updates made, guard statistics."""

    step: jax.Array
    params: model.Params
    opt_state: Any
    guard: GuardState


def build_optimizer(run: RunConfig) -> tuple[optax.GradientTransformation, Schedule]:
    """Returns the optimizer of `run` and the learning rate as a function of the step."""
    schedule = make_schedule(
        run.schedule,
        peak_lr=run.optimizer.peak_lr,
        steps=run.steps,
        tokens_per_step=run.input.tokens_per_step,
    )
    return make_optimizer(run.optimizer, schedule, model.specs(run.model)), schedule


def init_state(
    run: RunConfig, optimizer: optax.GradientTransformation, params: model.Params | None = None
) -> TrainState:
    """Returns the state before the first update, of `params` or of random ones; the same on every process."""
    if params is None:
        params = model.init(jax.random.key(run.seed), run.model)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), initial_guard())


def abstract_state(run: RunConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Returns the state as `ShapeDtypeStruct`s that carry their shardings.

    An optimizer's moment lies as its parameter does: it is recognised by the path of the parameter at the end of its
    own, and by its shape. Everything else is replicated.
    """
    state = jax.eval_shape(lambda: init_state(run, optimizer))
    by_path = {
        _names(path): (leaf, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(state.params),
            jax.tree.leaves(tree_shardings(model.specs(run.model), mesh)),
            strict=True,
        )
    }
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(path, leaf):
        names = _names(path)
        for start in range(len(names)):
            parameter, sharding = by_path.get(names[start:], (None, None))
            if parameter is not None and parameter.shape == leaf.shape:
                return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)

    return jax.tree_util.tree_map_with_path(place, state)


def _names(path) -> tuple[str, ...]:
    return tuple(str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part)))) for part in path)
