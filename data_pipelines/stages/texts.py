"""A batch of texts as one buffer of bytes, and what several stages want to know of it, computed once.

Every document ends with a line feed that is not its own, so that words and lines never cross documents.
"""

import functools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipelines.stages import alphabet, splitting
from data_pipelines.stages.ranges import Ranges, Ranks
from slmjax.config.filters import Splitter

_PADDING = b"\n" * 8  # so that eight bytes can be read from any position


class Lines(Ranges):
    """Lines, without their line feeds."""


class Texts:
    """Documents in order. Positions are those of bytes in `raw`.

    Attributes:
      array: the documents.
      raw: all of them in UTF-8, each with a line feed after it, and padding.
      data: the same as uint8.
      starts, ends: of each document, without its line feed.
    """

    def __init__(self, array: pa.Array):
        joined = pc.call_function("binary_join_element_wise", [array, pa.scalar(""), pa.scalar("\n")])
        offsets = np.frombuffer(joined.buffers()[1], np.int32)[joined.offset : joined.offset + len(joined) + 1]
        offsets = offsets.astype(np.int64)
        content = joined.buffers()[2]
        self.array = array
        self.raw = (content.to_pybytes()[offsets[0] : offsets[-1]] if content else b"") + _PADDING
        self.data = np.frombuffer(self.raw, np.uint8)
        self.starts = offsets[:-1] - offsets[0]
        self.ends = offsets[1:] - offsets[0] - 1

    @classmethod
    def of(cls, strings: Sequence[str | bytes]) -> "Texts":
        """Texts from strings, or from UTF-8."""
        return cls(pa.array(strings, pa.string()))

    def __len__(self) -> int:
        return len(self.array)

    def replaced(self, edits: Sequence[tuple[int, int, bytes]]) -> "Texts":
        """Texts in which other bytes stand between each start and end, in order; these do not overlap."""
        if not edits:
            return self
        pieces, position = [], 0
        for start, end, replacement in edits:
            pieces += [self.raw[position:start], replacement]
            position = end
        raw = b"".join([*pieces, self.raw[position:]])
        added = np.cumsum([0] + [len(replacement) - (end - start) for start, end, replacement in edits])
        starts, ends = (
            (edges + added[np.searchsorted([start for start, _, _ in edits], edges)]).tolist()
            for edges in (self.starts, self.ends)
        )
        return Texts.of([raw[start:end] for start, end in zip(starts, ends, strict=True)])

    @functools.cached_property
    def strings(self) -> list[str]:
        """The documents as strings."""
        return self.array.to_pylist()

    @functools.cached_property
    def num_bytes(self) -> int:
        """Length of `raw` without the padding."""
        return len(self.raw) - len(_PADDING)

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
        """uint8 of each byte: other flags, such as `alphabet.TERMINAL`."""
        return alphabet.flags(self.raw, self.beyond, alphabet.MARKS)

    @functools.cached_property
    def _characters(self) -> Ranks:
        return Ranks((self.data & 0xC0) != 0x80)

    def chars(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Number of characters from starts to ends."""
        return ends - starts if self.is_ascii else self._characters.count(starts, ends)

    @functools.cached_property
    def num_chars(self) -> np.ndarray:
        """Characters of each document."""
        return self.chars(self.starts, self.ends)

    def count(self, flags: np.ndarray) -> np.ndarray:
        """How many of `flags`, one for each byte, are set in each document."""
        return Ranks(flags).count(self.starts, self.ends)

    @functools.cached_property
    def lines(self) -> Lines:
        """Parts between line feeds: the last one of a document is empty where the document ends with one."""
        ends = np.flatnonzero(self.data[: self.num_bytes] == 10)
        return Lines(self, np.append(0, ends[:-1] + 1) if len(ends) else ends, ends)

    @functools.cached_property
    def _split(self) -> dict[str, Ranges]:
        return {}

    def words(self, splitter: Splitter) -> Ranges:
        """The words of all documents."""
        if splitter not in self._split:
            self._split[splitter] = splitting.words(self, splitter)
        return self._split[splitter]
