"""The meter against a clock that the test moves."""

import os
import time

import pytest

from slmjax.train.throughput import Meter, peak_flops


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def pass_(self, seconds):
        self.now += seconds


def test_rates_waiting_pauses_and_goodput():
    clock = Clock()
    meter = Meter(num_devices=4, device_kind="NVIDIA H200", clock=clock, process_seconds=10.0)
    clock.pass_(30)  # the first step compiles
    meter.step(tokens=1000)
    assert "tokens_per_second" not in meter.read(flops_per_token=1e9)
    for _ in range(2):
        with meter.waiting_for_input():
            clock.pass_(0.5)
        clock.pass_(1.5)
        meter.step(tokens=1000)
    with meter.paused():
        clock.pass_(7)
    metrics = meter.read(flops_per_token=1e9)
    assert metrics["step_seconds"] == pytest.approx(2)
    assert metrics["tokens_per_second"] == pytest.approx(500)
    assert metrics["tokens_per_second_per_device"] == pytest.approx(125)
    assert metrics["input_wait_share"] == pytest.approx(0.25)
    assert metrics["mfu"] == pytest.approx(1e9 * 500 / (4 * 989e12))
    # 3 seconds of computing in 10 before the meter + 30 compiling + 4 in steps + 7 paused
    assert metrics["goodput"] == pytest.approx(3 / 51)
    # a new interval: twice as fast, and goodput goes on adding up
    clock.pass_(1)
    meter.step(tokens=1000)
    metrics = meter.read(flops_per_token=1e9)
    assert metrics["tokens_per_second"] == pytest.approx(1000)
    assert metrics["input_wait_share"] == 0
    assert metrics["goodput"] == pytest.approx(4 / 52)


def test_a_pause_before_the_first_step_and_reading_without_steps_do_no_harm():
    clock = Clock()
    meter = Meter(num_devices=1, device_kind="cpu", clock=clock)
    with meter.paused():
        clock.pass_(5)
    meter.step(tokens=10)
    clock.pass_(2)
    meter.step(tokens=10)
    assert meter.read(flops_per_token=1.0)["tokens_per_second"] == pytest.approx(5)
    assert "step_seconds" not in meter.read(flops_per_token=1.0)


def test_no_utilisation_without_a_known_peak():
    clock = Clock()
    meter = Meter(num_devices=1, device_kind="cpu", clock=clock)
    meter.step(tokens=1)
    clock.pass_(1)
    meter.step(tokens=1)
    assert "mfu" not in meter.read(flops_per_token=1.0)


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="the age of a process is read on Linux only")
def test_goodput_counts_from_the_start_of_the_process():
    meter = Meter(num_devices=1, device_kind="cpu")
    meter.step(tokens=1)
    time.sleep(0.02)
    meter.step(tokens=1)
    # importing jax alone took longer than these 0.02 seconds of "steps"
    assert 0 < meter.read(flops_per_token=1.0)["goodput"] < 0.1


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    assert peak_flops(kind) == peak
