"""Histograms as inline SVG: what was kept and what was dropped on top of each other, and bounds as lines."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from data_pipelines.report.sketch import Sketch
from slmjax.page import Html, escape

_WIDTH, _HEIGHT = 360, 168
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 352, 18, 140
_MOST_BINS = 48
_LOG_FROM = 32  # numbers that reach so far are shown on a logarithmic axis
_LEAST = 1e-200  # smaller numbers are shown as zero
_PER_OCTAVE = 64  # bins of a sketch: edges of the plot's bins must be edges of these


@dataclasses.dataclass(frozen=True)
class Line:
    """A bound to draw; `upper` where what is greater lies beyond."""

    label: str
    value: float
    upper: bool = False


@dataclasses.dataclass(frozen=True)
class _Axis:
    """Where bins lie. On a logarithmic axis zero has a bin of its own, left of the others."""

    edges: np.ndarray
    logarithmic: bool
    zero: bool

    @property
    def of_numbers(self) -> bool:
        """Whether each bin is a whole number's."""
        return not self.logarithmic and self.edges[1] - self.edges[0] == 1

    def place(self, value: float) -> float:
        """Position of a number, inside the plot."""
        left = _LEFT + (22 if self.zero else 0)
        if self.zero and value <= 0:
            return _LEFT + 7.0
        low, high = self.edges[0], self.edges[-1]
        if self.logarithmic:
            share = math.log(max(value, low) / low) / math.log(high / low)
        else:
            share = (value - low) / (high - low)
        return left + min(max(share, 0.0), 1.0) * (_RIGHT - left)


