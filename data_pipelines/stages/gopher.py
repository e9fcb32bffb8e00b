"""The quality rules of Gopher (arXiv:2112.11446, A1.1), counted as datatrove does."""

import functools

import numpy as np
import pyarrow as pa

from data_pipelines.stages import alphabet
from data_pipelines.stages.compiled import compiled
from data_pipelines.stages.ranges import share
from data_pipelines.stages.texts import Texts
from slmjax.config.filters import GopherFilterConfig

_BULLETS = ("•", "-")
_ELLIPSES = ("...", "…")


def measure(config: GopherFilterConfig, texts: Texts) -> dict[str, pa.Array]:
    """Words and their mean length; symbols for every word; shares of lines and of words; different stop words."""
    words, lines = texts.words(config.splitter), texts.text_lines
    number = words.per_document
    kinds = _kinds(texts.kinds, words.starts, words.ends, np.uint8(alphabet.LETTER))
    letters = (kinds & alphabet.LETTER) != 0
    # Words of symbols alone have no length.
    without = np.flatnonzero((kinds & (alphabet.LETTER | alphabet.MEANING)) == 0)
    num_meaning = number - np.bincount(words.document[without], minlength=len(texts))
    chars_without = np.bincount(
        words.document[without], texts.chars(words.starts[without], words.ends[without]), len(texts)
    )
    chars = texts.num_chars - texts.count_kind(alphabet.SPACE) - chars_without
    bullets, ellipses = lines.start_with(_BULLETS), lines.end_with(_ELLIPSES)
    return {
        "words": pa.array(num_meaning),
        "mean_word_chars": pa.array(share(chars, num_meaning)),
        "hashes_per_word": pa.array(texts.hash_signs / number.clip(1)),
        "ellipses_per_word": pa.array(texts.ellipses / number.clip(1)),
        "bullet_line_share": pa.array(share(lines.sum(bullets), texts.num_text_lines)),
        "ellipsis_line_share": pa.array(share(lines.sum(ellipses), texts.num_text_lines)),
        "alphabetic_word_share": pa.array(share(words.sum(letters), number)),
        "stop_words": pa.array(_different(*_lookup(config.stop_words), words.hashes, words.first)),
    }


@compiled
def _kinds(flags, starts, ends, last):
    """Flags of the bytes of each word, up to the first one that has `last`."""
    found = np.empty(len(starts), np.uint8)
    for word in range(len(starts)):
        of_word = np.uint8(0)
        for at in range(starts[word], ends[word]):
            of_word |= flags[at]
            if flags[at] & last:
                break
        found[word] = of_word
    return found


@compiled
def _different(wanted, shift, table, hashes, first):
    """How many of the stop words, of whose hashes `_lookup` made a table, are among the words of each document."""
    number = np.zeros(len(first) - 1, np.int64)
    found_in = np.full(len(wanted), -1)
    for document in range(len(number)):
        for word in range(first[document], first[document + 1]):
            which = table[hashes[word] >> shift]
            if which < len(wanted) and wanted[which] == hashes[word] and found_in[which] < document:
                found_in[which] = document
                number[document] += 1
    return number


@functools.cache
def _lookup(words: tuple[str, ...]) -> tuple[np.ndarray, np.uint64, np.ndarray]:
    """Hashes of the words, and a table from the first bits of a hash to the one of them that it may be."""
    wanted = np.unique(Texts.of(words).words("whitespace").hashes)
    bits = next(bits for bits in range(8, 65) if len(np.unique(wanted >> np.uint64(64 - bits))) == len(wanted))
    shift = np.uint64(64 - bits)
    table = np.full(1 << bits, len(wanted), np.int16)
    table[wanted >> shift] = np.arange(len(wanted))
    return wanted, shift, table
