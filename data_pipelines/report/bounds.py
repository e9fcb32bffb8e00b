"""The bounds of a stage, as people read them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from slmjax.page import number

# n of the first value of attributes with a value for each of some word n-grams.
_NGRAMS = {"top_ngram_share": 2, "duplicate_ngram_share": 5}


@dataclasses.dataclass(frozen=True)
class Bound:
    """An inclusive bound.

    Attributes:
      rule: field of the config.
      side: of which it is; "only" lists what is allowed.
      attribute: as `columns` calls it.
      value: the number, or for "only" the values.
    """

    rule: str
    side: Literal["min", "max", "only"]
    attribute: str
    value: Any

    @property
    def spelled(self) -> str:
        """What is asked of the attribute."""
        match self.side:
            case "min":
                return f"at least {number(self.value)}"
            case "max":
                return f"at most {number(self.value)}"
            case "only":
                return f"one of {', '.join(map(str, self.value))}"

    def holds(self, value: Any) -> bool:
        """Whether a value is allowed."""
        match self.side:
            case "min":
                return value >= self.value
            case "max":
                return value <= self.value
            case "only":
                return value in self.value


def of(config: object) -> list[Bound]:
    """The bounds of a stage's fields min_x, max_x and only_x that are set."""
    found: list[Bound] = []
    for field in dataclasses.fields(config):  # pyright: ignore[reportArgumentType]
        side, _, name = field.name.partition("_")
        value = getattr(config, field.name)
        if value is None or side not in ("min", "max", "only"):
            continue
        if side != "only" and isinstance(value, tuple):
            names = columns(name, len(value))
            found += [Bound(field.name, side, each, one) for each, one in zip(names, value, strict=True)]
        else:
            found.append(Bound(field.name, side, name, value))
    return found


def columns(attribute: str, size: int) -> list[str]:
    """Names for the values of an attribute that has several."""
    if attribute in _NGRAMS:
        return [f"{attribute} ({_NGRAMS[attribute] + i}-grams)" for i in range(size)]
    return [f"{attribute} ({i + 1} of {size})" for i in range(size)]


def values(row: Mapping[str, Any]) -> dict[str, Any]:
    """A document's attributes, those that have several values taken apart."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, list) and all(isinstance(each, float) for each in value):
            found.update(zip(columns(name, len(value)), value, strict=True))
        else:
            found[name] = value
    return found
