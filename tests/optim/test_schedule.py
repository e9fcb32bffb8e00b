"""Schedules at their corners, against the formulas of the papers written out in numpy."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmjax.config import (
    ConstantScheduleConfig,
    CosineScheduleConfig,
    InverseSqrtScheduleConfig,
    LinearScheduleConfig,
    WarmupConfig,
    WSDScheduleConfig,
)
from slmjax.optim import make_schedule, warmup_steps

PEAK = 3e-3
ALL = [
    WSDScheduleConfig,
    CosineScheduleConfig,
    LinearScheduleConfig,
    InverseSqrtScheduleConfig,
    ConstantScheduleConfig,
]


def curve(config, steps, tokens_per_step=8):
    schedule = make_schedule(config, peak_lr=PEAK, steps=steps, tokens_per_step=tokens_per_step)
    return np.asarray(jax.vmap(schedule)(np.arange(steps + 1))) / PEAK


@pytest.mark.parametrize("config_class", ALL)
def test_warmup_rises_to_the_peak_without_a_zero_step(config_class):
    lr = curve(config_class(warmup=WarmupConfig(steps=5)), 20)
    np.testing.assert_allclose(lr[:5], np.arange(1, 6) / 5, rtol=1e-6)
    assert lr.max() <= 1 + 1e-6


@pytest.mark.parametrize("config_class", ALL)
def test_a_run_of_one_step_learns(config_class):
    for warmup in (WarmupConfig(), WarmupConfig(steps=1), WarmupConfig(tokens=3)):
        assert curve(config_class(warmup=warmup), 1)[0] == pytest.approx(1)


@pytest.mark.parametrize("config_class", ALL)
def test_warmup_may_fill_the_run_but_not_exceed_it(config_class):
    kwargs = {"decay_fraction": 0.0} if config_class is WSDScheduleConfig else {}
    lr = curve(config_class(warmup=WarmupConfig(steps=4), **kwargs), 4)
    np.testing.assert_allclose(lr[:4], [0.25, 0.5, 0.75, 1], rtol=1e-6)
    with pytest.raises(ValueError, match=r"warm-up of 5 steps .* run of 4 steps"):
        curve(config_class(warmup=WarmupConfig(tokens=33)), 4)


def test_warmup_in_tokens_is_rounded_up():
    assert warmup_steps(WarmupConfig(tokens=32), tokens_per_step=8) == 4
    assert warmup_steps(WarmupConfig(tokens=33), tokens_per_step=8) == 5
    np.testing.assert_array_equal(
        curve(CosineScheduleConfig(warmup=WarmupConfig(tokens=33)), 20),
        curve(CosineScheduleConfig(warmup=WarmupConfig(steps=5)), 20),
    )


def test_wsd_is_flat_then_falls_in_the_last_fraction():
    config = WSDScheduleConfig(warmup=WarmupConfig(steps=10), decay_fraction=0.2, final_fraction=0.1)
    lr = curve(config, 100)
    np.testing.assert_allclose(lr[9:81], 1, rtol=1e-6)  # step 80 starts the decay, from the peak
    np.testing.assert_allclose(lr[80:], 1 - 0.9 * np.arange(21) / 20, rtol=1e-5)


def test_wsd_one_minus_sqrt():
    lr = curve(WSDScheduleConfig(decay_fraction=0.5, decay_shape="1-sqrt"), 20)
    np.testing.assert_allclose(lr[10:], 1 - np.sqrt(np.arange(11) / 10), atol=1e-6)


def test_wsd_without_room_for_the_decay_is_refused():
    with pytest.raises(ValueError, match="warm-up of 6 steps and a decay of 5 steps"):
        curve(WSDScheduleConfig(warmup=WarmupConfig(steps=6), decay_fraction=0.5), 10)


def test_cosine_and_linear_reach_their_final_value_after_the_last_update():
    progress = np.arange(11) / 10
    cosine = curve(CosineScheduleConfig(warmup=WarmupConfig(steps=2), final_fraction=0.1), 12)
    np.testing.assert_allclose(cosine[2:], 0.1 + 0.45 * (1 + np.cos(np.pi * progress)), rtol=1e-5)
    linear = curve(LinearScheduleConfig(warmup=WarmupConfig(steps=2)), 12)
    np.testing.assert_allclose(linear[2:], 1 - progress, atol=1e-6)
    assert linear[11] > 0 == linear[12]  # the last update still moves


def test_inverse_sqrt_is_the_plain_law_when_the_timescale_is_the_warmup():
    lr = curve(InverseSqrtScheduleConfig(warmup=WarmupConfig(steps=4)), 50)
    np.testing.assert_allclose(lr[4:], np.sqrt(4 / np.arange(4, 51)), rtol=1e-6)
    lr = curve(InverseSqrtScheduleConfig(timescale_steps=9), 50)
    np.testing.assert_allclose(lr, np.sqrt(9 / (9 + np.arange(51))), rtol=1e-6)


def test_float32_and_traceable():
    schedule = make_schedule(ConstantScheduleConfig(), peak_lr=PEAK, steps=3, tokens_per_step=1)
    assert jax.jit(schedule)(np.int32(1)).dtype == np.float32


@settings(max_examples=12, deadline=None)
@given(
    kind=st.sampled_from(ALL),
    steps=st.integers(1, 40),
    warmup_share=st.floats(0, 0.7),
)
def test_every_update_moves_and_none_exceeds_the_peak(kind, steps, warmup_share):
    lr = curve(kind(warmup=WarmupConfig(steps=int(steps * warmup_share))), steps)[:steps]
    assert np.all(lr > 0)
    assert np.all(lr <= 1 + 1e-6)
    fall = lr[int(steps * warmup_share) :]
    assert np.all(np.diff(fall) <= 1e-6)
