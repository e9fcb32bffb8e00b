"""How many sentences there are in lines."""

from typing import Literal, assert_never

import numpy as np

from data_pipelines.stages import alphabet
from data_pipelines.stages.compiled import compiled
from data_pipelines.stages.counting import count as count_flags
from data_pipelines.stages.texts import Lines

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
    stop = (texts.marks_at(tokens.starts) & alphabet.STOP) != 0
    stop &= texts.chars(tokens.starts, tokens.ends) == 1
    punctuation = count_flags(texts.marks, alphabet.PUNCTUATION, 0, tokens.starts, tokens.ends) == 0
    first, last = tokens.index(lines.starts), tokens.index(lines.ends)
    spaced = np.zeros(len(tokens), bool)
    gaps = tokens.starts[1:] - tokens.ends[:-1]
    spaced[1:] = (gaps > 1) | ((gaps == 1) & (texts.data[tokens.ends[:-1]] != ord(" ")))
    spaced[first[first < len(tokens)]] = False
    events = np.flatnonzero(spaced | ~(stop | punctuation))
    stops_before = np.append(0, np.cumsum(stop))
    line = np.searchsorted(last, events, side="right")
    inside = line < len(lines)
    events, line = events[inside], line[inside]
    since = stops_before[first[line]]
    same = np.flatnonzero(line[1:] == line[:-1]) + 1
    since[same] = stops_before[events[same - 1]]
    begins = line[stops_before[events] > since]
    return 1 + np.bincount(begins, minlength=len(lines))


@compiled
def _end_sentences(data, starts, ends, table, stop, closing):
    """Whether each word ends with a stop, but for bytes of closing quotes and brackets.

    `table` has the flags of every code point, and last those of all others.
    """
    found = np.zeros(len(starts), np.bool_)
    for word in range(len(starts)):
        at = ends[word] - 1
        for _ in range(_CLOSING_BYTES + 1):
            point = np.int64(data[at])
            if point >= 0x80:
                first = at
                while data[first] < 0xC0:
                    first -= 1
                size = 2 + (data[first] >= 0xE0) + (data[first] >= 0xF0)
                point = np.int64(data[first]) & (0x7F >> size)
                for i in range(1, size):
                    point = (point << 6) | (data[first + i] & 0x3F)
            flags = table[min(point, len(table) - 1)]
            if not flags & closing or at == starts[word]:
                break
            at -= 1
        found[word] = flags & stop
    return found
