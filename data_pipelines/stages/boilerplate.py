"""The line-wise corrections of RefinedWeb (Penedo et al. 2023, arXiv:2306.01116, G.2), in the form of DCLM."""

import re

import numpy as np
import pyarrow as pa

from data_pipelines.stages import alphabet
from data_pipelines.stages.counting import count
from data_pipelines.stages.ranges import share
from data_pipelines.stages.texts import Lines, Texts
from slmjax.config.filters import BoilerplateFilterConfig

_COUNTED = "likes shares comments retweets reposts quotes bookmarks upvotes downvotes downloads views followers"
_COUNTER = re.compile(rf"\W*\d[\d,.]*[kmb]?\s+(?:{'|'.join(_COUNTED.split())})\W*")
_COUNTER_WORDS = 6  # what is not a word of these rules may stand before and after
_RULES = ("uppercase", "numeric", "counter", "single_word")


def clean(config: BoilerplateFilterConfig, texts: Texts) -> tuple[Texts, dict[str, pa.Array]]:
    """Returns the lines that are left, blank ones among them, and the share of the words that went."""
    lines = texts.lines
    filled = lines.num_words > 0
    upper, digit = alphabet.UPPER, alphabet.DIGIT
    capitals = count(texts.marks, upper | alphabet.CONTINUES, upper, lines.starts, lines.ends)
    digits = count(texts.kinds, digit | alphabet.CONTINUES, digit, lines.starts, lines.ends)
    rules = [
        filled & (capitals > config.uppercase_share * lines.chars),
        filled & (digits == lines.chars),
        _counters(lines),
        lines.num_words == 1,
    ]
    removed = np.select(rules, range(len(rules)), -1)
    cut = _cut(config, lines, removed < 0)
    before, words = lines.sum(lines.num_words), lines.num_words.copy()
    for row, text in cut.items():
        words[row] = len(text.split())
    gone = np.zeros(len(lines), bool)
    gone[[row for row, text in cut.items() if not text.strip()]] = True
    left = (removed < 0) & ~gone
    edited = np.zeros(len(lines), bool)
    edited[list(cut)] = True
    attributes = {
        "removed_word_share": pa.array(share(before - lines.sum(words * left), before)),
        **{f"removed_{rule}_lines": pa.array(lines.sum(removed == i)) for i, rule in enumerate(_RULES)},
        "removed_phrases": pa.array(lines.sum(edited)),
    }
    contents = {row: text.encode() for row, text in cut.items()}
    return texts.of_lines(lines, left & _inner(lines, left & filled), contents), attributes


def _inner(lines: Lines, filled: np.ndarray) -> np.ndarray:
    """Which lines are neither before the first nor after the last of those that are filled in their document."""
    rows, number = np.flatnonzero(filled), len(lines)
    first, last = np.full(len(lines.texts), number), np.full(len(lines.texts), -1)
    np.minimum.at(first, lines.document[rows], rows)
    np.maximum.at(last, lines.document[rows], rows)
    index = np.arange(number)
    return (index >= first[lines.document]) & (index <= last[lines.document])


def _counters(lines: Lines) -> np.ndarray:
    """Which lines only count something, such as "3 likes"."""
    found = np.zeros(len(lines), bool)
    few = (lines.num_words > 1) & (lines.num_words <= _COUNTER_WORDS)
    rows = np.flatnonzero(few & lines.have_kind(alphabet.DIGIT))
    for row, text in zip(rows.tolist(), lines.strings(rows), strict=True):
        found[row] = _COUNTER.fullmatch(text.lower()) is not None
    return found


def _cut(config: BoilerplateFilterConfig, lines: Lines, alive: np.ndarray) -> dict[int, str]:
    """Short lines that hold one of the phrases, by index, without it."""
    forms = [
        *((phrase, r"\s?", "") for phrase in config.phrases),
        *((suffix, r"\s?", "$") for suffix in config.suffixes),
        *((prefix, "^", r"\s?") for prefix in config.prefixes),
    ]
    short = alive & (lines.num_words <= config.phrase_line_words)
    rows = np.flatnonzero(short & lines.contain([form for form, _, _ in forms]))
    cut = {}
    for row, text in zip(rows.tolist(), lines.strings(rows), strict=True):
        changed = text
        for form, before, after in forms:
            changed = re.sub(before + re.escape(form) + after, "", changed, flags=re.IGNORECASE)
        if changed != text:
            cut[row] = changed
    return cut
