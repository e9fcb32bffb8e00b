"""The quality rules of FineWeb (arXiv:2406.17557, section 3.6), counted as datatrove does."""

import numpy as np
import pyarrow as pa

from data_pipelines.stages import alphabet
from data_pipelines.stages.ranges import share
from data_pipelines.stages.repetition import Repeats
from data_pipelines.stages.texts import Texts
from slmjax.config.filters import FineWebFilterConfig


def measure(config: FineWebFilterConfig, texts: Texts) -> dict[str, pa.Array]:
    """Shares of lines that are not blank: that end like sentences, are short, occurred before. Line feeds a word."""
    lines = texts.lines
    filled = lines.num_words > 0
    number = lines.sum(filled)
    ended = filled & ((texts.marks_at(lines.ends - 1) & alphabet.TERMINAL) != 0)
    short = filled & (lines.chars <= config.short_line_chars)
    repeats = Repeats(lines, filled)
    feeds = lines.per_document - 1
    words = texts.words(config.splitter).per_document
    return {
        "terminal_line_share": pa.array(share(lines.sum(ended), number)),
        "short_line_share": pa.array(share(lines.sum(short), number)),
        "duplicate_line_char_share": pa.array(share(repeats.chars, texts.num_chars - feeds)),
        "newlines_per_word": pa.array(feeds / np.maximum(words, 1)),
    }
