r"""How much mathematics a document has: formulas, LaTeX commands and symbols, after OpenWebMath (arXiv:2310.06786)."""

import functools
import re

import numpy as np
import pyarrow as pa

from data_pipelines.stages.counting import count
from data_pipelines.stages.ranges import Ranges, share
from data_pipelines.stages.texts import Texts
from slmjax.config.filters import MathFilterConfig

_FORMULA = re.compile(rb"\$\$[^$]*\$\$|\$[^$]*\$")
# Mathematical operators, their supplements, arrows and the alphabets of formulas.
_SYMBOLS = ((0x2190, 0x21FF), (0x2200, 0x22FF), (0x27C0, 0x27FF), (0x2900, 0x2AFF), (0x1D400, 0x1D7FF))
_ACCENTED = np.array(sorted(map(ord, "üïöêäâîûôèéàÜÏÖÊÄÂÎÛÔÈÉÀ")))


def measure(config: MathFilterConfig, texts: Texts) -> dict[str, pa.Array]:
    """Formulas between dollar signs, in LaTeX's brackets and MathML; LaTeX commands; symbols; accented letters."""
    formulas = np.zeros(len(texts), np.int64)
    for document in np.flatnonzero(count(texts.data, 0xFF, ord("$"), texts.starts, texts.ends) > 1).tolist():
        content = texts.raw[texts.starts[document] : texts.ends[document]]
        formulas[document] = len(_FORMULA.findall(content))
    slashes = np.flatnonzero(texts.data == ord("\\"))
    opened = slashes[np.isin(texts.data[slashes + 1], np.frombuffer(b"([", np.uint8))]
    markup = []
    position = texts.lower.find(b"<math")
    while position >= 0:
        markup.append(position)
        position = texts.lower.find(b"<math", position + 1)
    formulas += _by_document(texts, np.concatenate([opened, np.array(markup, np.int64)]))
    points = texts.beyond.points if texts.beyond is not None else np.zeros(0, np.int64)
    positions = texts.beyond.positions if texts.beyond is not None else points
    symbols = np.zeros(len(points), bool)
    for first, last in _SYMBOLS:
        symbols |= (points >= first) & (points <= last)
    accented = _by_document(texts, positions[np.isin(points, _ACCENTED)])
    commands = _by_document(texts, _commands(config.commands, texts, slashes))
    num_symbols = _by_document(texts, positions[symbols])
    return {
        "formulas": pa.array(formulas),
        "latex_commands": pa.array(commands),
        "math_symbols": pa.array(num_symbols),
        "math_marks": pa.array(formulas + commands + num_symbols),
        "accented_share": pa.array(share(accented, texts.num_chars)),
    }


def _by_document(texts: Texts, positions: np.ndarray) -> np.ndarray:
    """How many of the positions are in each document."""
    return np.bincount(np.searchsorted(texts.starts, positions, side="right") - 1, minlength=len(texts))


def _commands(known: tuple[str, ...], texts: Texts, slashes: np.ndarray) -> np.ndarray:
    """Where a known command stands."""
    starts = slashes + 1
    ends = starts.copy()
    for _ in range(max(map(len, known), default=0) + 1):
        ends += (texts.data[ends] | 0x20) - np.uint8(ord("a")) < 26
    return starts[np.isin(Ranges(texts, starts, ends).hashes, _hashes(known))]


@functools.cache
def _hashes(words: tuple[str, ...]) -> np.ndarray:
    return Texts.of(words).words("whitespace").hashes
