"""The rules of C4 (Raffel et al. 2020, arXiv:1910.10683, 2.2) on lines and documents, in the form of datatrove."""

import dataclasses
import re

import numpy as np
import pyarrow as pa

from data_pipelines.stages import sentences
from data_pipelines.stages.texts import Lines, Texts
from slmjax.config.filters import C4FilterConfig, C4ParagraphFilterConfig

_CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
_TERMINAL, _ELLIPSIS = (".", "?", "!", '"', "'"), ("...",)
_RULES = ("long_word", "unfinished", "short", "javascript", "policy")


@dataclasses.dataclass(frozen=True)
class _Verdicts:
    """Of each line.

    Attributes:
      removed: index of the first rule that removes it; -1 where none does.
      lorem_ipsum, curly_brackets: whether it has them, and no rule that comes before removes it.
      sentences: in it.
    """

    removed: np.ndarray
    lorem_ipsum: np.ndarray
    curly_brackets: np.ndarray
    sentences: np.ndarray


def clean(config: C4FilterConfig, texts: Texts) -> tuple[Texts, dict[str, pa.Array]]:
    """Returns the lines that are left, without white space around them, and what was removed."""
    lines = texts.text_lines
    words = texts.words("whitespace")
    long = np.flatnonzero(words.bytes > config.word_chars)
    long = long[texts.chars(words.starts[long], words.ends[long]) > config.word_chars]
    too_long = np.zeros(len(lines), bool)
    too_long[lines.at(words.starts[long])] = True
    short = lines.num_words < config.line_words
    verdicts = _judge(config, lines, too_long, _unfinished(config, lines), short)
    cited = _without_citations(lines) if config.remove_citations else {}
    if cited:
        rows, strings = np.array(list(cited)), list(cited.values())
        changed = Texts.of(strings).lines
        # What stood before a citation at the end of the line was followed by a space, and still is.
        spaces = np.array([config.require_terminal and text[-1:].isspace() for text in strings])
        unfinished = _unfinished(config, changed) | spaces
        others = _judge(config, changed, too_long[rows], unfinished, short[rows])
        for field in dataclasses.fields(verdicts):
            getattr(verdicts, field.name)[rows] = getattr(others, field.name)
    verdicts.removed[texts.after_text_lines] = len(_RULES)  # no rule's
    left = verdicts.removed < 0
    edited = np.zeros(len(lines), bool)
    edited[list(cited)] = True
    counts = {f"removed_{rule}_lines": lines.sum(verdicts.removed == i) for i, rule in enumerate(_RULES)}
    attributes = {
        "sentences": lines.sum(verdicts.sentences * left),
        "lorem_ipsum": lines.sum(verdicts.lorem_ipsum),
        "curly_brackets": lines.sum(verdicts.curly_brackets),
        **counts,
        "removed_citations": lines.sum(edited & left),
    }
    contents = {row: text.strip().encode() for row, text in cited.items()}
    return texts.of_lines(lines.stripped, left, contents), {name: pa.array(count) for name, count in attributes.items()}


def _judge(
    config: C4FilterConfig, lines: Lines, too_long: np.ndarray, unfinished: np.ndarray, short: np.ndarray
) -> _Verdicts:
    nothing = np.zeros(len(lines), bool)
    javascript = lines.contain(("javascript",)) if config.remove_javascript else nothing
    policy = lines.contain(config.policy_phrases)
    before = too_long | unfinished | short
    return _Verdicts(
        removed=np.select([too_long, unfinished, short, javascript, policy], range(len(_RULES)), -1),
        lorem_ipsum=lines.contain(("lorem ipsum",)) & ~before,
        curly_brackets=lines.have("{") & ~before & ~javascript,
        sentences=sentences.count(config.sentences, lines),
    )


def _unfinished(config: C4FilterConfig, lines: Lines) -> np.ndarray:
    """Which lines end with no punctuation of a sentence, or with an ellipsis."""
    if not config.require_terminal:
        return np.zeros(len(lines), bool)
    return ~lines.end_with(_TERMINAL) | lines.end_with(_ELLIPSIS)


def _without_citations(lines: Lines) -> dict[int, str]:
    """The lines with citations as on Wikipedia, by index, without them."""
    data = lines.texts.data
    brackets = np.flatnonzero(data == ord("["))
    after = data[brackets + 1]
    may_cite = (after >= 0x80) | ((after - np.uint8(ord("0"))) < 10) | np.isin(after, np.frombuffer(b"]ec", np.uint8))
    rows = np.unique(lines.at(brackets[may_cite]))
    texts = zip(rows.tolist(), lines.stripped.strings(rows), strict=True)
    return {row: changed for row, text in texts if (changed := _CITATION.sub("", text)) != text}


def measure_paragraphs(config: C4ParagraphFilterConfig, texts: Texts) -> dict[str, pa.Array]:
    """Characters of the line that is the `lines`-th longest of its document; 0 where there are fewer."""
    lines = texts.lines
    order = np.lexsort((-lines.chars, lines.document))
    nth = lines.first[:-1] + config.lines - 1
    enough = lines.per_document >= config.lines
    chars = lines.chars[order[np.where(enough, nth, 0)]] if len(lines) else np.zeros(len(texts), np.int64)
    return {"long_line_chars": pa.array(np.where(enough, chars, 0))}
