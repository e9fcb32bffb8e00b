"""How much of a document repeats itself (Gopher, arXiv:2112.11446, table A1)."""

from typing import assert_never

import numpy as np
import pyarrow as pa

from data_pipelines.stages.compiled import compiled
from data_pipelines.stages.ranges import Ranges, share
from data_pipelines.stages.texts import Texts
from slmjax.config.filters import RepetitionFilterConfig

_TOP, _DUPLICATE = (2, 3, 4), (5, 6, 7, 8, 9, 10)
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd; see `ranges`
_UPPER, _ONE = np.uint64(32), np.uint64(1)


def measure(config: RepetitionFilterConfig, texts: Texts) -> dict[str, pa.Array]:
    """Shares of repeated lines, paragraphs and word n-grams.

    A line, paragraph or n-gram is a duplicate where it occurred before in the document, so the first one is not.
    """
    words = texts.words(config.splitter)
    match config.counting:
        case "paper":
            # Blank lines and paragraphs do not count. Shares of n-grams are of the characters in words, and where
            # duplicate n-grams overlap a character counts once. An n-gram that occurs once is not a top n-gram.
            lines = Repeats(texts.lines, texts.lines.num_words > 0)
            paragraphs = Repeats(texts.paragraphs, texts.paragraphs.num_words > 0)
            num_lines, extra = lines.number, 0
            whole = words.chars_before(words.first[1:]) - words.chars_before(words.first[:-1])
            covered = True
        case "datatrove":
            # A text that starts or ends with a line feed has an empty line there. Shares of n-grams are of all
            # characters; the top n-gram may occur once and has spaces; a duplicate n-gram is passed over as a whole.
            lines = Repeats(texts.lines, texts.lines.bytes > 0)
            paragraphs = Repeats(texts.paragraphs, np.ones(len(texts.paragraphs), bool))
            edges = [
                (texts.data[position] == 10) & (texts.starts < texts.ends)
                for position in (texts.starts, texts.ends - 1)
            ]
            num_lines = lines.number + edges[0] + edges[1]
            extra = edges[0] & edges[1]
            whole = texts.num_chars
            covered = False
        case _:
            assert_never(config.counting)
    before = words.chars_before(np.arange(len(words) + 1))
    top, duplicate = _ngrams(words.hashes, words.first, before, covered)
    return {
        "duplicate_line_share": pa.array(share(lines.times + extra, num_lines)),
        "duplicate_line_char_share": pa.array(share(lines.chars, texts.num_chars)),
        "duplicate_paragraph_share": pa.array(share(paragraphs.times, paragraphs.number)),
        "duplicate_paragraph_char_share": pa.array(share(paragraphs.chars, texts.num_chars)),
        "top_ngram_share": _rows(np.minimum(1.0, share(top, whole[:, None]))),
        "duplicate_ngram_share": _rows(share(duplicate, whole[:, None])),
    }


class Repeats:
    """Counts, by document, some lines or paragraphs, and those of them that occurred before with their characters."""

    def __init__(self, parts: Ranges, counted: np.ndarray):
        rows = np.flatnonzero(counted)
        documents = parts.document[rows]
        self.number = np.bincount(documents, minlength=len(parts.texts))
        again = occurred(parts.hashes[rows], np.searchsorted(documents, np.arange(len(parts.texts) + 1)))
        self.times = np.bincount(documents[again], minlength=len(parts.texts))
        again_rows = rows[again]
        chars = parts.texts.chars(parts.starts[again_rows], parts.ends[again_rows])
        self.chars = np.bincount(documents[again], chars, minlength=len(parts.texts))


