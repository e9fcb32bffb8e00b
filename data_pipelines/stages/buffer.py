"""Texts as one buffer of bytes, and what characters they are made of.

A line feed that is no document's own stands before the first and after every one, so that words and lines never cross
documents and every position has one before it.
"""

import functools

import numpy as np

from data_pipelines.stages import alphabet
from data_pipelines.stages.ranks import Ranks


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

    @functools.cached_property
    def continuing(self) -> Ranks | None:
        """The bytes after the first of a character; None where there are none."""
        return None if self.is_ascii else Ranks((self.data & 0xC0) == 0x80)

    def chars(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Number of characters from starts to ends."""
        return ends - starts if self.continuing is None else ends - starts - self.continuing.count(starts, ends)

    @functools.cached_property
    def num_chars(self) -> np.ndarray:
        """Characters of each document."""
        return self.chars(self.starts, self.ends)

    def count(self, flags: np.ndarray) -> np.ndarray:
        """How many of `flags`, one for each byte, are set in each document."""
        return Ranks(flags).count(self.starts, self.ends)

    def count_kind(self, kind: int) -> np.ndarray:
        """Characters of each document with a flag of `kinds`."""
        return self.count((self.kinds & (kind | alphabet.CONTINUES)) == kind)

    @functools.cached_property
    def hash_signs(self) -> np.ndarray:
        """Number of # in each document."""
        return self.count(self.data == ord("#"))

    @functools.cached_property
    def ellipses(self) -> np.ndarray:
        """Number of ... and of U+2026 in each document; six full stops are two."""
        stops = np.flatnonzero(self.data == ord("."))
        runs = np.append(0, np.flatnonzero(stops[1:] != stops[:-1] + 1) + 1)[: len(stops)]
        threes = np.diff(np.append(runs, len(stops))) // 3
        at = [np.repeat(stops[runs], threes)]
        if self.beyond is not None:
            at.append(self.beyond.positions[self.beyond.points == ord("…")])
        return np.bincount(np.searchsorted(self.starts, np.concatenate(at), side="right") - 1, minlength=len(self))

    @functools.cached_property
    def digits(self) -> tuple[np.ndarray, np.ndarray]:
        """Starts and ends of ASCII digits in a row."""
        digit = (self.data - np.uint8(ord("0"))) < 10
        changes = np.zeros(len(digit), bool)
        np.not_equal(digit[1:], digit[:-1], out=changes[1:])
        edges = np.flatnonzero(changes)
        return edges[0::2], edges[1::2]
