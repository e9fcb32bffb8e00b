"""Passages of texts that can repeat: paragraphs, lines, and all runs of so many words; their hashes and their bytes."""

import dataclasses

import numpy as np

from data_pipelines.stages import hashed_words
from data_pipelines.stages.hashed_words import Words
from data_pipelines.stages.texts import Texts
from slmjax.config import PassageDedupConfig, SubstringDedupConfig


@dataclasses.dataclass(frozen=True)
class Passages:
    """Of some documents, in order. Of runs of words there are as many as words, so that every byte for each counts.

    Attributes:
      hashes: uint64, without letter case and white space.
      documents: uint32, index of the document of each.
      starts, ends: uint32, in the bytes of that document.
    """

    hashes: np.ndarray
    documents: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


def find(config: PassageDedupConfig | SubstringDedupConfig, texts: Texts) -> Passages:
    """The passages of a batch of documents that are long enough."""
    words = hashed_words.split(texts, punctuation=True)
    if isinstance(config, SubstringDedupConfig):
        return _runs(config, words)
    return _units(config, words)


def _runs(config: SubstringDedupConfig, words: Words) -> Passages:
    """Every `config.words` words in a row, with the white space up to the next word."""
    first = hashed_words.run_starts(words.first, config.words)
    documents = np.searchsorted(words.first, first, side="right") - 1
    offsets, last = words.texts.starts[documents], first + config.words - 1
    at_end = last + 1 == words.first[documents + 1]
    following = words.starts[np.minimum(last + 1, len(words.starts) - 1)]
    ends = np.where(at_end, words.ends[last], following)
    hashes = hashed_words.runs(words.hashes, config.words)[first]
    return _passages(hashes, documents, words.starts[first] - offsets, ends - offsets)


def _units(config: PassageDedupConfig, words: Words) -> Passages:
    """Lines, or paragraphs: lines in a row that are not blank, with the blank ones up to the next paragraph."""
    texts = words.texts
    ends_of_lines = np.flatnonzero(texts.data == ord("\n")) + 1
    line = np.searchsorted(ends_of_lines, words.starts, side="right")
    gap = 1 if config.unit == "line" else 2
    new = np.ones(len(line), bool)
    new[1:] = np.diff(line) >= gap
    new[words.first[:-1][words.counts > 0]] = True
    first = np.flatnonzero(new)
    counts = np.diff(np.append(first, len(line)))
    documents = np.searchsorted(words.first, first, side="right") - 1
    offsets, ends = texts.starts[documents], texts.ends[documents]
    starts = ends_of_lines[line[first] - 1]
    if config.unit == "line":
        ends = np.minimum(ends_of_lines[line[first]], ends)  # the last line may have no line feed
    else:
        inner = np.flatnonzero(documents[1:] == documents[:-1])
        ends[inner] = starts[inner + 1]
    long = counts >= config.shortest_words
    hashes = _together(words.hashes, first, counts)[long]
    return _passages(hashes, documents[long], (starts - offsets)[long], (ends - offsets)[long])


def _passages(hashes: np.ndarray, documents: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> Passages:
    small = (column.astype(np.uint32) for column in (documents, starts, ends))
    return Passages(hashes, *small)


def _together(hashes: np.ndarray, first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Hash of the words of each passage, that depends on their order: a sum over words mixed with their places."""
    if len(first) == 0:
        return hashes
    place = (np.arange(len(hashes)) - np.repeat(first, counts)).astype(np.uint64)
    return hashed_words.mix(np.add.reduceat(hashed_words.mix(hashes + place * hashed_words.MULTIPLIER), first))
