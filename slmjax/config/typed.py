"""Builds a config dataclass from named values, checking what Python does not: that each has the type it says."""

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from slmjax import config as configs

CLASSES = {
    name: cls
    for name in configs.__all__
    if isinstance(cls := getattr(configs, name), type) and dataclasses.is_dataclass(cls)
}


class ConfigError(ValueError):
    """A config that cannot be used; the message names the file or override, the field, what was expected and got."""

    def __init__(self, message: str):
        super().__init__(message)
        self.message = message  # str() may have Gin's additions


class FieldError(ConfigError):
    """The class called `name` could not be made; its `fields` are at fault."""

    def __init__(self, message: str, name: str, fields: Sequence[str] = ()):
        super().__init__(message)
        self.name, self.fields = name, tuple(fields)


def build(cls: type, values: Mapping[str, Any]) -> Any:
    """Returns cls(**values).

    Raises:
      FieldError: a field without a default is absent, a value is of another type than its annotation, or the class
        itself refuses the values.
    """
    name, hints = cls.__name__, _hints(cls)
    if missing := [field for field in _required(cls) if field not in values]:
        raise FieldError(f"{name}: no value for {', '.join(missing)}; bind {name}.{missing[0]} = ...", name)
    for field, value in values.items():
        if not _conforms(value, hints[field]):
            raise FieldError(
                f"{name}.{field}: expected {_spell(hints[field])}, got {_spell_value(value)}", name, (field,)
            )
    try:
        return cls(**values)
    except ValueError as error:
        words = re.findall(r"\w+", str(error))
        raise FieldError(str(error), name, [field for field in values if field in words]) from error


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _required(cls: type) -> list[str]:
    return [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]


def _spell(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(repr(arg) for arg in typing.get_args(hint))
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join(_spell(arg) for arg in typing.get_args(hint))
    if hint is types.NoneType:
        return "None"
    if typing.get_origin(hint) is tuple:
        first, *others = typing.get_args(hint)
        if others == [Ellipsis]:
            return f"a tuple of {_spell(first)}, of one item written (item,)"
        return f"a tuple ({', '.join(map(_spell, (first, *others)))})"
    return getattr(hint, "__name__", str(hint))


def _spell_value(value: Any) -> str:
    if isinstance(value, type) or callable(value):
        return "a class instead of an instance: write @Name() with parentheses"
    if dataclasses.is_dataclass(value):
        return type(value).__name__
    text = repr(value)
    return f"{text if len(text) < 80 else text[:77] + '...'} ({type(value).__name__})"


def _conforms(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_conforms(value, arg) for arg in args)
    if origin is typing.Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if args[-1] is Ellipsis:
            return all(_conforms(item, args[0]) for item in value)
        return len(value) == len(args) and all(map(_conforms, value, args))
    if hint in (int, float):  # bool is an int in Python; a config that says True for 4 is a mistake
        return isinstance(value, (int, hint)) and not isinstance(value, bool) and abs(value) < math.inf
    return isinstance(value, types.NoneType if hint is None else hint)
