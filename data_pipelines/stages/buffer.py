"""Texts as one buffer of bytes, and what characters they are made of.

A line feed that is no document's own stands before the first and after every one, so that words and lines never cross
documents and every position has one before it.
"""

import functools

import numpy as np

from data_pipelines.stages import alphabet
from data_pipelines.stages.compiled import compiled
from data_pipelines.stages.counting import count


class Buffer:
    """Documents in order. Positions are those of bytes in `raw`.

    Attributes:
      raw: all of them in UTF-8, with line feeds between them and padding.
      data: the same as uint8.
      starts, ends: of each document, without its line feed.
    """

    def __init__(self, raw: bytes, starts: np.ndarray, ends: np.ndarray):
        self.raw = raw
        self.data = np.frombuffer(raw, np.uint8)
        self.starts = starts
        self.ends = ends

    def __len__(self) -> int:
        return len(self.starts)

    @functools.cached_property
    def num_bytes(self) -> int:
        """Length of `raw` without the padding."""
        return int(self.ends[-1]) + 1 if len(self) else 1

    @functools.cached_property
    def is_ascii(self) -> bool:
        """Whether all characters are ASCII."""
        return self.raw.isascii()

    @functools.cached_property
    def beyond(self) -> alphabet.Beyond | None:
        """The characters beyond ASCII, None where there are none."""
        return None if self.is_ascii else alphabet.Beyond.of(self.data)

    @functools.cached_property
    def lower(self) -> bytes:
        """`raw` with ASCII letters in lower case."""
        return self.raw.lower()

    @functools.cached_property
    def kinds(self) -> np.ndarray:
        """uint8 of each byte: flags of its character, such as `alphabet.SPACE`, and CONTINUES after its first byte."""
        return alphabet.flags(self.raw, self.beyond, alphabet.KINDS)

    @functools.cached_property
    def marks(self) -> np.ndarray:
        """uint8 of each byte: other flags of its character, such as `alphabet.TERMINAL`."""
        return alphabet.flags(self.raw, self.beyond, alphabet.MARKS)

    def marks_at(self, positions: np.ndarray) -> np.ndarray:
        """`marks` of some positions, without CONTINUES."""
        return alphabet.flags_at(self.data, positions, self.beyond, alphabet.MARKS)

    def chars(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Number of characters from starts to ends."""
        if self.beyond is None:
            return ends - starts
        return _chars(self.beyond.positions, self.beyond.sizes, starts, ends)

    @functools.cached_property
    def num_chars(self) -> np.ndarray:
        """Characters of each document."""
        return self.chars(self.starts, self.ends)

    def count_kind(self, kind: int) -> np.ndarray:
        """Characters of each document with a flag of `kinds`."""
        return count(self.kinds, kind | alphabet.CONTINUES, kind, self.starts, self.ends)

    @functools.cached_property
    def hash_signs(self) -> np.ndarray:
        """Number of # in each document."""
        return count(self.data, 0xFF, ord("#"), self.starts, self.ends)

    @functools.cached_property
    def ellipses(self) -> np.ndarray:
        """Number of ... and of U+2026 in each document; six full stops are two."""
        number = _threes(self.data, np.uint8(ord(".")), self.starts, self.ends)
        if self.beyond is not None:
            at = self.beyond.positions[self.beyond.points == ord("…")]
            number += np.bincount(np.searchsorted(self.starts, at, side="right") - 1, minlength=len(self))
        return number


@compiled
def _chars(positions, sizes, starts, ends):
    """Characters from starts to ends, of which those beyond ASCII have some positions and sizes in bytes."""
    chars = np.empty(len(starts), np.int64)
    index, before = 0, 0
    for i in range(len(starts)):
        start, end = starts[i], ends[i]
        if start < before:
            index = np.searchsorted(positions, start)
        while index < len(positions) and positions[index] < start:
            index += 1
        number = end - start
        while index < len(positions) and positions[index] < end:
            number -= sizes[index] - 1
            index += 1
        chars[i] = number
        before = end
    return chars


@compiled
def _threes(data, byte, starts, ends):
    """How often a byte stands three times in a row."""
    number = np.zeros(len(starts), np.int64)
    for document in range(len(starts)):
        part, at = data[starts[document] : ends[document]], 0
        while at + 2 < len(part):
            if part[at + 2] != byte:
                at += 3
            elif part[at + 1] != byte:
                at += 2
            elif part[at] != byte:
                at += 1
            else:
                number[document] += 1
                at += 3
    return number
