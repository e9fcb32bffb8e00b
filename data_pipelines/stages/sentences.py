"""How many sentences there are in lines."""

from typing import Literal, assert_never

import numpy as np

from data_pipelines.stages import alphabet
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
    at = words.ends - 1
    flags = texts.marks_at(at)
    closing = np.flatnonzero(flags & alphabet.CLOSING)
    for _ in range(_CLOSING_BYTES):
        closing = closing[((flags[closing] & alphabet.CLOSING) != 0) & (at[closing] > words.starts[closing])]
        if len(closing) == 0:
            break
        at[closing] -= 1
        flags[closing] = texts.marks_at(at[closing])
    ends = (flags & alphabet.STOP) != 0
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
    punctuation = ~tokens.any((texts.marks & alphabet.PUNCTUATION) == 0)
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
