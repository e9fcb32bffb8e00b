"""What tells two texts apart, word by word, round the first place where they differ."""

import difflib
import re
from typing import Literal

_WORD = re.compile(r"\s+|\w+|[^\w\s]")
_WORDS = 250  # compared
_BEFORE = 30  # of them before the first difference

Change = tuple[Literal["same", "removed", "added"], str]


def compare(old: str, new: str) -> list[Change]:
    """Changes that make a part of one text that of the other; all "same" where they begin alike and end."""
    a, b = _WORD.findall(old), _WORD.findall(new)
    first = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    start = max(0, first - _BEFORE) if first < max(len(a), len(b)) else 0
    a, b = a[start : start + _WORDS], b[start : start + _WORDS]
    changes: list[Change] = [("same", "… ")] if start else []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind == "equal":
            changes.append(("same", "".join(a[i:j])))
            continue
        if i < j:
            changes.append(("removed", "".join(a[i:j])))
        if k < m:
            changes.append(("added", "".join(b[k:m])))
    return changes


def resemblance(a: str, b: str, *, ngram: int) -> float:
    """Jaccard similarity of the n-grams of two texts, words being letters and digits in a row."""
    found = []
    for text in (a, b):
        words = re.findall(r"\w+", text.lower())
        found.append({tuple(words[i : i + ngram]) for i in range(max(len(words) - ngram, 0) + 1)})
    return len(found[0] & found[1]) / len(found[0] | found[1])
