"""Texts of documents in a page: as they are, whatever they hold, with parts of them marked."""

from collections.abc import Iterable, Sequence

from data_pipelines.report.differences import Change
from slmjax.page import Html, element

# What is not to be seen, or turns the direction of what follows, is shown by a sign or its number.
_VISIBLE = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {0x7F: 0x2421}
_VISIBLE |= {code: f"⟨U+{code:04X}⟩" for code in (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))}

_TAGS = {"same": "span", "removed": "del", "added": "ins"}


def visible(text: str) -> str:
    """The text with signs for control characters."""
    return text.translate(_VISIBLE)


def name(text: str) -> Html:
    """An id or a name in a line of its own direction."""
    return element("bdi", visible(text))


def excerpt(pieces: Iterable[Sequence]) -> Html:
    """A text of which some pieces are marked."""
    parts = [element("mark", visible(text)) if marked else visible(text) for text, marked in pieces]
    return element("pre", *parts, dir="auto")


def difference(changes: Iterable[Change]) -> Html:
    """A text and what another one has instead."""
    return element("pre", *(element(_TAGS[kind], visible(text)) for kind, text in changes), dir="auto")
