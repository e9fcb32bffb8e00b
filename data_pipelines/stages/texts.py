"""A batch of texts: its words, lines and paragraphs, found once for all stages that want them."""

import functools
from collections.abc import Mapping, Sequence
from typing import assert_never

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipelines.stages import alphabet, splitting
from data_pipelines.stages.buffer import Buffer
from data_pipelines.stages.compiled import compiled
from data_pipelines.stages.counting import count
from data_pipelines.stages.ranges import Ranges, Words, powers
from slmjax.config.filters import Splitter

_PADDING = b"\n" * 8  # so that eight bytes can be read from any position
_LINE, _PLACE = np.uint64(0xE7037ED1A0B428DB), np.uint64(0x3C6EF372FE94F82A)  # odd, even
_MIX, _ONE = np.uint64(0x9E3779B97F4A7C15), np.uint64(1)
_SHIFTS = np.uint64(29), np.uint64(31)
_SPACE, _FEED = ord(" "), ord("\n")
_RARE_BYTES = 6  # a word as long as that is rare
_FREQUENT = b" etaoinsrhldcumfpgwybvkxjqz"  # in English, the most frequent first


def _padded(contents: Sequence[bytes | memoryview]) -> bytes:
    """A line feed, the contents, of which the last one ends with a line feed, and more line feeds."""
    return b"".join([b"\n", *contents, _PADDING])


