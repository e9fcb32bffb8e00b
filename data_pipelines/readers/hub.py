"""Where the files of a dataset of the Hugging Face hub are."""

import re
from typing import Any

from fsspec.core import url_to_fs

from slmjax.config import HubSourceConfig

_CONVERTED = "refs%2Fconvert%2Fparquet"
_READABLE = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".arrow", ".txt", ".txt.gz", ".md")
_SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation")
_NO_DATA = ("README.md", "LICENSE.md", "LICENSE.txt", "CITATION.md")


def addresses(source: HubSourceConfig) -> list[str]:
    """Addresses of files and globs that hold the split.

    Raises:
      ValueError: there is no such config or split; the message names those that there are.
    """
    root = f"hf://datasets/{source.dataset}"
    at_revision = root if source.revision is None else f"{root}@{source.revision.replace('/', '%2F')}"
    if source.files:
        return [f"{at_revision}/{glob.lstrip('/')}" for glob in source.files]
    converted = None if source.revision is not None else _converted(source, f"{root}@{_CONVERTED}")
    return [converted] if converted else _of_repository(source, at_revision)


def _converted(source: HubSourceConfig, root: str) -> str | None:
    """The directory of the converted split; None where the hub has not converted all of it."""
    filesystem, plain = url_to_fs(root)
    try:
        configs = _directories(filesystem, plain)
    except FileNotFoundError:  # the branch of conversions, or the repository
        return None
    if not configs:
        return None
    config = source.config or ("default" if "default" in configs or len(configs) > 1 else configs[0])
    if config not in configs:
        raise ValueError(f"{source.dataset} has the configs {configs}, not {source.config!r}: name one of them")
    splits = _directories(filesystem, f"{plain}/{config}")
    if source.split in splits:
        return f"{root}/{config}/{source.split}"
    if f"partial-{source.split}" in splits:
        return None
    raise ValueError(f"{source.dataset}, config {config}, has the splits {splits}, got {source.split!r}")


def _directories(filesystem: Any, plain: str) -> list[str]:
    entries = filesystem.ls(plain, detail=True)
    return sorted(entry["name"].rsplit("/", 1)[-1] for entry in entries if entry["type"] == "directory")


def _of_repository(source: HubSourceConfig, root: str) -> list[str]:
    """Files of the repository in whose path the split is a word; all, if no split is in any."""
    filesystem, plain = url_to_fs(root)
    names = [name.removeprefix(plain).lstrip("/") for name in filesystem.find(plain)]
    names = [name for name in names if name.endswith(_READABLE) and name.rsplit("/", 1)[-1] not in _NO_DATA]
    if source.config is not None:
        names = [name for name in names if source.config in re.split(r"[/.]", name)]
    words = {name: set(re.split(r"[^a-z]+", name.lower())) for name in names}
    if any(found & set(_SPLITS) for found in words.values()) or source.split != "train":
        names = [name for name in names if source.split.lower() in words[name]]
    if not names:
        raise ValueError(
            f"{source.dataset} has no file for config {source.config!r}, split {source.split!r} that can be read "
            f"({', '.join(_READABLE)}); name them in HubSourceConfig.files"
        )
    return [f"{root}/{name}" for name in sorted(names)]
