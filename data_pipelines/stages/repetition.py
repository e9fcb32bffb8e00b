"""How much of a document repeats itself (Gopher, arXiv:2112.11446, table A1)."""

from typing import assert_never

import numpy as np
import pyarrow as pa

from data_pipelines.stages.ranges import MULTIPLIER, Ranges, Words, repeated, share
from data_pipelines.stages.texts import Texts
from slmjax.config.filters import RepetitionFilterConfig

_TOP, _DUPLICATE = (2, 3, 4), (5, 6, 7, 8, 9, 10)
_DOCUMENT = np.uint64(0xA0761D6478BD642F)  # odd; sets the n-grams of different documents apart
_POSITIONS = 40  # bits of a position among the words of a batch


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
            top, duplicate = _ngrams(words, covered=True)
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
            top, duplicate = _ngrams(words, covered=False)
        case _:
            assert_never(config.counting)
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
        again = np.delete(*repeated(parts.hashes[rows] + documents.astype(np.uint64) * _DOCUMENT))
        self.times = np.bincount(documents[again], minlength=len(parts.texts))
        again_rows = rows[again]
        chars = parts.texts.chars(parts.starts[again_rows], parts.ends[again_rows])
        self.chars = np.bincount(documents[again], chars, minlength=len(parts.texts))


def _rows(values: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _ngrams(words: Words, *, covered: bool) -> tuple[np.ndarray, np.ndarray]:
    """Characters in the top n-grams and in the duplicate n-grams of each document, a column for each n.

    `covered` counts each character in a duplicate n-gram once, and top n-grams without spaces; else as datatrove does.
    """
    num_documents = len(words.texts)
    top = np.zeros((num_documents, len(_TOP)))
    duplicate = np.zeros((num_documents, len(_DUPLICATE)))
    hashes, document = words.hashes, words.document
    places = np.flatnonzero(document[:-1] == document[1:])
    grams = ((hashes + document.astype(np.uint64) * _DOCUMENT)[:-1] * MULTIPLIER + hashes[1:])[places]
    for n in range(2, _DUPLICATE[-1] + 1):
        order, runs = repeated(grams)
        sizes = np.diff(np.append(runs, len(order)))
        if n in _TOP:
            top[:, _TOP.index(n)] = _top(words, n, places[order[runs]], sizes, spaces=not covered)
        several = np.zeros(len(places), bool)
        several[order] = True
        if n in _DUPLICATE and covered:
            again = several.copy()
            again[order[runs]] = False
            duplicate[:, _DUPLICATE.index(n)] = _covered(words, n, places[again])
        elif n in _DUPLICATE:
            kinds = np.zeros(len(places), np.int64)
            kinds[order] = np.repeat(np.arange(len(runs)), sizes)
            duplicate[:, _DUPLICATE.index(n)] = _passed_over(words, n, places[several], kinds[several])
        # An n-gram can only occur twice where its first and its last n - 1 words do.
        candidates = np.flatnonzero(several[:-1] & several[1:] & (places[:-1] + 1 == places[1:]))
        places = places[candidates]
        grams = grams[candidates] * MULTIPLIER + hashes[places + n]
    return top, duplicate


def _top(words: Words, n: int, first: np.ndarray, sizes: np.ndarray, *, spaces: bool) -> np.ndarray:
    """Characters of each document in its most frequent n-gram; among the most frequent, in the one that occurs first.

    `first` is where each n-gram that occurs several times does so first, `sizes` how often.
    """
    lowest = np.uint64((1 << _POSITIONS) - 1)
    best = np.zeros(len(words.texts), np.uint64)
    if spaces:  # then the first n-gram is the top one where all occur once
        best = np.where(words.per_document >= n, (1 << _POSITIONS) + lowest - words.first[:-1].astype(np.uint64), 0)
    scores = (sizes.astype(np.uint64) << np.uint64(_POSITIONS)) + lowest - first.astype(np.uint64)
    np.maximum.at(best, words.document[first], scores)
    counts = (best >> np.uint64(_POSITIONS)).astype(np.int64)
    at = np.where(counts > 0, (lowest - (best & lowest)).astype(np.int64), 0)
    chars = words.chars_before(np.minimum(at + n, len(words))) - words.chars_before(at)
    return counts * (chars + (n - 1) * spaces)


def _covered(words: Words, n: int, places: np.ndarray) -> np.ndarray:
    """Characters of each document in n-grams that start at `places`, each counted once."""
    starts, ends = words.chars_before(places), words.chars_before(places + n)
    starts[1:] = np.maximum(starts[1:], ends[:-1])
    return np.bincount(words.document[places], ends - starts, len(words.texts))


def _passed_over(words: Words, n: int, places: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Characters of each document in n-grams seen before, when reading goes on after such a one.

    What starts inside of it is not seen. `places` are those of n-grams that occur several times, `kinds` which it is.
    """
    seen: set[int] = set()
    again: list[int] = []
    resume = 0
    for place, kind in zip(places.tolist(), kinds.tolist(), strict=True):
        if place < resume:
            continue
        if kind in seen:
            again.append(place)
            resume = place + n
        else:
            seen.add(kind)
    found = np.array(again, np.int64)
    chars = words.chars_before(found + n) - words.chars_before(found)
    return np.bincount(words.document[found], chars, len(words.texts))
