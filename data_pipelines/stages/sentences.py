"""How many sentences there are in lines."""

from typing import Literal, assert_never

import numpy as np

from data_pipelines.stages import alphabet
from data_pipelines.stages.compiled import compiled
from data_pipelines.stages.texts import Lines

_SPACE = ord(" ")
_CLOSING_BYTES = 9  # at most so many bytes of quotes and brackets after the end of a sentence are looked through


def count(rule: Literal["punctuation", "datatrove"], lines: Lines) -> np.ndarray:
    """Sentences in each line; one in a blank line."""
    match rule:
        case "punctuation":
            return _by_words(lines)
        case "datatrove":
            return _by_tokens(lines)
        case _:
            assert_never(rule)


def _by_words(lines: Lines) -> np.ndarray:
    """A sentence ends with a word that ends with a stop, quotes and brackets aside, and with the line."""
    texts, words = lines.texts, lines.texts.words("whitespace")
    table, stop, closing = alphabet.MARKS.all, np.uint8(alphabet.STOP), np.uint8(alphabet.CLOSING)
    ends = _end_sentences(texts.data, words.starts, words.ends, table, stop, closing)
    before = np.append(0, np.cumsum(ends))
    after = lines.first_word + lines.num_words
    ended = (lines.num_words > 0) & np.append(ends, False)[after - 1]
    return before[after] - before[lines.first_word] + ~ended


def _by_tokens(lines: Lines) -> np.ndarray:
    """As spaCy's sentencizer does: a sentence begins at the first word, or white space, after a token that is a stop.

    White space of more than one space is a token.
    """
    texts, tokens = lines.texts, lines.texts.words("datatrove")
    first, last = tokens.index(lines.starts), tokens.index(lines.ends)
    flags = np.uint8(alphabet.STOP), np.uint8(alphabet.PUNCTUATION)
    return _count_begun(texts.data, tokens.starts, tokens.ends, first, last, alphabet.MARKS.all, *flags)


@compiled
def _character(data, at, table):
    """Flags and size of the character whose first byte stands at a position.

    `table` has the flags of every code point, and last those of all others.
    """
    point, size = np.int64(data[at]), 1
    if point >= 0x80:
        size = 2 + (point >= 0xE0) + (point >= 0xF0)
        point &= 0x7F >> size
        for i in range(1, size):
            point = (point << 6) | (data[at + i] & 0x3F)
    return table[min(point, len(table) - 1)], size


@compiled
def _count_begun(data, starts, ends, first, last, table, stop, punctuation):
    """Sentences that begin in each line, which has the tokens from `first` to `last`."""
    number = np.ones(len(first), np.int64)
    for line in range(len(first)):
        stopped = False
        for token in range(first[line], last[line]):
            flags, size = _character(data, starts[token], table)
            stops = flags & stop != 0 and ends[token] - starts[token] == size
            word = not stops
            if word and flags & punctuation:
                word, at = False, starts[token] + size
                while at < ends[token] and not word:
                    flags, size = _character(data, at, table)
                    word = flags & punctuation == 0
                    at += size
            if not word and token > first[line]:
                gap = starts[token] - ends[token - 1]
                word = gap > 1 or (gap == 1 and data[ends[token - 1]] != _SPACE)
            if word:
                number[line] += stopped
                stopped = False
            stopped |= stops
    return number


@compiled
def _end_sentences(data, starts, ends, table, stop, closing):
    """Whether each word ends with a stop, but for bytes of closing quotes and brackets."""
    found = np.zeros(len(starts), np.bool_)
    for word in range(len(starts)):
        at = ends[word] - 1
        for _ in range(_CLOSING_BYTES + 1):
            first = at
            while data[first] & 0xC0 == 0x80:
                first -= 1
            flags, _ = _character(data, first, table)
            if not flags & closing or at == starts[word]:
                break
            at -= 1
        found[word] = flags & stop
    return found
