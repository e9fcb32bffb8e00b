"""Learning-rate schedules in closed form: a function of the update's number alone, so a resumed run needs no state."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from slmjax.config import (
    ConstantScheduleConfig,
    CosineScheduleConfig,
    InverseSqrtScheduleConfig,
    LinearScheduleConfig,
    ScheduleConfig,
    WarmupConfig,
    WSDScheduleConfig,
)

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]


def warmup_steps(config: WarmupConfig, *, tokens_per_step: int) -> int:
    """Steps of warm-up; a warm-up in tokens is rounded up to whole steps."""
    return config.steps + -(-config.tokens // tokens_per_step)


def make_schedule(config: ScheduleConfig, *, peak_lr: float, steps: int, tokens_per_step: int) -> Schedule:
    """Returns lr(step), the float32 learning rate of update number `step` = 0, 1, ..., steps - 1; traceable.

    With w steps of warm-up, lr(step) = peak * (step + 1) / w for step < w, so that no update has a learning rate of
    zero and update w - 1 is the first at the peak. Update i = 0, 1, ..., n - 1 of a falling part has progress i / n:
    the final value is reached at `steps`, right after the last update, so that a fall to zero wastes no update either.

    Raises:
      ValueError: if the warm-up (and the decay of WSD) do not fit into the run.
    """
    warmup = warmup_steps(config.warmup, tokens_per_step=tokens_per_step)
    if warmup > steps:
        raise ValueError(
            f"a warm-up of {warmup} steps does not fit into a run of {steps} steps "
            f"(warmup {config.warmup}, tokens_per_step {tokens_per_step}); shorten the warm-up or lengthen the run"
        )
    shape, decay_start = _shape(config, warmup=warmup, steps=steps)
    decay_steps = steps - decay_start

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum((step + 1) / max(warmup, 1), 1.0)
        progress = jnp.clip((step - decay_start) / max(decay_steps, 1), 0.0, 1.0)
        return jnp.float32(peak_lr) * jnp.where(step < warmup, rise, shape(step, progress))

    return schedule


def _shape(config: ScheduleConfig, *, warmup: int, steps: int) -> tuple[Callable, int]:
    """Returns the share of the peak after the warm-up, a function of (step, progress), and the step where it falls."""
    match config:
        case ConstantScheduleConfig():
            return lambda step, progress: jnp.ones_like(progress), steps
        case InverseSqrtScheduleConfig():
            timescale = config.timescale_steps or max(warmup, 1)
            return lambda step, progress: jnp.sqrt(timescale / (timescale + jnp.maximum(step - warmup, 0))), steps
        case CosineScheduleConfig():
            final = config.final_fraction
            return lambda step, progress: final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress)), warmup
        case LinearScheduleConfig():
            return lambda step, progress: 1 - (1 - config.final_fraction) * progress, warmup
        case WSDScheduleConfig():
            decay = round(config.decay_fraction * steps)
            if warmup + decay > steps:
                raise ValueError(
                    f"a warm-up of {warmup} steps and a decay of {decay} steps (decay_fraction "
                    f"{config.decay_fraction}) do not fit into a run of {steps} steps; shorten one of them"
                )
            fall = jnp.sqrt if config.decay_shape == "1-sqrt" else lambda progress: progress
            return lambda step, progress: 1 - (1 - config.final_fraction) * fall(progress), steps - decay
