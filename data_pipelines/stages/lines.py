"""What the lines of a document look like. Empty lines do not count."""

import pyarrow as pa

from slmjax.config import LineFilterConfig

# The list of RefinedWeb (arXiv:2306.01116) and what Markdown adds.
_BULLETS = ("•", "‣", "▶", "◀", "◦", "■", "□", "▪", "▫", "–", "- ", "* ", "+ ")  # noqa: RUF001
_ELLIPSES = ("...", "…")


def measure(config: LineFilterConfig, texts: list[str]) -> dict[str, pa.Array]:
    """Lengths of lines, the share of the characters in long ones, the shares of bullets and of ellipses."""
    rows = [_measure(text, config.long_line_chars) for text in texts]
    names = ("mean_line_chars", "line_chars", "long_line_share", "bullet_line_share", "ellipsis_line_share")
    return {name: pa.array([row[i] for row in rows], pa.float64()) for i, name in enumerate(names)}


def _measure(text: str, long_line_chars: int) -> tuple[float, float, float, float, float]:
    lines = [line for line in text.split("\n") if line and not line.isspace()]
    lengths = [len(line) for line in lines]
    total = sum(lengths)
    if not total:
        return 0.0, 0.0, 0.0, 0.0, 0.0
    bullets = sum(line.lstrip().startswith(_BULLETS) for line in lines)
    ellipses = sum(line.rstrip().endswith(_ELLIPSES) for line in lines)
    long = sum(length for length in lengths if length > long_line_chars)
    return total / len(lines), max(lengths), long / total, bullets / len(lines), ellipses / len(lines)
