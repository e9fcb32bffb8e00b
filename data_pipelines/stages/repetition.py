"""How much of a document repeats itself (Gopher, arXiv:2112.11446, table A1)."""

import collections

import numpy as np
import pyarrow as pa

from data_pipelines.stages.words import ngram_hashes, word_hashes

_TOP, _DUPLICATE = (2, 3, 4), (5, 6, 7, 8, 9, 10)


def measure(texts: list[str]) -> dict[str, pa.Array]:
    """Shares of repeated lines, paragraphs and word n-grams.

    A line, paragraph or n-gram is a duplicate where it occurred before in the document, so the first one is not. Shares
    of n-grams are of the characters in words; where duplicate n-grams overlap a character counts once. An n-gram that
    occurs once is not a top n-gram.
    """
    lines = [_duplicates([line for line in text.split("\n") if line.strip()], text) for text in texts]
    paragraphs = [_duplicates([part for part in text.split("\n\n") if part.strip()], text) for text in texts]
    ngrams = [_ngrams(text.split()) for text in texts]
    return {
        "duplicate_line_share": pa.array([share for share, _ in lines], pa.float64()),
        "duplicate_line_char_share": pa.array([share for _, share in lines], pa.float64()),
        "duplicate_paragraph_share": pa.array([share for share, _ in paragraphs], pa.float64()),
        "duplicate_paragraph_char_share": pa.array([share for _, share in paragraphs], pa.float64()),
        "top_ngram_share": pa.array([top for top, _ in ngrams], pa.list_(pa.float64(), len(_TOP))),
        "duplicate_ngram_share": pa.array([share for _, share in ngrams], pa.list_(pa.float64(), len(_DUPLICATE))),
    }


def _duplicates(parts: list[str], text: str) -> tuple[float, float]:
    """Shares of `parts` that occurred before, and of the characters of `text` in them."""
    counts = collections.Counter(parts)
    if len(counts) == len(parts):
        return 0.0, 0.0
    repeated = sum(len(part) * (count - 1) for part, count in counts.items())
    return 1 - len(counts) / len(parts), repeated / len(text)


def _ngrams(words: list[str]) -> tuple[list[float], list[float]]:
    hashes = word_hashes(words)
    ends = np.cumsum([0, *map(len, words)])  # characters before each word
    top, duplicate = [0.0] * len(_TOP), [0.0] * len(_DUPLICATE)
    # An n-gram can only occur twice where its first n - 1 words do, so each round looks at the survivors of the last.
    candidates = np.arange(len(words))
    for n in (*_TOP, *_DUPLICATE):
        candidates = candidates[candidates <= len(words) - n]
        if len(candidates) == 0:
            break
        grams = ngram_hashes(hashes, n)[candidates]
        order = np.argsort(grams, kind="stable")
        starts = np.flatnonzero(np.diff(grams[order], prepend=~grams[order[:1]]))  # of runs of equal n-grams
        sizes = np.diff(starts, append=len(order))
        several = sizes > 1
        if n in _TOP and several.any():
            # Among the most frequent, the one that occurs first.
            best = min(np.flatnonzero(sizes == sizes.max()), key=lambda run: order[starts[run]])
            position = candidates[order[starts[best]]]
            top[_TOP.index(n)] = min(1.0, sizes[best] * (ends[position + n] - ends[position]) / ends[-1])
        if n in _DUPLICATE:
            again = np.ones(len(order), bool)
            again[starts] = False
            duplicate[_DUPLICATE.index(n)] = _covered(candidates[order[again]], n, ends)
        candidates = np.sort(candidates[order[np.repeat(several, sizes)]])
    return top, duplicate


def _covered(positions: np.ndarray, n: int, ends: np.ndarray) -> float:
    """Share of the characters in words within `n` words from any of `positions`."""
    begun, ended = (np.bincount(edges, minlength=len(ends)) for edges in (positions, positions + n))
    inside = np.cumsum(begun - ended)[:-1] > 0
    return float(np.diff(ends)[inside].sum() / ends[-1])
