"""The default engine: this process, or a pool of processes on this machine."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pyarrow as pa

from data_pipelines.engines import LOST_WORKER, num_processors


class LocalEngine:
    """A context manager; its processes start with the first task. One worker is this process itself."""

    def __init__(self, num_workers: int | None = None):
        self.num_workers = num_workers or num_processors()
        self._pool = None

    def __enter__(self) -> "LocalEngine":
        return self

    def __exit__(self, *_) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Any]:
        """Yields function(task) in the order of the tasks."""
        if self.num_workers == 1:
            yield from map(function, tasks)
            return
        if self._pool is None:
            # spawn, not fork: forking a process with threads (pyarrow has some) can deadlock.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.num_workers, mp_context=context, initializer=_start_worker)
        try:
            yield from self._pool.map(function, tasks)
        except BrokenProcessPool as error:
            raise RuntimeError(LOST_WORKER) from error


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Workers of a parent killed with SIGKILL would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