def draw(title: str, kept: Sketch, dropped: Sketch, lines: Sequence[Line] = ()) -> Html:
    """Returns an <svg> of numbers, of which there is at least one."""
    both = kept + dropped
    if not all(float(line.value).is_integer() for line in lines):  # a share that is 0 everywhere is a share
        both = dataclasses.replace(both, whole=False)
    axis = _axis(both, [line.value for line in lines])
    lower, upper = (_counts(sketch, axis) for sketch in (kept, dropped))
    total = lower + upper
    logarithmic = bool(total.max() > 0.5 * total.sum() and (total > 0).sum() > 1)

    def height(counts: np.ndarray) -> np.ndarray:
        scaled = np.log1p(counts) / math.log1p(total.max()) if logarithmic else counts / total.max()
        return scaled * (_BOTTOM - _TOP - 12)

    xs = [axis.place(edge) for edge in axis.edges]
    boxes = list(itertools.pairwise(xs))
    if axis.zero:
        boxes.insert(0, (_LEFT + 1.0, _LEFT + 13.0))
    base, top = height(lower), height(total)
    parts = [
        _bars("kept", boxes, np.zeros(len(boxes)), base),
        _bars("dropped", boxes, base, top),
        f'<path class="axis" d="M{_LEFT} {_BOTTOM}H{_RIGHT}"/>',
        *_x_ticks(axis),
        _text(_LEFT - 4, _BOTTOM, "0", "end"),
        _text(_LEFT - 4, _TOP + 12 + 8, _short(float(total.max())), "end"),
    ]
    if logarithmic:
        parts.append(_text(_LEFT - 4, _TOP + 32, "(log)", "end"))
    for line in sorted(lines, key=lambda line: line.value):
        x = axis.place(line.value + (line.upper and both.whole and axis.of_numbers))
        anchor = "end" if x > (_LEFT + _RIGHT) / 2 else "start"
        parts.append(f'<path class="bound" d="M{x:.1f} {_TOP}V{_BOTTOM}"/>')
        parts.append(_text(x + (-3 if anchor == "end" else 3), _TOP - 4, line.label, anchor, "bound"))
    return Html(f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>')


def _axis(sketch: Sketch, bounds: Sequence[float]) -> _Axis:
    """An axis that holds all but the outermost thousandths of the numbers, and the bounds."""
    low, high = sketch.quantile(0.001), sketch.quantile(0.999)
    ends = [*bounds, low, high]
    low, high = min(ends), max(ends)
    if low >= 0 and high >= _LOG_FROM:
        middles = sketch.middles[0].tolist()
        positive = [middle for middle in middles if middle > 0] + [bound for bound in bounds if bound > 0]
        first = math.floor(math.log2(max(min(positive), low, 1.0 if sketch.whole else 0.0)))
        last = math.ceil(math.log2(high * 1.0001))
        first = max(first, last - _MOST_BINS)
        steps = next((steps for steps in (8, 4, 2) if (last - first) * steps <= _MOST_BINS), 1)
        edges: list[float] = []
        for octave in range(first, last):
            # Between whole numbers there is nothing to count.
            parts = min(steps, 2 ** max(octave, 0)) if sketch.whole else steps
            edges += [2.0**octave * (1 + i / parts) for i in range(parts)]
        return _Axis(np.array([*edges, 2.0**last]), True, 0 in sketch.bins)
    most = max(abs(low), abs(high))
    most = most if most > _LEAST else 0.0
    finest = 2.0 ** (math.floor(math.log2(most)) - math.log2(_PER_OCTAVE)) if most else 1.0
    finest = max(finest, 1.0) if sketch.whole else finest
    width = max(finest, 2.0 ** math.ceil(math.log2(max(high - low, finest) / _MOST_BINS)))
    first = math.floor(low / width)
    last = max(math.floor(high / width) + 1, first + 4)
    return _Axis(np.arange(first, last + 1) * width, False, False)


def _counts(sketch: Sketch, axis: _Axis) -> np.ndarray:
    """Numbers in each bin; those outside of the plot are in the outermost ones."""
    middles, found = sketch.middles
    counts = np.zeros(len(axis.edges) - 1, np.int64)
    bins = np.searchsorted(axis.edges, np.rint(middles) if sketch.whole else middles, side="right") - 1
    of_zero = (middles == 0) & axis.zero
    np.add.at(counts, bins[~of_zero].clip(0, len(counts) - 1), found[~of_zero])
    return np.append(found[of_zero].sum(), counts) if axis.zero else counts


def _bars(kind: str, boxes: Sequence[tuple[float, float]], low: np.ndarray, high: np.ndarray) -> str:
    """One path; what holds anything is high enough to be seen."""
    path = []
    for (left, right), bottom, top in zip(boxes, low.tolist(), high.tolist(), strict=True):
        if top > bottom:
            gap = min(0.6, (right - left) / 8)
            size = max(top - bottom, 1.2)
            path.append(f"M{left + gap:.1f} {_BOTTOM - bottom:.1f}v{-size:.1f}H{right - gap:.1f}v{size:.1f}z")
    return f'<path class="{kind}" d="{"".join(path)}"/>' if path else ""


def _x_ticks(axis: _Axis) -> list[str]:
    low, high = axis.edges[0], axis.edges[-1]
    if axis.logarithmic:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        values = [10.0**power for power in powers if low <= 10.0**power <= high]
        if len(values) < 3:
            values = [m * 10.0**power for power in powers for m in (1, 2, 5) if low <= m * 10.0**power <= high]
    else:
        step = next(
            m * 10.0**power
            for power in range(math.floor(math.log10(high - low)) - 1, 400)
            for m in (1, 2, 5)
            if (high - low) / (m * 10.0**power) <= 6
        )
        values = [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
        values = [value for value in values if value < high or not axis.of_numbers]
    parts = []
    for value in values:
        x = axis.place(value + (0.5 if axis.of_numbers else 0))
        parts.append(f'<path class="axis" d="M{x:.1f} {_BOTTOM}v3"/>')
        parts.append(_text(x, _BOTTOM + 15, _short(value), "middle"))
    if axis.zero:
        parts.append(_text(_LEFT + 7, _BOTTOM + 15, "0", "middle"))
    return parts


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'


def _short(value: float) -> str:
    """A number in few characters."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
