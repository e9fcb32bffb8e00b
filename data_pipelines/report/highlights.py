"""Where in a text the reason stands for which a stage dropped or changed it, for the rules that have a place."""

import collections
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.report import bounds
from slmjax.config import (
    BadWordFilterConfig,
    C4FilterConfig,
    DecontaminationConfig,
    EncodedDataFilterConfig,
    FineWebFilterConfig,
    GopherFilterConfig,
    LineFilterConfig,
    MarkerFilterConfig,
    MaskPersonalDataConfig,
    RepetitionFilterConfig,
)
from slmjax.config.pipeline import StageConfig

Span = tuple[int, int]

_LINE = re.compile(r"[^\n]+")
_PARAGRAPH = re.compile(r"\S(?:(?!\n\n).)*", re.DOTALL)
_PLACEHOLDER = re.compile("<(?:SECRET|EMAIL|IP|CARD|PHONE)>")
_BULLET = re.compile(r"\s*(?:[•‣▶◀◦■□▪▫–]|[-*+](?=\s))")  # noqa: RUF001
_ELLIPSIS = re.compile(r"(?:\.\.\.|…)\s*$")
_ENCODED = re.compile(r"[A-Za-z0-9+/=\n]{64,}|(?:\b(?:0x|\\x)?[0-9a-fA-F]{2}[,\s]*){8,}|(?:\\u[0-9a-fA-F]{4}){8,}")


def find(config: StageConfig, rule: str, text: str, row: Mapping[str, Any]) -> list[Span]:
    """Parts of a text, in order and apart from each other; none where the rule is about the text as a whole.

    Args:
      config: of the stage.
      rule: by which it dropped the document; "" where it changed or kept it.
      text: as the stage saw it or, where it masks personal data, left it.
      row: the document's attributes.
    """
    return _apart(_find(config, rule, text, row))


def removed_lines(before: str, after: str) -> list[Span]:
    """The lines of a text that another one lacks, white space around them aside."""
    left = collections.Counter(line.strip() for line in after.splitlines())
    spans = []
    for start, end, line in _parts(_LINE, before):
        line = line.strip()
        if left[line]:
            left[line] -= 1
        elif line:
            spans.append((start, end))
    return spans


def _find(config: StageConfig, rule: str, text: str, row: Mapping[str, Any]) -> Iterator[Span]:
    match config:
        case RepetitionFilterConfig():
            yield from _repeated(config, rule, text, row)
        case FineWebFilterConfig() if rule == "max_duplicate_line_char_share":
            yield from _again(_parts(_LINE, text))
        case FineWebFilterConfig() if rule == "max_short_line_share":
            yield from _lines(text, lambda line: len(line) <= config.short_line_chars)
        case FineWebFilterConfig() if rule == "min_terminal_line_share":
            yield from _lines(text, lambda line: line[-1] not in ".!?\"'”。！？")  # noqa: RUF001
        case GopherFilterConfig() | LineFilterConfig() if rule == "max_bullet_line_share":
            yield from _lines(text, _BULLET.match)
        case GopherFilterConfig() | LineFilterConfig() if rule == "max_ellipsis_line_share":
            yield from _lines(text, _ELLIPSIS.search)
        case GopherFilterConfig() if rule == "max_hashes_per_word":
            yield from _matches(re.compile("#+"), text)
        case GopherFilterConfig() if rule == "max_ellipses_per_word":
            yield from _matches(re.compile(r"\.\.\.|…"), text)
        case LineFilterConfig() if rule in ("max_long_line_share", "max_line_chars"):
            yield from _lines(text, lambda line: len(line) > config.long_line_chars)
        case C4FilterConfig() if rule == "max_lorem_ipsum":
            yield from _matches(re.compile("lorem ipsum", re.IGNORECASE), text)
        case C4FilterConfig() if rule == "max_curly_brackets":
            yield from _matches(re.compile("{"), text)
        case MarkerFilterConfig() if rule:
            head = "\n".join(text.split("\n")[: config.first_lines])
            yield from _matches(_any_of(config.markers), head)
        case BadWordFilterConfig() if rule:
            listed = [*config.words]
            if config.path is not None:
                listed += Path(os.path.expandvars(config.path)).expanduser().read_text("utf-8").splitlines()
            words = _any_of([word.strip() for word in listed if word.strip()])
            whole = re.compile(rf"(?<![^\W_]){words.pattern}(?![^\W_])", re.IGNORECASE) if config.whole_words else words
            yield from _matches(whole, text)
        case EncodedDataFilterConfig() if rule:
            yield from _matches(_ENCODED, text)
        case MaskPersonalDataConfig():
            yield from _matches(_PLACEHOLDER, text)
        case DecontaminationConfig():
            for found in row.get("found", ()):
                yield from _matches(re.compile(re.escape(found["ngram"])), text)


def _repeated(config: RepetitionFilterConfig, rule: str, text: str, row: Mapping[str, Any]) -> Iterator[Span]:
    if rule.startswith("max_duplicate_line"):
        yield from _again(_parts(_LINE, text))
    elif rule.startswith("max_duplicate_paragraph"):
        yield from _again(_parts(_PARAGRAPH, text))
    elif rule.endswith("_ngram_share"):
        values = bounds.values(row)
        broken = [
            bound for bound in bounds.of(config) if bound.rule == rule and not bound.holds(values[bound.attribute])
        ]
        (size,) = map(int, re.findall(r"\((\d+)-grams\)", broken[0].attribute)) if broken else (2,)
        grams = _ngrams(text, size)
        if rule == "max_duplicate_ngram_share":
            yield from _again(grams)
        else:
            counts = collections.Counter(gram for _, _, gram in grams)
            most = max(counts, key=lambda gram: counts[gram] * len("".join(gram)), default=())
            yield from ((start, end) for start, end, gram in grams if gram == most)


def _ngrams(text: str, size: int) -> list[tuple[int, int, tuple[str, ...]]]:
    words = _parts(re.compile(r"\S+"), text)
    return [
        (words[i][0], words[i + size - 1][1], tuple(word for _, _, word in words[i : i + size]))
        for i in range(len(words) - size + 1)
    ]


def _parts(pattern: re.Pattern[str], text: str) -> list[tuple[int, int, str]]:
    return [(*found.span(), found.group()) for found in pattern.finditer(text)]


def _again(parts: Sequence[tuple[int, int, Any]]) -> Iterator[Span]:
    """Those that occurred before."""
    seen = set()
    for start, end, content in parts:
        if content in seen:
            yield start, end
        seen.add(content)


def _lines(text: str, is_meant: Any) -> Iterator[Span]:
    for start, end, line in _parts(_LINE, text):
        if line.strip() and is_meant(line.strip()):
            yield start, end


def _matches(pattern: re.Pattern[str], text: str) -> Iterator[Span]:
    return (found.span() for found in pattern.finditer(text))


def _any_of(words: Sequence[str]) -> re.Pattern[str]:
    return re.compile(f"(?:{'|'.join(map(re.escape, sorted(words, key=len, reverse=True)))})", re.IGNORECASE)


def _apart(spans: Iterator[Span]) -> list[Span]:
    """Spans in order, those that overlap or touch as one."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        elif start < end:
            found.append((start, end))
    return found
