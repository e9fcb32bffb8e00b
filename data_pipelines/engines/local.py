"""The default engine: this process, or a pool of processes on this machine."""

import collections
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection, wait
from typing import Any

from data_pipelines.engines import LOST_WORKER, num_processors, prepare_worker


class LocalEngine:
    """A context manager; its processes start with the first task. One worker is this process itself."""

    def __init__(self, num_workers: int | None = None):
        self.num_workers = num_workers or num_processors()
        self._pool = None
        self._open: Connection | None = None  # closed, it tells the workers to end

    def __enter__(self) -> "LocalEngine":
        return self

    def __exit__(self, *_) -> None:
        if self._pool is not None and self._open is not None:
            # Workers end by themselves: one that waits for a lock that a killed one held would never hear of the end.
            self._open.close()
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Any]:
        """Yields function(task) in the order of the tasks."""
        if self.num_workers == 1:
            yield from map(function, tasks)
            return
        if self._pool is None:
            # spawn, not fork: forking a process with threads (pyarrow has some) can deadlock.
            context = multiprocessing.get_context("spawn")
            told, self._open = context.Pipe(duplex=False)
            self._pool = ProcessPoolExecutor(
                self.num_workers, mp_context=context, initializer=_start_worker, initargs=(told,)
            )
        # Not the pool's map, which cancels what a signal leaves unfinished: the pool's own thread, which sees the same
        # workers end, would then print that it cannot fail a cancelled task.
        results = collections.deque(self._pool.submit(_call, function, task) for task in tasks)
        try:
            while results:
                yield results.popleft().result()
        except BrokenProcessPool as error:
            raise RuntimeError(LOST_WORKER) from error


_busy = threading.Lock()
_ending = threading.Event()


def _call(function: Callable[[Any], Any], task: Any) -> Any:
    with _busy:
        return None if _ending.is_set() else function(task)


def _start_worker(told: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    prepare_worker()
    threading.Thread(target=_end_when_told, args=(told,), daemon=True).start()


def _end_when_told(told: Connection) -> None:
    """Ends this worker after its task; at once where the parent was killed, whose workers would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    if parent.sentinel in wait([parent.sentinel, told]):
        os._exit(1)
    _ending.set()
    with _busy:
        os._exit(0)
