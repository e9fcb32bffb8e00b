"""Checks shared by the config dataclasses: each names the field, what was expected and what was got."""

from typing import Any


def require(condition: bool, owner: Any, message: str) -> None:
    """Raises ValueError("<ClassName>: <message>") unless `condition` holds."""
    if not condition:
        raise ValueError(f"{type(owner).__name__}: {message}")


def positive(owner: Any, *names: str) -> None:
    """Requires that each named field is greater than zero; None means the field is off and passes."""
    for name in names:
        value = getattr(owner, name)
        require(value is None or value > 0, owner, f"{name} must be greater than 0, got {value!r}")


def directory(owner: Any, *names: str) -> None:
    """Requires that each named field can be the path of a directory."""
    utf8(owner, *names)
    for name in names:
        value = getattr(owner, name)
        require(value.strip() != "", owner, f"{name} must name a directory, got {value!r}; the one you are in is '.'")
        require("\0" not in value, owner, f"{name} must name a directory, got a null byte in {value!r}")


def utf8(owner: Any, *names: str) -> None:
    """Requires that each named field is text which UTF-8 can hold."""
    for name in names:
        value = getattr(owner, name)
        lone = any("\ud800" <= character <= "\udfff" for character in value)
        require(not lone, owner, f"{name} must be text without lone surrogates, got {value!r}")


def fraction(owner: Any, *names: str) -> None:
    """Requires that each named field lies in [0, 1]; None means the field is off and passes."""
    for name in names:
        value = getattr(owner, name)
        require(value is None or 0 <= value <= 1, owner, f"{name} must lie between 0 and 1, got {value!r}")


def not_negative(owner: Any, *names: str) -> None:
    """Requires that each named field is at least zero."""
    for name in names:
        value = getattr(owner, name)
        require(value >= 0, owner, f"{name} must not be negative, got {value!r}")
