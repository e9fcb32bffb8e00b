"""Input files: what a source's paths name, in a fixed order, grouped into units of work."""

import contextlib
import dataclasses
import functools
import itertools
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import fsspec
from fsspec.core import has_magic, url_to_fs
from fsspec.implementations.local import LocalFileSystem

from data_pipelines.readers import extras, hub, saved_datasets, source_trees
from data_pipelines.readers.compression import Compression
from data_pipelines.readers.spans import Span, read_span
from slmjax.config import (
    ConversationFilesSourceConfig,
    EvaluationTextConfig,
    FilesSourceConfig,
    GeneratedFilesSourceConfig,
    HubSourceConfig,
    PreferenceFilesSourceConfig,
    PythonFunctionsSourceConfig,
    PythonLibrarySourceConfig,
    ScoredFilesSourceConfig,
    SourceTreeConfig,
    WarcSourceConfig,
)

SourceConfig = (
    FilesSourceConfig
    | WarcSourceConfig
    | SourceTreeConfig
    | HubSourceConfig
    | GeneratedFilesSourceConfig
    | PythonLibrarySourceConfig
    | ConversationFilesSourceConfig
    | PythonFunctionsSourceConfig
)
ExampleFilesConfig = ScoredFilesSourceConfig | PreferenceFilesSourceConfig | EvaluationTextConfig
Format = Literal["jsonl", "parquet", "arrow", "text", "warc", "unsupported", "not_a_file"]

_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".md": "text",
    ".warc": "warc",
    ".wet": "warc",
}
_COMPRESSIONS: dict[str, Compression] = {".gz": "gz", ".zst": "zst"}
# What says which text of a file is taken, where a source has it.
_TAKEN = ("text_field", "messages_field", "instruction_field", "output_field", "instruction", "main_content")
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
      format: "unsupported" where the extension is unknown, "not_a_file" for a link to nothing, a pipe and the like.
      span: of its lines or row groups, where the file is cut; None is the whole file.
      skipped: why it is passed over unread; "" where it is not.
    """

    address: str
    name: str
    size: int
    version: str
    format: Format
    compression: Compression | None = None
    span: Span | None = None
    skipped: str = ""

    @property
    def can_be_cut(self) -> bool:
        """Whether several workers can read it, each a span of its lines or row groups."""
        return (self.format, self.compression) in (("jsonl", None), ("parquet", None)) and "://" not in self.address

    @property
    def real_address(self) -> str:
        """The same for all paths of one file, which links, relative paths and `..` may be."""
        return self.address if "://" in self.address else os.path.realpath(self.address)

    @property
    def is_read(self) -> bool:
        """Whether there is something to read, and the source wants it."""
        return self.format != "not_a_file" and not self.skipped

    def open(self) -> Any:
        """A binary file, as a context manager."""
        if "://" not in self.address:  # fsspec would take x::y for an address in two parts
            return open(self.address, "rb")
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
        except Exception as error:  # file systems over the network have errors of their own
            raise ValueError(f"cannot read {self.address}: {getattr(error, 'strerror', None) or error}") from error


def list_inputs(source: SourceConfig | ExampleFilesConfig) -> list[InputFile]:
    """Files of a source in order of their addresses, each once, however many of its names the paths match.

    Raises:
      ValueError: a path that matches nothing or cannot be listed, or a package is absent that reading needs.
    """
    match source:
        case PythonLibrarySourceConfig() | PythonFunctionsSourceConfig():
            return _list_library(include_tests=source.include_tests)
        case HubSourceConfig():
            extras.check_hub()
            with _naming(f"the dataset {source.dataset}"):
                addresses = hub.addresses(source)
            return _list_paths(addresses, "auto")
        case WarcSourceConfig():
            extras.check_web_archives()
            return _list_paths(source.paths, source.format)
        case SourceTreeConfig():
            skip = functools.partial(source_trees.skipped_path, source)
            return _list_paths(source.paths, "text", hidden=True, skip=skip)
        case _:
            return _list_paths(source.paths, source.format)


def check_read_once(sources: Sequence[SourceConfig], inputs: Sequence[Sequence[InputFile]]) -> None:
    """Raises ValueError where two sources take the same text of a file; `inputs` are the files of each."""
    seen: dict[tuple[Any, ...], str] = {}
    for source, files in zip(sources, inputs, strict=True) if len(sources) > 1 else ():
        taken = tuple(getattr(source, name, None) for name in _TAKEN)
        for file in files:
            if not file.is_read:
                continue
            whole = isinstance(source, FilesSourceConfig) and file.format == "text"
            first = seen.setdefault((file.real_address, None if whole else taken[0], *taken[1:]), source.name)
            if first != source.name:
                raise ValueError(
                    f"sources {first} and {source.name} both read {file.address}; name it in the paths of one of them"
                )


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


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    """Names what cannot be listed in whatever error a file system has for that."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"cannot list {what}: {error}") from error


