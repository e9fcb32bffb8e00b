"""Input files: what a source's paths name, in a fixed order, grouped into units of work."""

import dataclasses
import itertools
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import fsspec
from fsspec.core import has_magic, url_to_fs
from fsspec.implementations.local import LocalFileSystem

from data_pipelines.readers.spans import Span, read_span
from slmjax.config import (
    ConversationFilesSourceConfig,
    EvaluationTextConfig,
    FilesSourceConfig,
    GeneratedFilesSourceConfig,
    PreferenceFilesSourceConfig,
    PythonFunctionsSourceConfig,
    PythonLibrarySourceConfig,
    ScoredFilesSourceConfig,
)

SourceConfig = (
    FilesSourceConfig
    | GeneratedFilesSourceConfig
    | PythonLibrarySourceConfig
    | ConversationFilesSourceConfig
    | PythonFunctionsSourceConfig
)
ExampleFilesConfig = ScoredFilesSourceConfig | PreferenceFilesSourceConfig | EvaluationTextConfig
Format = Literal["jsonl", "parquet", "text", "unsupported"]
Compression = Literal["gz", "zst"]

_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
}
_COMPRESSIONS: dict[str, Compression] = {".gz": "gz", ".zst": "zst"}
_INSTALLED_DIRECTORIES = {"site-packages", "dist-packages", "__pycache__"}
_TEST_DIRECTORIES = {"test", "tests", "idle_test"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputFile:
    """A file to read.

    Attributes:
      address: path or fsspec address.
      name: path relative to what all files of the source have in common; part of document ids.
      size: bytes on disk.
      version: changes when the file does (modification time, or the checksum of an object store).
      format: "unsupported" where the extension is unknown.
      span: of its lines, where the file is cut; None is the whole file.
    """

    address: str
    name: str
    size: int
    version: str
    format: Format
    compression: Compression | None = None
    span: Span | None = None

    @property
    def can_be_cut(self) -> bool:
        """Whether several workers can read it, each a span of its lines."""
        return self.format == "jsonl" and self.compression is None and "://" not in self.address

    def open(self) -> Any:
        """A binary file, as a context manager."""
        return fsspec.open(self.address, "rb")

    def read(self, chunk_bytes: int = 1 << 16) -> Iterator[bytes]:
        """Yields the raw bytes. Raises ValueError naming the file when it cannot be read."""
        try:
            with self.open() as file:
                if self.span is not None:
                    yield from read_span(file, self.span, chunk_bytes)
                    return
                while chunk := file.read(chunk_bytes):
                    yield chunk
        except OSError as error:
            raise ValueError(f"cannot read {self.address}: {error.strerror or error}") from error


def list_inputs(source: SourceConfig | ExampleFilesConfig) -> list[InputFile]:
    """Files of a source in order of their addresses.

    Raises:
      ValueError: a path that matches nothing or cannot be listed.
    """
    match source:
        case PythonLibrarySourceConfig() | PythonFunctionsSourceConfig():
            return _list_library(include_tests=source.include_tests)
        case _:
            return _list_paths(source.paths, source.format)


def units(inputs: Iterable[InputFile], unit_bytes: int) -> list[tuple[InputFile, ...]]:
    """Groups neighbours so that each group, but for a single large file, has at most `unit_bytes` on disk."""
    grouped: list[list[InputFile]] = []
    total = 0
    for file in inputs:
        if not grouped or total + file.size > unit_bytes:
            grouped.append([])
            total = 0
        grouped[-1].append(file)
        total += file.size
    return [tuple(group) for group in grouped]


def _list_paths(paths: Iterable[str], format_name: Literal["auto", "jsonl", "parquet", "text"]) -> list[InputFile]:
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        if not path:  # fsspec would search the whole working directory
            raise ValueError(f"paths holds an empty string, got {tuple(paths)}; the working directory is '.'")
        path = os.path.expanduser(os.path.expandvars(path))
        try:
            found.update(_find(path))
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(f"cannot list {path}: {error}") from error
    first, last = min(found).split("/"), max(found).split("/")
    pairs = zip(first[:-1], last[:-1], strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    inputs = []
    for address in sorted(found):
        info = found[address]
        suffixes = PurePosixPath(address).suffixes
        compression = _COMPRESSIONS.get(suffixes[-1]) if suffixes else None
        suffix = suffixes[-1 - bool(compression)] if len(suffixes) > bool(compression) else ""
        inputs.append(
            InputFile(
                address=address,
                name="/".join(address.split("/")[shared:]),
                size=info["size"],
                version=info["version"],
                format=_FORMATS.get(suffix, "unsupported") if format_name == "auto" else format_name,
                compression=compression,
            )
        )
    return inputs


def _find(path: str) -> dict[str, dict[str, Any]]:
    """Addresses, with size and version, of the files that one path names; hidden ones only when named themselves."""
    filesystem, plain = url_to_fs(path)
    if filesystem.isfile(plain):
        names = [plain]
    elif filesystem.isdir(plain) or has_magic(plain):
        candidates = (
            filesystem.find(plain) if filesystem.isdir(plain) else filter(filesystem.isfile, filesystem.glob(plain))
        )
        parent = re.split(r"[*?\[]", plain)[0].rstrip("/")
        names = [name for name in candidates if "/." not in name.removeprefix(parent)]
    else:
        names = []
    if not names:
        raise ValueError("it matches no file")
    local = isinstance(filesystem, LocalFileSystem)
    addresses = names if local else [filesystem.unstrip_protocol(name) for name in names]
    return {
        address: {"size": filesystem.size(name), "version": filesystem.ukey(name)}
        for address, name in zip(addresses, names, strict=True)
    }


def _list_library(*, include_tests: bool) -> list[InputFile]:
    root = Path(sysconfig.get_path("stdlib"))
    skipped = _INSTALLED_DIRECTORIES if include_tests else _INSTALLED_DIRECTORIES | _TEST_DIRECTORIES
    inputs = []
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in skipped]
        for path in (Path(directory, name) for name in names if name.endswith(".py")):
            status = path.stat()
            if status.st_size:  # many packages have an empty __init__.py
                inputs.append(
                    InputFile(
                        address=str(path),
                        name=path.relative_to(root).as_posix(),
                        size=status.st_size,
                        version=str(status.st_mtime_ns),
                        format="text",
                    )
                )
    if not inputs:
        raise ValueError(
            f"the standard library of this interpreter has no source files in {root}; use FilesSourceConfig"
        )
    return sorted(inputs, key=lambda file: file.name)
