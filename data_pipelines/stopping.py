"""Ctrl-C and SIGTERM end a pipeline at once: what is finished is on disk, and the same command goes on from there."""

import contextlib
import multiprocessing
import signal
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal came; says which, and how to go on."""


@contextlib.contextmanager
def on_signals() -> Iterator[None]:
    """Within it the first signal ends the worker processes and raises Stopped; a second one ends this process."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        for worker in multiprocessing.active_children():  # else their tasks would be waited for
            worker.terminate()
        raise Stopped(
            f"stopped by {signal.Signals(number).name}: what is finished is kept; run the same command again to go on"
        )

    previous = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python
