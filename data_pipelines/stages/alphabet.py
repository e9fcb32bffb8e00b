"""What characters are, as a byte of flags for every byte of UTF-8 text."""

import dataclasses
import functools
import unicodedata
from collections.abc import Callable

import numpy as np

CONTINUES = 128  # of both tables: not the first byte of its character

# KINDS. The names are those of str.isspace, str.splitlines, str.isalpha, str.isdigit and the regular expression \w.
SPACE, BREAK, LETTER, DIGIT, WORD = 1, 2, 4, 8, 16
MEANING = 32  # not one of the symbols that datatrove takes for no part of a word
IDEOGRAPH = 64  # of a script without spaces between words

# MARKS
TERMINAL = 1  # ends a line well (FineWeb)
STOP = 2  # ends a sentence
PUNCTUATION = 4  # of a Unicode category P
CLOSING = 8  # may stand between the end of a sentence and the next
UPPER = 16  # str.isupper

_BREAKS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
_CLOSING = "\"')]}»”’"  # noqa: RUF001
_SYMBOLS = (
    "0-8 b-1f 21-2f 3a-40 5b-60 7b-9f ab b4 bb 2013-2014 2019 201c-201e 2026 2236 2501 25ba 3001-3002 3008-300d "
    "3010-3011 ff01 ff05 ff08-ff09 ff0c ff0e ff11 ff1a-ff1b ff1f ff5e"
)
# Ends of sentences in all scripts, most with the Unicode property Sentence_Terminal.
_STOPS = (
    "21 2e 3f 589 61f 6d4 700-702 7f9 964-965 104a-104b 1362 1367-1368 166e 1735-1736 1803 1809 1944-1945 1aa8-1aab "
    "1b5a-1b5b 1b5e-1b5f 1c3b-1c3c 1c7e-1c7f 203c-203d 2047-2049 2e2e 2e3c 3002 a4ff a60e-a60f a6f3 a6f7 a876-a877 "
    "a8ce-a8cf a92f a9c8-a9c9 aa5d-aa5f aaf0-aaf1 abeb fe52 fe56-fe57 ff01 ff0e ff1f ff61 10a56-10a57 11047-11048 "
    "110be-110c1 11141-11143 111c5-111c6 111cd 111de-111df 11238-11239 1123b-1123c 112a9 1144b-1144c 115c2-115c3 "
    "115c9-115d7 11641-11642 1173c-1173e 11a42-11a43 11a9b-11a9c 11c41-11c42 16a6e-16a6f 16af5 16b37-16b38 16b44 1bc9f "
    "1da88"
)
_OTHER_TERMINALS = (
    "61d-61e 837 839 83d-83e 17d4-17d6 17d9-17da 1b7d-1b7e 2e53-2e54 10f55-10f59 10f86-10f89 11944 11946 11ef7-11ef8 "
    "11f43-11f44 16e98"
)
# Han, its extensions and compatibility forms, kana, bopomofo; Thai, Lao, Khmer, Myanmar.
_IDEOGRAPHS = (
    "e01-e3a e40-e4e e81-eb0 ebd-ec6 1000-102a 1780-17a2 3005-3007 3041-3096 309d-309f 30a1-30fa 30fc-30ff 3105-312f "
    "31a0-31bf 31f0-31ff 3400-4dbf 4e00-9fff f900-faff ff66-ff9d 20000-3347f"
)
_TABLED = 0x33480  # beyond are tags, variation selectors and private use


def _code_points(ranges: str) -> frozenset[int]:
    edges = [[int(edge, 16) for edge in part.split("-")] for part in ranges.split()]
    return frozenset(point for edge in edges for point in range(edge[0], edge[-1] + 1))


def _kinds() -> Callable[[int], int]:
    symbols = _code_points(_SYMBOLS) | _code_points(_STOPS) | _code_points(_OTHER_TERMINALS)
    ideographs = _code_points(_IDEOGRAPHS)

    def flags(point: int) -> int:
        character = chr(point)
        word = character.isalnum() or character == "_" or unicodedata.category(character)[0] == "M"
        return (
            SPACE * character.isspace()
            | BREAK * (character in _BREAKS)
            | LETTER * character.isalpha()
            | DIGIT * character.isdigit()
            | WORD * word
            | MEANING * (point not in symbols and not character.isspace())
            | IDEOGRAPH * (point in ideographs)
        )

    return flags


def _marks() -> Callable[[int], int]:
    stops = _code_points(_STOPS)
    terminals = stops | _code_points(_OTHER_TERMINALS)

    def flags(point: int) -> int:
        character = chr(point)
        return (
            TERMINAL * (point in terminals)
            | STOP * (point in stops)
            | PUNCTUATION * (unicodedata.category(character)[0] == "P")
            | CLOSING * (character in _CLOSING)
            | UPPER * character.isupper()
        )

    return flags


@dataclasses.dataclass(frozen=True)
class Alphabet:
    """Flags of every character; `make` gives the function from a code point to its flags."""

    make: Callable[[], Callable[[int], int]]

    @functools.cached_property
    def ascii(self) -> bytes:
        """Of the bytes below 128; 0 for the others."""
        flags = self.make()
        return bytes(flags(point) if point < 128 else 0 for point in range(256))

    @functools.cached_property
    def all(self) -> np.ndarray:
        """Of all code points below `_TABLED`, and 0 for the others."""
        return np.append(np.fromiter(map(self.make(), range(_TABLED)), np.uint8, _TABLED), np.uint8(0))


KINDS = Alphabet(_kinds)
MARKS = Alphabet(_marks)


@dataclasses.dataclass(frozen=True)
class Beyond:
    """The characters beyond ASCII of a text: where each starts, how many bytes it has and its code point."""

    positions: np.ndarray
    sizes: np.ndarray
    points: np.ndarray

    @classmethod
    def of(cls, data: np.ndarray) -> "Beyond":
        """Decodes those of valid UTF-8, in which any three bytes may be read after a character's first."""
        positions = np.flatnonzero(data >= 0xC0)
        first = data[positions]
        sizes = 2 + (first >= 0xE0).astype(np.int64) + (first >= 0xF0)
        points = first.astype(np.int64) & (0x7F >> sizes)
        for i in range(1, 4):
            more = sizes > i
            following = (points << 6) | (data[np.where(more, positions + i, positions)] & 0x3F)
            points = np.where(more, following, points)
        return cls(positions, sizes, points)


def flags(raw: bytes, beyond: Beyond | None, alphabet: Alphabet) -> np.ndarray:
    """uint8 flags of each byte's character; with CONTINUES on all but its first. `beyond` is None for ASCII."""
    known = np.frombuffer(raw.translate(alphabet.ascii), np.uint8)
    if beyond is None:
        return known
    known = known.copy()
    values = alphabet.all[np.minimum(beyond.points, _TABLED)]
    known[beyond.positions] = values
    for i in range(1, 4):
        more = beyond.sizes > i
        known[beyond.positions[more] + i] = values[more] | CONTINUES
    known.flags.writeable = False  # as those of ASCII
    return known


def flags_at(data: np.ndarray, positions: np.ndarray, beyond: Beyond | None, alphabet: Alphabet) -> np.ndarray:
    """uint8 flags of the characters that stand at some positions, without CONTINUES."""
    values = data[positions]
    found = np.frombuffer(alphabet.ascii, np.uint8)[values]
    others = np.flatnonzero(values >= 0x80)
    if beyond is not None and len(others):
        characters = np.searchsorted(beyond.positions, positions[others], side="right") - 1
        found[others] = alphabet.all[np.minimum(beyond.points[characters], _TABLED)]
    return found