class _Found(NamedTuple):
    """A file that a path names: on which file system, what it is called there, and what that says of it."""

    filesystem: Any
    name: str
    size: int
    is_file: bool


def _list_paths(
    paths: Iterable[str],
    format_name: Literal["auto"] | Format,
    *,
    hidden: bool = False,
    skip: Callable[[str, int], str] = lambda name, size: "",
) -> list[InputFile]:
    """The files that the paths name, hidden ones too if `hidden`; `skip` gives InputFile.skipped of a name and size."""
    found: dict[str, _Found] = {}
    for path in paths:
        if not path:  # fsspec would search the whole working directory
            raise ValueError(f"paths holds an empty string, got {tuple(paths)}; the working directory is '.'")
        path = os.path.expanduser(os.path.expandvars(path))
        if path.startswith("hf://"):
            extras.check_hub()
        with _naming(path):
            found.update(_find(path, hidden=hidden))
    inputs = _named(found, format_name, skip)
    once: dict[tuple[bool, str], InputFile] = {}
    for file in inputs:
        real = file.real_address if file.is_read else file.address
        if (file.is_read, real) not in once or file.address == real:
            once[file.is_read, real] = file
    if len(once) == len(inputs):
        return inputs
    return _named({file.address: found[file.address] for file in once.values()}, format_name, skip)


def _named(
    found: Mapping[str, _Found], format_name: Literal["auto"] | Format, skip: Callable[[str, int], str]
) -> list[InputFile]:
    """The files by their addresses, named without the directories that all of them have in common."""
    first, last = min(found).split("/"), max(found).split("/")
    pairs = zip(first[:-1], last[:-1], strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return [_input(address, found[address], shared, format_name, skip) for address in sorted(found)]


def _input(
    address: str, found: _Found, shared: int, format_name: Literal["auto"] | Format, skip: Callable[[str, int], str]
) -> InputFile:
    name = "/".join(address.split("/")[shared:])
    name = name.encode(errors="surrogateescape").decode(errors="backslashreplace")  # in case it is no UTF-8
    suffixes = PurePosixPath(name).suffixes
    compression = _COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    suffix = suffixes[-1 - bool(compression)] if len(suffixes) > bool(compression) else ""
    named = _FORMATS.get(suffix, "unsupported") if format_name == "auto" else format_name
    skipped = skip(name, found.size)
    used = found.is_file and not skipped  # when anything else changes, nothing is read again
    with _naming(address):
        version = found.filesystem.ukey(found.name) if used else ""
    return InputFile(
        address=address,
        name=name,
        size=found.size if used else 0,
        version=version,
        format=named if found.is_file else "not_a_file",
        compression=compression,
        skipped=skipped,
    )


def _find(path: str, *, hidden: bool) -> dict[str, _Found]:
    """The files that one path names, by their addresses; hidden ones when named themselves."""
    filesystem, plain = url_to_fs(path)
    if filesystem.isfile(plain):
        about = {plain: filesystem.info(plain)}
    elif filesystem.isdir(plain) or has_magic(plain):
        if filesystem.isdir(plain):
            about = filesystem.find(plain, detail=True)
        else:
            about = {
                name: info for name, info in filesystem.glob(plain, detail=True).items() if _is_file(filesystem, info)
            }
        parent = re.split(r"[*?\[]", plain)[0].rstrip("/")
        names = [name for name in about if hidden or "/." not in name.removeprefix(parent)]
        about = {name: about[name] for name in saved_datasets.data_files(filesystem, names)}
    else:
        about = {}
    if not about:
        raise ValueError("it matches no file")
    local = isinstance(filesystem, LocalFileSystem)
    return {
        name if local else filesystem.unstrip_protocol(name): _Found(
            filesystem, name, info["size"] or 0, _is_file(filesystem, info)
        )
        for name, info in about.items()
    }


def _is_file(filesystem: Any, info: Mapping[str, Any]) -> bool:
    """Whether there is a file to read, perhaps by a link."""
    return info["type"] == "file" or (info["type"] != "directory" and filesystem.isfile(info["name"]))


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
