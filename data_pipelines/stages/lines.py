"""What the lines of a document look like. Empty lines do not count."""

import numpy as np
import pyarrow as pa

from data_pipelines.stages.ranges import share
from data_pipelines.stages.texts import Texts
from slmjax.config.filters import LineFilterConfig

# The list of RefinedWeb (arXiv:2306.01116) and what Markdown adds.
_BULLETS = ("•", "‣", "▶", "◀", "◦", "■", "□", "▪", "▫", "–", "- ", "* ", "+ ")  # noqa: RUF001
_ELLIPSES = ("...", "…")


def measure(config: LineFilterConfig, texts: Texts) -> dict[str, pa.Array]:
    """Lengths of lines, the share of the characters in long ones, the shares of bullets and of ellipses."""
    lines = texts.lines
    filled = lines.num_words > 0
    chars = np.where(filled, lines.chars, 0)
    number, total = lines.sum(filled), lines.sum(chars)
    longest = np.zeros(len(texts), np.int64)
    np.maximum.at(longest, lines.document, chars)
    long = lines.sum(np.where(chars > config.long_line_chars, chars, 0))
    bullets = lines.sum(filled & lines.start_with(_BULLETS))
    ellipses = lines.sum(filled & lines.end_with(_ELLIPSES))
    return {
        "lines": pa.array(number),
        "mean_line_chars": pa.array(share(total, number)),
        "line_chars": pa.array(longest),
        "long_line_share": pa.array(share(long, total)),
        "bullet_line_share": pa.array(share(bullets, number)),
        "ellipsis_line_share": pa.array(share(ellipses, number)),
    }
