"""Which kinds of characters a document is made of."""

import re
import string

import pyarrow as pa

_LETTERS = string.ascii_letters.encode()
_DIGITS = string.digits.encode()
_WHITE_SPACE = string.whitespace.encode()
_NOT_ASCII = re.compile("[^\x00-\x7f]+")


def measure(texts: list[str]) -> dict[str, pa.Array]:
    """Shares of letters and of ASCII digits among what is not white space; hash signs and ellipses for every word."""
    rows = [_measure(text) for text in texts]
    names = ("alphabetic_share", "digit_share", "symbols_per_word")
    return {name: pa.array([row[i] for row in rows], pa.float64()) for i, name in enumerate(names)}


def _measure(text: str) -> tuple[float, float, float]:
    # Deleting bytes is two orders of magnitude faster than looking at characters, so only the others are looked at.
    ascii_bytes = text.encode("ascii", "ignore")
    others = "" if text.isascii() else "".join(_NOT_ASCII.findall(text))
    visible = len(ascii_bytes.translate(None, _WHITE_SPACE)) + sum(not c.isspace() for c in others)
    letters = len(ascii_bytes) - len(ascii_bytes.translate(None, _LETTERS)) + sum(map(str.isalpha, others))
    digits = len(ascii_bytes) - len(ascii_bytes.translate(None, _DIGITS))
    symbols = text.count("#") + text.count("...") + text.count("…")
    return letters / max(visible, 1), digits / max(visible, 1), symbols / max(len(text.split()), 1)
