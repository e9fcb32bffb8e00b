"""Whether a step's loss and gradient are fit to be applied, and when a run has lost its way."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from slmjax.config import GuardConfig


class TrainingDiverged(RuntimeError):  # noqa: N818 - it says what happened, as StopIteration does
    """The guard ended the run; the newest checkpoint is from before."""


class GuardState(NamedTuple):
    """Running statistics of the accepted losses, and counts of skipped steps. Scalars on the device."""

    mean: jax.Array
    variance: jax.Array
    count: jax.Array
    consecutive_skips: jax.Array
    total_skips: jax.Array


def initial_guard() -> GuardState:
    """Returns the state before the first step. Each leaf is an array of its own, so that all can be donated."""
    return GuardState(
        mean=jnp.zeros((), jnp.float32),
        variance=jnp.zeros((), jnp.float32),
        count=jnp.zeros((), jnp.int32),
        consecutive_skips=jnp.zeros((), jnp.int32),
        total_skips=jnp.zeros((), jnp.int32),
    )


def guard_update(
    state: GuardState, loss: jax.Array, grad_norm: jax.Array, config: GuardConfig
) -> tuple[GuardState, jax.Array]:
    """Returns the next state and whether the step is good; traceable.

    Bad is a loss or gradient norm that is not finite, and, once `window_steps` losses were accepted, a loss over
    mean + spike_sigmas * standard deviation. A bad loss does not enter the statistics. They are the plain mean and
    variance of the first `window_steps` losses, and exponential averages with that time constant from then on.
    """
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if config.spike_sigmas is not None:
        limit = state.mean + config.spike_sigmas * jnp.sqrt(state.variance)
        good &= (state.count < config.window_steps) | (loss <= limit)
    count = state.count + 1
    weight = 1.0 / jnp.minimum(count, config.window_steps)
    # West 1979: with weight 1 / count exactly the mean and variance of all losses so far.
    delta = jnp.asarray(loss, jnp.float32) - state.mean
    accepted = GuardState(
        mean=state.mean + weight * delta,
        variance=(1 - weight) * (state.variance + weight * delta * delta),
        count=count,
        consecutive_skips=jnp.zeros_like(state.consecutive_skips),
        total_skips=state.total_skips,
    )
    skipped = state._replace(
        consecutive_skips=state.consecutive_skips + 1,
        total_skips=state.total_skips + 1,
    )
    return jax.tree.map(lambda yes, no: jnp.where(good, yes, no), accepted, skipped), good


def check(config: GuardConfig, *, step: int, metrics: Mapping[str, float]) -> None:
    """Raises TrainingDiverged if update number `step` calls for an end of the run.

    `metrics` has loss, grad_norm, accepted and consecutive_skips of that step.
    """
    if metrics["accepted"]:
        return
    skips = int(metrics["consecutive_skips"])
    what = f"step {step}: loss {metrics['loss']:.6g}, gradient norm {metrics['grad_norm']:.6g}"
    advice = "Look at the data of that step, lower the learning rate, or lengthen the warm-up."
    if config.on_bad_step == "stop":
        raise TrainingDiverged(f"bad {what}, and GuardConfig.on_bad_step is 'stop'. {advice}")
    if skips >= config.max_consecutive_skips:
        raise TrainingDiverged(
            f"{skips} bad steps in a row (GuardConfig.max_consecutive_skips), the last at {what}. {advice}"
        )
