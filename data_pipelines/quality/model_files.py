"""Quality models on disk: model.npz with the arrays, and model.json, written last, with everything else."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.quality.features import FEATURE_VERSION
from data_pipelines.quality.linear import LinearModel
from data_pipelines.quality.ngram_model import NgramModel
from slmjax import files

FORMAT_VERSION = 1

QualityModel = LinearModel | NgramModel
_CLASSES: dict[str, type[LinearModel] | type[NgramModel]] = {model.kind: model for model in (LinearModel, NgramModel)}


def save(model: QualityModel, directory: Path, *, about: dict[str, Any]) -> None:
    """Writes a model. `about` is what a person wants to know of it: its config, its data, its held-out scores."""
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    arrays = {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}
    with files.replacing(directory / "model.npz") as partial, open(partial, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    content = {
        "format_version": FORMAT_VERSION,
        "feature_version": FEATURE_VERSION,
        "kind": model.kind,
        "fields": {name: value for name, value in fields.items() if name not in arrays},
        "arrays_sha256": files.sha256(directory / "model.npz"),
        **about,
    }
    files.write_text(directory / "model.json", json.dumps(content, indent=1) + "\n")


def load(directory: str | os.PathLike) -> QualityModel:
    """Reads what `save` wrote; ~ and environment variables expand.

    Raises:
      ValueError: there is no model, it is damaged, or was trained with another version of the features.
    """
    path = expand(directory)
    about = read_about(path)
    versions = (about.get("format_version"), about.get("feature_version"))
    if versions != (FORMAT_VERSION, FEATURE_VERSION):
        raise ValueError(
            f"{path} has format and feature versions {versions}, this program needs "
            f"{(FORMAT_VERSION, FEATURE_VERSION)}; train the model again"
        )
    try:
        if files.sha256(path / "model.npz") != about["arrays_sha256"]:
            raise ValueError("model.npz is not the file that model.json describes")
        with np.load(path / "model.npz", allow_pickle=False) as arrays:
            return _CLASSES[about["kind"]](**about["fields"], **arrays)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the quality model {path} is damaged, train it again: {error}") from error


def read_about(path: Path) -> dict[str, Any]:
    """Returns model.json. Raises ValueError where it is missing or is no JSON object."""
    try:
        about = json.loads((path / "model.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is no quality model, model.json cannot be read ({error}); `slmjax data train-quality` makes one"
        ) from error
    if not isinstance(about, dict):
        raise ValueError(f"{path / 'model.json'} must be an object, got {type(about).__name__}; train the model again")
    return about


def identity(directory: str | os.PathLike) -> str:
    """Digest of a model, of its arrays and of everything said about it."""
    path = expand(directory)
    read_about(path)
    return files.sha256(path / "model.json")


def expand(path: str | os.PathLike) -> Path:
    """Expands ~ and environment variables."""
    return Path(os.path.expandvars(path)).expanduser()
