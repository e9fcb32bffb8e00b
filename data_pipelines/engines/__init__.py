"""Engines run one function over many tasks; the functions go from file to file and know nothing of engines."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

LOST_WORKER = (
    "a worker process was killed, perhaps for want of memory; run the same command again to go on from here, with a "
    "smaller num_workers or shard_bytes if it happens again"
)


class Engine(Protocol):
    """Runs tasks somewhere. `function` is a module's own function and tasks can be pickled."""

    def map(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Any]:
        """Yields function(task) for each task, in the order of the tasks; raises what a task raises."""
        ...


def num_processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux only
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
