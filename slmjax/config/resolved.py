"""Resolved configs as JSON: what a run and a data pipeline keep of their config, and how it is read back."""

import dataclasses
from typing import Any

from slmjax.config.typed import CLASSES, ConfigError, build


def to_json(node: Any) -> Any:
    """Returns `node` as JSON values; a dataclass carries its class name, so that unions can be told apart."""
    if dataclasses.is_dataclass(node):
        fields = {field.name: to_json(getattr(node, field.name)) for field in dataclasses.fields(node)}
        return {"class": type(node).__name__, **fields}
    if isinstance(node, dict):
        return {name: to_json(item) for name, item in node.items()}
    if isinstance(node, list | tuple):
        return [to_json(item) for item in node]
    return node


def from_json(node: Any) -> Any:
    """Returns the config that `to_json` wrote.

    Raises:
      ConfigError: a class or field is unknown, a value has the wrong type, or values contradict each other.
    """
    if isinstance(node, dict):
        name = node.get("class")
        if name not in CLASSES:
            raise ConfigError(f"saved config names the unknown class {name!r}")
        fields = {key: from_json(value) for key, value in node.items() if key != "class"}
        known = {field.name for field in dataclasses.fields(CLASSES[name])}
        if unknown := sorted(set(fields) - known):
            raise ConfigError(f"saved config has fields that {name} does not know: {unknown}")
        return build(CLASSES[name], fields)
    if isinstance(node, list):
        return tuple(from_json(item) for item in node)
    return node