def _rows(values: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


@compiled
def _groups(keys, number, table, groups, counts):
    """Of the first `number` keys, finds for each the index of the first equal one, and there how many are equal.

    `table` must have twice as many places, a power of two.
    """
    places = 16
    while places < 2 * number:
        places *= 2
    table[:places] = 0
    for i in range(number):
        key = keys[i]
        place = ((key * _MULTIPLIER) >> _UPPER) & np.uint64(places - 1)
        while table[place] != 0 and keys[table[place] - 1] != key:
            place = (place + _ONE) & np.uint64(places - 1)
        if table[place] == 0:
            table[place] = i + 1
            counts[i] = 0
        groups[i] = table[place] - 1
        counts[groups[i]] += 1


@compiled
def _room(first):
    """A power of two that is at least twice the number of parts of any document."""
    places = 16
    for document in range(len(first) - 1):
        while places < 2 * (first[document + 1] - first[document]):
            places *= 2
    return places


@compiled
def occurred(keys, first):
    """Whether each key occurred before in its document; `first` is the index of the first one of each."""
    again = np.zeros(len(keys), np.bool_)
    places = _room(first)
    table, groups, counts = np.empty(places, np.int32), np.empty(places, np.int32), np.empty(places, np.int32)
    for document in range(len(first) - 1):
        start, number = first[document], first[document + 1] - first[document]
        _groups(keys[start : start + number], number, table, groups, counts)
        for i in range(number):
            again[start + i] = groups[i] != i
    return again


@compiled
def _ngrams(hashes, first, before, covered):
    """Characters in the top n-grams and in the duplicate n-grams of each document, a column for each n.

    Args:
      hashes: of all words.
      first: index of the first word of each document, and the number of words.
      before: characters in all words before each, and in all.
      covered: counts each character in a duplicate n-gram once, and top n-grams without spaces. Else as datatrove:
        with spaces, any n-gram may be the top one, and reading goes on after a duplicate, so that what starts inside
        of it is not seen.
    """
    num_documents = len(first) - 1
    top = np.zeros((num_documents, _TOP[-1] - _TOP[0] + 1))
    duplicate = np.zeros((num_documents, _DUPLICATE[-1] - _DUPLICATE[0] + 1))
    room = _room(first)
    table, groups, counts = np.empty(room, np.int32), np.empty(room, np.int32), np.empty(room, np.int32)
    grams, places, seen = np.empty(room, np.uint64), np.empty(room, np.int64), np.empty(room, np.bool_)
    for document in range(num_documents):
        start, end = first[document], first[document + 1]
        number = max(end - start - 1, 0)
        for i in range(number):
            grams[i] = hashes[start + i] * _MULTIPLIER + hashes[start + i + 1]
            places[i] = start + i
        for n in range(2, _DUPLICATE[-1] + 1):
            _groups(grams, number, table, groups, counts)
            if n <= _TOP[-1]:
                # The most frequent one, and of several the one that occurs first.
                most, at = 1, start
                for i in range(number):
                    if groups[i] == i and counts[i] > most:
                        most, at = counts[i], places[i]
                if most > 1 or (not covered and end - start >= n):
                    chars = before[at + n] - before[at]
                    top[document, n - _TOP[0]] = most * (chars + (0 if covered else n - 1))
            if n >= _DUPLICATE[0]:
                total, reached = 0, 0
                seen[:number] = False
                for i in range(number):
                    place = places[i]
                    if covered:
                        if groups[i] != i:
                            total += before[place + n] - max(before[place], reached)
                            reached = before[place + n]
                    elif place >= reached:
                        if seen[groups[i]]:
                            total += before[place + n] - before[place]
                            reached = place + n
                        seen[groups[i]] = True
                duplicate[document, n - _DUPLICATE[0]] = total
            # An n-gram can only occur twice where its first and its last n - 1 words do.
            left = 0
            for i in range(number - 1):
                if counts[groups[i]] > 1 and counts[groups[i + 1]] > 1 and places[i] + 1 == places[i + 1]:
                    grams[left] = grams[i] * _MULTIPLIER + hashes[places[i] + n]
                    places[left] = places[i]
                    left += 1
            number = left
    return top, duplicate
