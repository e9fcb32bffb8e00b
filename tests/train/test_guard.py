"""The guard keeps bad losses out of the parameters and out of its own statistics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.config import GuardConfig
from slmjax.train.guard import TrainingDiverged, check, guard_update, initial_guard


def feed(config, losses, grad_norm=1.0, state=None):
    """Returns the states and verdicts after each loss."""
    update = jax.jit(functools.partial(guard_update, config=config))
    state = initial_guard() if state is None else state
    verdicts = []
    for loss in losses:
        state, good = update(state, jnp.float32(loss), jnp.float32(grad_norm))
        verdicts.append(bool(good))
    return state, verdicts


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_bad_and_changes_no_statistics(bad):
    before, _ = feed(GuardConfig(), [3.0, 2.0])
    after, verdicts = feed(GuardConfig(), [bad, bad], state=before)
    assert verdicts == [False, False]
    assert (after.mean, after.variance, after.count) == (before.mean, before.variance, before.count)
    assert (int(after.consecutive_skips), int(after.total_skips)) == (2, 2)
    recovered, verdicts = feed(GuardConfig(), [2.0], state=after)
    assert verdicts == [True]
    assert (int(recovered.consecutive_skips), int(recovered.total_skips)) == (0, 2)
    # a gradient that is not finite is as bad as a loss
    assert feed(GuardConfig(), [2.0], grad_norm=bad)[1] == [False]


def test_statistics_are_those_of_numpy_in_the_first_window_then_exponential():
    losses = np.random.default_rng(0).normal(5, 1, size=60)
    config = GuardConfig(window_steps=40)
    state, _ = feed(config, losses[:40])
    assert float(state.mean) == pytest.approx(np.mean(losses[:40]), rel=1e-5)
    assert float(state.variance) == pytest.approx(np.var(losses[:40]), rel=1e-4)
    mean, variance = np.mean(losses[:40]), np.var(losses[:40])
    for loss in losses[40:]:
        delta = loss - mean
        mean += delta / 40
        variance = (1 - 1 / 40) * (variance + delta**2 / 40)
    state, _ = feed(config, losses[40:], state=state)
    assert float(state.mean) == pytest.approx(mean, rel=1e-5)
    assert float(state.variance) == pytest.approx(variance, rel=1e-4)


def test_spikes_are_judged_only_after_the_window_and_only_upwards():
    losses = list(np.random.default_rng(1).normal(5, 0.1, size=20))
    config = GuardConfig(spike_sigmas=6.0, window_steps=20)
    assert feed(config, [*losses[:19], 50.0])[1] == [True] * 20
    assert feed(config, [*losses, 50.0, 5.0, 1.0])[1] == [True] * 20 + [False, True, True]
    assert feed(GuardConfig(spike_sigmas=None, window_steps=20), [*losses, 50.0])[1] == [True] * 21


def test_leaves_can_be_donated_together():
    leaves = jax.tree.leaves(initial_guard())
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


def metrics(**changes):
    return {"loss": np.nan, "grad_norm": 1.0, "accepted": 0.0, "consecutive_skips": 1.0} | changes


def test_check():
    skip, stop = GuardConfig(max_consecutive_skips=3), GuardConfig(on_bad_step="stop")
    for config in (skip, stop):
        check(config, step=4, metrics=metrics(accepted=1.0, loss=2.0, consecutive_skips=0.0))
    check(skip, step=4, metrics=metrics(consecutive_skips=2.0))
    with pytest.raises(TrainingDiverged, match=r"3 bad steps in a row .* step 4: loss nan, gradient norm 1"):
        check(skip, step=4, metrics=metrics(consecutive_skips=3.0))
    with pytest.raises(TrainingDiverged, match=r"bad step 7: loss inf, .*on_bad_step is 'stop'"):
        check(stop, step=7, metrics=metrics(loss=np.inf))
