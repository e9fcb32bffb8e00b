"""One writer at a time in an output directory."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def only_user(directory: Path) -> Iterator[None]:
    """Makes `directory` and keeps other processes out of it that ask for the same; the lock dies with the process.

    Raises:
      ValueError: it cannot be made, or another process has it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"cannot make the output directory {directory}: {os.strerror(error.errno or 0)}") from error
    try:
        with contextlib.suppress(ImportError):  # absent on Windows
            import fcntl

            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(
                    f"another process is writing {directory}; wait for it, or choose another output_dir"
                ) from error
            except OSError:  # some network file systems have no locks
                pass
        yield
    finally:
        os.close(descriptor)
