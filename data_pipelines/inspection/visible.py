"""Text from anywhere, made safe for a terminal: nothing in it can move the cursor, change colours or turn the line."""

import unicodedata

_SHOWN = {"\n": "↵", "\t": "⇥"}
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # controls, formats, surrogates, private, unassigned, separators


def visible(text: object) -> str:
    r"""The text on one line: line feeds as ↵, tabs as ⇥, other characters that are not seen as \x1b or \u202e."""
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    return "".join(_SHOWN.get(each) or (_escaped(each) if _is_unseen(each) else each) for each in text)


def _is_unseen(character: str) -> bool:
    return unicodedata.category(character) in _UNSEEN


def _escaped(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}" if number < 65536 else f"\\U{number:08x}"
