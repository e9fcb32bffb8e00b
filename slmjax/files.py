"""Whole files or none: everything is written under a temporary name and renamed."""

import contextlib
import errno
import hashlib
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`, renamed to `path` at the end and removed on an error.

    Raises:
      OSError: the disk is full or cannot be written, naming `path`.
    """
    partial = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.partial")
    try:
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            partial.replace(path)
    finally:
        with contextlib.suppress(OSError):  # where `path` cannot be, a part of it is a file
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Names `path`, and what to do, in every OSError raised while it is written."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "make room and run" if full else "once that is mended, run"
        raise OSError(
            error.errno, f"cannot write {path}: {reason}. What is finished stays; {advice} the same command again"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Writes a whole file."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_directory(path: Path) -> None:
    """Removes a directory so that, stopped at any moment, it is whole or gone."""
    partial = path.with_name(f".{path.name}.removed.partial")
    shutil.rmtree(partial, ignore_errors=True)
    path.replace(partial)
    shutil.rmtree(partial)


def remove_partial(root: Path) -> None:
    """Removes what was being written when a run or a worker was killed."""
    for path in list(root.rglob(".*.partial")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def remove_others(directory: Path, keep: set[str]) -> None:
    """Removes the files of `directory` that an earlier config or a killed run left: all but those in `keep`."""
    for path in directory.iterdir() if directory.is_dir() else ():
        if path.name not in keep and path.is_file():
            path.unlink()
