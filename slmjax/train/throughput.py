"""How fast a run goes: tokens a second, model FLOP utilisation, waiting, goodput, memory."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator

import jax

# Dense bfloat16 FLOP/s per device from the vendors' data sheets (no sparsity), by the start of jax's device_kind in
# lower case; the first that fits counts. A TPU v2, v3 or 7x device is one of the two cores of a chip.
_PEAK_FLOPS = (
    ("nvidia b200", 2250e12),
    ("nvidia gb200", 2500e12),
    ("nvidia h200", 989e12),
    ("nvidia gh200", 989e12),
    ("nvidia h100 pcie", 756e12),
    ("nvidia h100 nvl", 835e12),
    ("nvidia h100", 989e12),
    ("nvidia h800", 989e12),
    ("nvidia h20", 148e12),
    ("nvidia a100", 312e12),
    ("nvidia a800", 312e12),
    ("nvidia a10g", 70e12),
    ("nvidia a10", 125e12),
    ("nvidia a40", 149.7e12),
    ("nvidia l40s", 362e12),
    ("nvidia l4", 121e12),
    ("tpu7", 1153.5e12),
    ("tpu v6 lite", 918e12),
    ("tpu v6e", 918e12),
    ("tpu v5 lite", 197e12),
    ("tpu v5e", 197e12),
    ("tpu v5p", 459e12),
    ("tpu v5", 459e12),
    ("tpu v4 lite", 138e12),
    ("tpu v4", 275e12),
    ("tpu v3", 61.5e12),
    ("tpu v2", 22.5e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Returns the nominal dense bfloat16 FLOP/s of one device, or None if it is not in the table (CPUs)."""
    kind = device_kind.lower()
    return next((peak for start, peak in _PEAK_FLOPS if kind.startswith(start)), None)


class Meter:
    """Accumulates steps between two readings.

    Time is of three kinds: waiting for input, paused (evaluation, saving), and the rest, which is computing. The first
    step compiles: it is in no reading, and lowers goodput.

    Args:
      num_devices: devices of the mesh, on all processes.
      device_kind: jax's name for one of them.
      clock: seconds, for tests.
      process_seconds: how long this process had lived when the meter was made; None asks the operating system.
    """

    def __init__(
        self,
        *,
        num_devices: int,
        device_kind: str,
        clock: Callable[[], float] = time.perf_counter,
        process_seconds: float | None = None,
    ):
        self._clock, self._num_devices, self._peak = clock, num_devices, peak_flops(device_kind)
        self._born = clock() - (_process_seconds() if process_seconds is None else process_seconds)
        self._productive = 0.0
        self._warm = False
        self._reset()

    def _reset(self) -> None:
        self._since, self._steps, self._tokens, self._waited, self._paused = self._clock(), 0, 0, 0.0, 0.0

    @contextlib.contextmanager
    def waiting_for_input(self) -> Iterator[None]:
        """Counts the time of its body as waiting."""
        start = self._clock()
        yield
        self._waited += self._clock() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Takes the time of its body out of step time and throughput; it only lowers goodput."""
        start = self._clock()
        yield
        self._paused += self._clock() - start

    def step(self, *, tokens: int) -> None:
        """Counts a finished step of `tokens` positions over all devices."""
        if self._warm:
            self._steps += 1
            self._tokens += tokens
        else:
            self._warm = True
            self._reset()

    def read(self, *, flops_per_token: float) -> dict[str, float]:
        """Returns the metrics since the last reading and begins anew.

        tokens_per_second, tokens_per_second_per_device, step_seconds, input_wait_share (of step time),
        mfu = flops_per_token * tokens_per_second / (peak FLOP/s of all devices), where the peak is known;
        goodput, the share of the process's whole life spent in steps after the first, without waiting and pauses;
        peak_memory_gib, of the fullest local device, where the backend tells it. Before the second step only the last.
        """
        metrics = {}
        seconds = self._clock() - self._since - self._paused
        if self._steps and seconds > 0:
            self._productive += seconds - self._waited
            rate = self._tokens / seconds
            metrics = {
                "tokens_per_second": rate,
                "tokens_per_second_per_device": rate / self._num_devices,
                "step_seconds": seconds / self._steps,
                "input_wait_share": self._waited / seconds,
                "goodput": self._productive / (self._clock() - self._born),
            }
            if self._peak is not None:
                metrics["mfu"] = flops_per_token * rate / (self._peak * self._num_devices)
            self._reset()
        return metrics | _peak_memory()


def _peak_memory() -> dict[str, float]:
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    return {"peak_memory_gib": max(peaks) / 2**30} if peaks else {}


def _process_seconds() -> float:
    """Returns the age of this process on Linux, 0 elsewhere."""
    try:
        with open("/proc/self/stat", encoding="ascii") as stat, open("/proc/uptime", encoding="ascii") as uptime:
            # Field 22, counted after the command's name, which may hold spaces: clock ticks after boot.
            started = int(stat.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
            return float(uptime.read().split()[0]) - started
    except OSError:
        return 0.0
