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


def is_used(directory: Path) -> bool:
    """Whether a process has `directory` by `only_user`; False where that cannot be told."""
    try:
        import fcntl

        descriptor = os.open(directory, os.O_RDONLY)
    except (ImportError, OSError):
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # closing gives it back at once
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False
