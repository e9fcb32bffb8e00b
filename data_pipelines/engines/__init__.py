"""Engines run one function over many tasks; the functions go from file to file and know nothing of engines."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import pyarrow as pa

LOST_WORKER = (
    "a worker process was killed, perhaps for want of memory; run the same command again to go on from here, with a "
    "smaller num_workers or shard_bytes if it happens again"
)


class Engine(Protocol):
    """Runs tasks somewhere. `function` is a module's own function and tasks can be pickled."""

    def map(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Any]:
        """Yields function(task) for each task, in the order of the tasks; raises what a task raises."""
        ...


@contextlib.contextmanager
def system_memory() -> Iterator[None]:
    """Makes Arrow take memory from the system's allocator.

    Its own one, mimalloc, gets huge pages from the kernel, which clears them anew for every few megabytes of texts.
    """
    before = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(before)


def prepare_worker() -> None:
    """Settings of Arrow for a process that does one task after the other."""
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    pa.set_memory_pool(pa.system_memory_pool())


def num_processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux only
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
