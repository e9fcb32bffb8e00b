"""What was changed in a text, in short."""

import difflib
import re
from collections.abc import Iterator
from typing import Any

_SHOWN = 5
_CONTEXT = 30  # characters on either side
_LONGEST = 200  # characters of what was removed or put in
_ALIGNED = 4_000_000  # product of the numbers of lines, or words, up to which they are aligned


def changes(before: str, after: str) -> dict[str, Any]:
    """How many places were changed, and the first of them, each with a little of what stands around it."""
    if before == after:
        return {"number": 0, "shown": []}
    old, new = before.split("\n"), after.split("\n")
    if len(old) == len(new):
        pairs = [(a, b) for a, b in zip(old, new, strict=True) if a != b]
    else:
        pairs = [(a, b) for a, b, *_ in _aligned(old, new, "\n")]
    number, shown = 0, []
    for pair in pairs:
        # Of a line that was changed in several places each is a change.
        words, new_words = (re.findall(r"\s+|\S+", text) for text in pair)
        within = list(_aligned(words, new_words, "")) if number < _SHOWN else [pair]
        shown += [_change(*each) for each in within]
        number += len(within)
    return {"number": number, "shown": shown[:_SHOWN]}


def _aligned(old: list[str], new: list[str], between: str) -> Iterator[tuple[str, ...]]:
    """What was changed of two lists of texts, each place by itself: old, new and, of words, what stands around it."""
    if len(old) * len(new) > _ALIGNED:
        yield between.join(old), between.join(new)
        return
    for kind, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind != "equal":
            around = ("".join(old[max(a - _CONTEXT, 0) : a]), "".join(old[b : b + _CONTEXT])) if not between else ()
            yield between.join(old[a:b]), between.join(new[c:d]), *around


def _change(old: str, new: str, before: str = "", after: str = "") -> dict[str, str]:
    same = agreement(old, new)
    end = agreement(old[same:][::-1], new[same:][::-1])
    return {
        "before": (before + old[:same])[-_CONTEXT:],
        "removed": _short(old[same : len(old) - end]),
        "added": _short(new[same : len(new) - end]),
        "after": (old[len(old) - end :] + after)[:_CONTEXT],
    }


def agreement(a: str, b: str) -> int:
    """How many characters two texts have in common at their beginnings."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} [...] {text[-_LONGEST // 2 :]}"
