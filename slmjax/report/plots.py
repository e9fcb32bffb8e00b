"""Line plots as inline SVG. Text and axes take the colour of the page, so that light and dark both read well."""

import html
import io
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from slmjax.report.read import Series

# Stand-ins, which the SVG's text replaces by the page's colours for text (below) and for curves (page.py).
COLOURS = ("#010200", "#010201", "#010202", "#010203", "#010204", "#010205")
_TEXT_COLOUR = "#010206"
_MAX_POINTS = 2000


class Line(NamedTuple):
    """One curve: "raw" is thin and pale, "smooth" a full line, "points" has a marker at each value."""

    label: str
    series: Series
    style: Literal["raw", "smooth", "points"]
    colour: str


def thin(series: Series) -> Series:
    """Returns every n-th point, so that at most 2,000 are drawn; the last one is kept."""
    every = -(-len(series.steps) // _MAX_POINTS)
    return Series(series.steps[::-every][::-1], series.values[::-every][::-1])


def smooth(series: Series) -> Series:
    """Returns Gaussian averages, a fiftieth of the curve wide (standard deviation); unlike an EMA they do not lag."""
    count = len(series.values)
    sigma = max(count / 50, 1.0)
    weights = np.exp(-0.5 * (np.arange(1 - count, count) / sigma) ** 2)
    total = np.convolve(weights, series.values, "valid")
    return Series(series.steps, total / np.convolve(weights, np.ones(count), "valid"))


def line_plot(name: str, title: str, lines: Sequence[Line], *, log_scale: bool = False) -> str:
    """Returns an <svg> of `lines` over steps. `name` makes its ids unique in the page; the output is reproducible."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "slmjax",
        "text.parse_math": False,
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(
            ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"),
            _TEXT_COLOUR,
        ),
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(6, 3.4), layout="constrained")  # without pyplot there is no state and no display
        axes = figure.add_subplot()
        for line in lines:
            style = {
                "raw": {"linewidth": 0.8, "alpha": 0.45},
                "smooth": {"linewidth": 1.8},
                "points": {"linewidth": 1.2, "marker": "o", "markersize": 4.5},
            }[line.style]
            axes.plot(line.series.steps, line.series.values, color=line.colour, label=line.label, **style)
        axes.set_title(title, loc="left", fontsize=12)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(_tick))
        if log_scale:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(_tick))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.15)
        axes.margins(x=0.02)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=10)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), name, title)


def _tick(value: float, _position: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= max(size, 1e4):
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _inline(svg: str, name: str, title: str) -> str:
    """Makes a stand-alone SVG fit into a page: no prologue, ids of its own, the page's colour and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = svg.replace(_TEXT_COLOUR, "currentColor")
    for i, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--curve-{i})")
    svg = re.sub(r"font-family: [^;]*", "font-family: system-ui, sans-serif", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)
