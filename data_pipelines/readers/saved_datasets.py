"""Directories as the package `datasets` saves them: which of their files hold the rows."""

import json
from collections.abc import Sequence
from typing import Any

_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"


def data_files(filesystem: Any, names: Sequence[str]) -> list[str]:
    """Of files that a directory holds, those to read: of a saved dataset what its state.json names; all others stay.

    Raises:
      ValueError: a file of a dataset is absent, or its rows are chosen by an index.
    """
    directories = {name.removesuffix(f"/{_STATE}") for name in names if name.endswith(f"/{_STATE}")}
    saved = {directory for directory in directories if f"{directory}/{_INFO}" in set(names)}
    wanted: set[str] = set()
    for directory in saved:
        wanted |= _named(filesystem, directory)
    if missing := sorted(wanted - set(names)):
        raise ValueError(f"a saved dataset without its file {missing[0]}")
    parents = {directory.rpartition("/")[0] for directory in saved}
    return [
        name
        for name in names
        if name in wanted or not (_in(name, saved, (".arrow", ".json")) or _in(name, parents, (f"/{_SPLITS}",)))
    ]


def _in(name: str, directories: set[str], endings: tuple[str, ...]) -> bool:
    return name.endswith(endings) and name.rpartition("/")[0] in directories


def _named(filesystem: Any, directory: str) -> set[str]:
    try:
        state = json.loads(filesystem.cat_file(f"{directory}/{_STATE}"))
        if state.get("_indices_data_files"):
            raise ValueError(f"{directory} chooses its rows by an index: save it with a newer version of datasets")
        return {f"{directory}/{entry['filename']}" for entry in state["_data_files"]}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{directory}/{_STATE} is damaged: {error!r}") from error