class Lines(Ranges):
    """Lines, without the line feeds after them."""

    def __init__(self, texts: "Texts", starts: np.ndarray, ends: np.ndarray):
        super().__init__(texts, starts, ends)
        self.texts: Texts = texts

    @functools.cached_property
    def first_word(self) -> np.ndarray:
        """Index of the first word, separated by white space, that starts in each line or after it."""
        return self.texts.words("whitespace").index(self.starts)

    @functools.cached_property
    def num_words(self) -> np.ndarray:
        """Words in each line; a blank line has none."""
        words = self.texts.words("whitespace")
        return np.diff(self.first_word, append=words.index(self.ends[-1:]))

    @functools.cached_property
    def hashes(self) -> np.ndarray:
        """uint64 hash of the bytes of each line, from those of its words and their places in it."""
        words = self.texts.words("whitespace")
        which = (words.starts, words.ends, words.hashes, self.first_word, self.num_words)
        hashes, spaced = _line_hashes(self.texts.data, self.starts, self.ends, *which)
        # Other white space than spaces is something to tell lines by.
        odd = np.flatnonzero(~spaced)
        hashes[odd] = Ranges(self.texts, self.starts[odd], self.ends[odd]).hashes
        return hashes

    @functools.cached_property
    def chars(self) -> np.ndarray:
        """Characters in each line."""
        return self.texts.chars(self.starts, self.ends)

    @functools.cached_property
    def stripped(self) -> Ranges:
        """The lines without white space around them; of blank ones nothing is left."""
        words, blank = self.texts.words("whitespace"), self.num_words == 0
        first = np.minimum(self.first_word, len(words) - 1)
        last = np.maximum(first + self.num_words - 1, 0)
        if len(words) == 0:
            return Ranges(self.texts, self.starts, self.starts)
        starts = np.where(blank, self.starts, words.starts[first])
        return Ranges(self.texts, starts, np.where(blank, starts, words.ends[last]))

    def start_with(self, prefixes: Sequence[str]) -> np.ndarray:
        """Whether each line, stripped, starts with one of the strings."""
        data, starts, found = self.texts.data, self.stripped.starts, np.zeros(len(self), bool)
        first = data[starts]
        for prefix in (text.encode() for text in prefixes):
            rows = np.flatnonzero(first == prefix[0])
            rows = rows[starts[rows] + len(prefix) <= self.ends[rows]]
            for i, byte in enumerate(prefix[1:], start=1):
                rows = rows[data[starts[rows] + i] == byte]
            found[rows] = True
        return found

    def end_with(self, suffixes: Sequence[str]) -> np.ndarray:
        """Whether each line, stripped, ends with one of the strings."""
        data, inner, found = self.texts.data, self.stripped, np.zeros(len(self), bool)
        last = data[inner.ends - 1]
        for suffix in (text.encode() for text in suffixes):
            rows = np.flatnonzero(last == suffix[-1])
            rows = rows[inner.bytes[rows] >= len(suffix)]
            for i, byte in enumerate(reversed(suffix[:-1]), start=2):
                rows = rows[data[inner.ends[rows] - i] == byte]
            found[rows] = True
        return found

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Index of the line that holds each position."""
        return np.searchsorted(self.starts, positions, side="right") - 1

    def have(self, character: str) -> np.ndarray:
        """Whether each line has an ASCII character."""
        found = np.zeros(len(self), bool)
        found[self.at(np.flatnonzero(self.texts.data == ord(character)))] = True
        return found

    def have_kind(self, kind: int) -> np.ndarray:
        """Whether each line has a character with a flag of `kinds`."""
        return count(self.texts.kinds, kind, kind, self.starts, self.ends) > 0

    def contain(self, phrases: Sequence[str]) -> np.ndarray:
        """Whether each line has one of the phrases in it, the case of ASCII letters aside."""
        found, lower = np.zeros(len(self), bool), self.texts.lower
        data = np.frombuffer(lower, np.uint8)
        for anchor, wanted in _anchors(tuple(phrases)).items():
            for line in np.unique(self.at(_positions(data, anchor))).tolist():
                content = lower[self.starts[line] : self.ends[line]]
                found[line] |= any(phrase in content for phrase in wanted)
        return found


class Paragraphs(Lines):
    """Lines in a row."""

    @functools.cached_property
    def hashes(self) -> np.ndarray:
        """uint64 hash of the bytes of each paragraph, from those of its lines."""
        data, lines = self.texts.data, self.texts.lines
        first = lines.at(self.starts)
        counts = lines.at(self.ends) - first + 1
        begins = np.cumsum(counts) - counts
        number = np.arange(int(counts.sum())) - np.repeat(begins, counts)
        parts = lines.hashes[np.repeat(first, counts) + number] * powers(int(counts.max(initial=0)) + 1)[number]
        hashes = np.add.reduceat(parts, begins) if len(self) else np.zeros(0, np.uint64)
        # Those from which white space was taken are not made of whole lines here; by themselves they are.
        odd = np.flatnonzero((data[self.starts - 1] != ord("\n")) | (data[self.ends] != ord("\n")))
        if len(odd):
            alone = Texts.of(self.strings(odd))
            hashes[odd] = Paragraphs(alone, alone.starts, alone.ends).hashes
        return hashes


def _positions(data: np.ndarray, content: bytes) -> np.ndarray:
    """Where `content` starts in some bytes, by its rarest byte first: several times as fast as bytes.find."""
    order = sorted(range(len(content)), key=lambda i: _FREQUENT.find(content[i]) % len(_FREQUENT), reverse=True)
    positions = np.flatnonzero(data == content[order[0]]) - order[0]
    positions = positions[(positions >= 0) & (positions <= len(data) - len(content))]
    for i in order[1:]:
        positions = positions[data[positions + i] == content[i]]
    return positions


@functools.cache
def _anchors(phrases: tuple[str, ...]) -> dict[bytes, tuple[bytes, ...]]:
    """Phrases by a part of each: as few parts as will do, since every one is looked for in all of the text."""
    left = {phrase.lower().encode() for phrase in phrases}
    anchors: dict[bytes, tuple[bytes, ...]] = {}
    while left:
        parts = left | {word for phrase in left for word in phrase.split() if len(word) >= _RARE_BYTES}
        best = max(sorted(parts), key=lambda part: (sum(part in phrase for phrase in left), len(part)))
        anchors[best] = tuple(sorted(phrase for phrase in left if best in phrase))
        left -= set(anchors[best])
    return anchors


class Texts(Buffer):
    """Documents in order, and what they consist of."""

    # Of the words that white space separates, where they are known from the texts that these were made of.
    _word_hashes: np.ndarray | None = None

    @classmethod
    def from_array(cls, array: pa.Array) -> "Texts":
        """Texts from a column of strings."""
        joined = pc.call_function("binary_join_element_wise", [array, pa.scalar(""), pa.scalar("\n")])
        offsets = np.frombuffer(joined.buffers()[1], np.int32)[joined.offset : joined.offset + len(joined) + 1]
        offsets = offsets.astype(np.int64)
        content = memoryview(joined.buffers()[2] or b"")[offsets[0] : offsets[-1]]
        texts = cls(_padded([content]), offsets[:-1] - offsets[0] + 1, offsets[1:] - offsets[0])
        texts.array = array
        return texts

    @classmethod
    def of(cls, strings: Sequence[str]) -> "Texts":
        """Texts from strings."""
        return cls.from_array(pa.array(strings, pa.string()))

    def replaced(self, edits: Sequence[tuple[int, int, bytes]]) -> "Texts":
        """Texts in which other bytes stand between each start and end, in order; these do not overlap."""
        if not edits:
            return self
        pieces, position = [], 1
        for start, end, replacement in edits:
            pieces += [self.raw[position:start], replacement]
            position = end
        raw = _padded([*pieces, self.raw[position : self.num_bytes]])
        begins = np.array([start for start, _, _ in edits])
        added = np.append(0, np.cumsum([len(replacement) - (end - start) for start, end, replacement in edits]))
        starts, ends = (edges + added[begins.searchsorted(edges)] for edges in (self.starts, self.ends))
        return Texts(raw, starts, ends)

    def of_lines(self, lines: Ranges, chosen: np.ndarray, contents: Mapping[int, bytes]) -> "Texts":
        """Texts of the lines that are chosen, of which some have other contents."""
        rows = np.flatnonzero(chosen)
        number = np.bincount(lines.document[rows], minlength=len(self))
        (empty,) = np.nonzero(number == 0)  # a document without lines is one with an empty one
        order = np.argsort(np.concatenate([lines.document[rows], empty]), kind="stable")
        starts, ends = (
            np.concatenate([edges[rows], self.starts[empty]])[order] for edges in (lines.starts, lines.ends)
        )
        rows = np.concatenate([rows, np.full(len(empty), -1)])[order]
        # Those with other contents lie, so to speak, behind all of the data.
        changed = np.flatnonzero(np.isin(rows, list(contents)))
        others = [contents[row] for row in rows[changed].tolist()]
        edges = len(self.data) + np.append(0, np.cumsum([len(content) for content in others], dtype=np.int64))
        starts[changed], ends[changed] = edges[:-1], edges[1:]
        others = np.frombuffer(b"".join(others), np.uint8)
        after = np.cumsum(ends - starts + 1)
        raw = _joined(self.data, others, starts, ends, len(_PADDING)).tobytes()
        ends = after[np.cumsum(np.maximum(number, 1)) - 1]
        texts = Texts(raw, np.append(1, ends[:-1] + 1)[: len(self)], ends)
        texts._word_hashes = self._hashes_in(lines, rows[rows >= 0], contents)
        return texts

    def _hashes_in(self, lines: Ranges, rows: np.ndarray, contents: Mapping[int, bytes]) -> np.ndarray:
        """Hashes of the words, separated by white space, of some lines, of which some have other contents."""
        words = self.words("whitespace")
        first, hashes = words.index(lines.starts[rows]), words.hashes
        number = words.index(lines.ends[rows]) - first
        if contents:
            other = Texts.of([content.decode() for content in contents.values()]).words("whitespace")
            changed = np.flatnonzero(np.isin(rows, list(contents)))
            which = {row: i for i, row in enumerate(contents)}
            there = [which[row] for row in rows[changed].tolist()]
            first[changed], number[changed] = len(hashes) + other.first[there], other.per_document[there]
            hashes = np.concatenate([hashes, other.hashes])
        return _parts(hashes, first, number)

    @functools.cached_property
    def array(self) -> pa.Array:
        """The documents as a column of strings."""
        edges = zip(self.starts.tolist(), self.ends.tolist(), strict=True)
        content = pa.py_buffer(b"".join([self.raw[start:end] for start, end in edges]))
        offsets = np.append(0, np.cumsum(self.ends - self.starts)).astype(np.int32)
        return pa.StringArray.from_buffers(len(self), pa.py_buffer(offsets), content)

    @functools.cached_property
    def strings(self) -> list[str]:
        """The documents as strings."""
        return self.array.to_pylist()

    @functools.cached_property
    def lines(self) -> Lines:
        """Parts between line feeds: the last one of a document is empty where the document ends with one."""
        return Lines(self, self._feeds[:-1] + 1, self._feeds[1:])

    @functools.cached_property
    def _feeds(self) -> np.ndarray:
        """Positions of line feeds, but those of the padding."""
        return np.flatnonzero(self.data == ord("\n"))[: -len(_PADDING)]

    @functools.cached_property
    def text_lines(self) -> Lines:
        """Lines as str.splitlines finds them, at other characters too; but see `num_text_lines`."""
        starts, ends = self.lines.starts, self.lines.ends
        breaks = (self.kinds & (alphabet.BREAK | alphabet.CONTINUES)) == alphabet.BREAK
        others = np.flatnonzero(breaks & (self.data != ord("\n")))
        if len(others) == 0:
            return self.lines
        sizes = np.array([1, 1, 2, 3])[np.digitize(self.data[others], [0x80, 0xC0, 0xE0])]
        pairs = (self.data[others] == ord("\r")) & (self.data[others + 1] == ord("\n"))
        pairs &= ~np.isin(others + 1, self.ends)
        starts = np.sort(np.concatenate([starts, (others + sizes)[~pairs]]))
        # The line before a pair ends at its first character.
        return Lines(self, starts, np.sort(np.concatenate([np.setdiff1d(ends, others[pairs] + 1), others])))

    @functools.cached_property
    def _ends_with_break(self) -> np.ndarray:
        last = self.text_lines.first[1:] - 1
        return self.text_lines.starts[last] == self.text_lines.ends[last]

    @functools.cached_property
    def after_text_lines(self) -> np.ndarray:
        """Index of the last of the `text_lines` of a document where it is none to str.splitlines, being empty."""
        return self.text_lines.first[1:][self._ends_with_break] - 1

    @functools.cached_property
    def num_text_lines(self) -> np.ndarray:
        """How many lines of each document str.splitlines finds: an empty one at the end is none."""
        return self.text_lines.per_document - self._ends_with_break

    @functools.cached_property
    def paragraphs(self) -> Paragraphs:
        """Parts of each document, stripped, between two or more line feeds; one at least."""
        words = self.words("whitespace")
        blank = words.per_document == 0
        first = words.starts[np.minimum(words.first[:-1], len(words) - 1)] if len(words) else self.starts
        last = words.ends[np.maximum(words.first[1:] - 1, 0)] if len(words) else self.starts
        starts, ends = np.where(blank, self.starts, first), np.where(blank, self.starts, last)
        # Where a line feed stands alone, the paragraph goes on.
        joined = np.diff(self._feeds) == 1
        begin = self._feeds[1:][joined & ~np.append(joined[1:], False)] + 1
        end = self._feeds[:-1][joined & ~np.append(False, joined[:-1])]
        document = np.searchsorted(self.starts, begin, side="right") - 1
        begin = begin[(document >= 0) & (begin > starts[document]) & (begin < ends[document])]
        document = np.searchsorted(self.starts, end, side="right") - 1
        end = end[(document >= 0) & (end > starts[document]) & (end < ends[document])]
        return Paragraphs(self, np.sort(np.concatenate([starts, begin])), np.sort(np.concatenate([ends, end])))

    @functools.cached_property
    def _split(self) -> dict[str, Words]:
        return {}

    def words(self, splitter: Splitter) -> Words:
        """The words of all documents."""
        if splitter not in self._split:
            self._split[splitter] = self._find_words(splitter)
        return self._split[splitter]

    def _find_words(self, splitter: Splitter) -> Words:
        match splitter:
            case "whitespace":
                words = splitting.whitespace(self)
                if self._word_hashes is not None:
                    assert len(self._word_hashes) == len(words)
                    words.hashes = self._word_hashes
                return words
            case "unicode":
                return splitting.unicode(self)
            case "datatrove":
                return splitting.datatrove(self.words("whitespace"))
            case _:
                assert_never(splitter)


@compiled
def _line_hashes(data, starts, ends, word_starts, word_ends, word_hashes, first_word, num_words):
    """Of each line a hash, from those of its words and their places in it, and whether all between them are spaces."""
    hashes, spaced = np.empty(len(starts), np.uint64), np.empty(len(starts), np.bool_)
    for line in range(len(starts)):
        total = np.uint64(0)
        reached, only = starts[line], True
        for word in range(first_word[line], first_word[line] + num_words[line]):
            for at in range(reached, word_starts[word]):
                only &= data[at] == _SPACE
            reached = word_ends[word]
            # Places in the line become odd factors.
            part = np.uint64(word_starts[word] - starts[line]) * _PLACE + _ONE
            part *= word_hashes[word]
            total += part ^ (part >> _SHIFTS[0])
        for at in range(reached, ends[line]):
            only &= data[at] == _SPACE
        spaced[line] = only
        value = (np.uint64(ends[line] - starts[line]) * _LINE + total * _LINE) * _MIX
        hashes[line] = value ^ (value >> _SHIFTS[1])
    return hashes, spaced


@compiled
def _parts(values, first, number):
    """Some values in a row from each of `first`, all together."""
    parts = np.empty(number.sum(), values.dtype)
    at = 0
    for i in range(len(first)):
        parts[at : at + number[i]] = values[first[i] : first[i] + number[i]]
        at += number[i]
    return parts


@compiled
def _joined(data, others, starts, ends, padding):
    """A line feed, lines with line feeds after them, and padding; of `others` are those that start after all data."""
    joined = np.full(1 + (ends - starts).sum() + len(starts) + padding, _FEED, np.uint8)
    at = 1
    for line in range(len(starts)):
        start, length = starts[line], ends[line] - starts[line]
        if start < len(data):
            joined[at : at + length] = data[start : start + length]
        else:
            joined[at : at + length] = others[start - len(data) : start - len(data) + length]
        at += length + 1
    return joined
