"""Line plots and interval bars as SVG text that stands alone in a page: no plotting library.

Colours are CSS variables (`--series-0` ... `--series-4`, `--ink`, `--muted`, `--rule`), so that the
page decides them for light and dark; every series has a dash pattern too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

_WIDTH, _HEIGHT = 520, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 22, 12, 44
_LEGEND_LINE = 20
_CHARACTER = 6.7  # mean width of a legend's character at 12 px, generous
_MOST_POINTS = 120  # more are drawn as the mean of equal stretches, with a band from least to most
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4")
_SERIES = len(_DASHES)


@dataclass(frozen=True)
class Curve:
    """A named line; points with a value that is not finite are left out."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Plot:
    """What one plot shows. `references` are labelled horizontal lines; log=None picks the axis."""

    title: str
    y_label: str
    curves: Sequence[Curve]
    references: Mapping[str, float] = field(default_factory=dict)
    x_label: str = "step"
    log: bool | None = None
    fraction: bool = False  # values in [0, 1], shown as percentages


@dataclass(frozen=True)
class _Point:
    """Mean, least and most of a stretch of a curve (all equal for a single point)."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class _Axis:
    """Maps values to pixels; `start` and `end` are the pixels of low and high."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (
            (math.log10(v) for v in (self.low, self.high, value))
            if self.log
            else (self.low, self.high, value)
        )
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        return log_ticks(self.low, self.high) if self.log else nice_ticks(self.low, self.high)


def line_plot(plot: Plot) -> str:
    """The plot as one <svg> element; a note in its place if there is nothing finite to draw."""
    lines = {curve.label: _points(curve) for curve in plot.curves}
    lines = {label: points for label, points in lines.items() if points}
    references = {label: y for label, y in plot.references.items() if math.isfinite(y)}
    if not lines:
        return '<p class="empty">Nothing was logged for this plot.</p>'

    legend, legend_height = _legend([*lines, *references], len(lines))
    top = _TOP + legend_height
    height = _HEIGHT + legend_height
    x_axis, y_axis = _axes(plot, list(lines.values()), list(references.values()), top, height)
    parts = [legend, _frame(plot, x_axis, y_axis, top, height)]
    for i, (label, value) in enumerate(references.items()):
        parts.append(_reference(label, value, y_axis, len(lines) + i, plot.fraction))
    for i, (label, points) in enumerate(lines.items()):
        parts.append(_line(label, points, x_axis, y_axis, i, plot))
    summary = f"{plot.title}: {', '.join(lines)} by {plot.x_label}"
    return (
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{escape(summary)}">{"".join(parts)}</svg>'
    )


def interval_bar(value: float, low: float, high: float, before: float | None = None) -> str:
    """A rate in [0, 1] with its interval on a small scale; a hollow mark shows where it was before.

    Returns an empty string if a value is not finite.
    """
    if not all(math.isfinite(v) for v in (value, low, high)):
        return ""
    x = _Axis(0, 1, 5, 115)
    text = f"{value:.0%}, 95 % interval {low:.0%} to {high:.0%}"
    mark = ""
    if before is not None and math.isfinite(before):
        text += f", before {before:.0%}"
        mark = f'<circle class="before" cx="{x(before):.1f}" cy="9" r="3.5"/>'
    return (
        f'<svg class="bar" viewBox="0 0 120 18" width="120" height="18" role="img" '
        f'aria-label="{text}"><title>{text}</title>'
        f'<line class="scale" x1="{x(0):.1f}" x2="{x(1):.1f}" y1="9" y2="9"/>{mark}'
        f'<line class="interval" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="9" y2="9"/>'
        f'<circle class="value" cx="{x(value):.1f}" cy="9" r="4"/></svg>'
    )


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high], with their doubles and fivefolds when there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, (last - first) // 6)
    decades = [10.0**i for i in range(first, last + 1, stride)]
    ticks = [t for t in decades if low <= t <= high]
    if len(ticks) < 3:
        ticks = [m * t for t in decades for m in (1, 2, 5) if low <= m * t <= high]
    return ticks


def number(value: float, fraction: bool = False) -> str:
    """A short form of a number for ticks and hover titles: three significant digits."""
    if fraction:
        return f"{100 * value:.3g} %"
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _points(curve: Curve) -> list[_Point]:
    """Finite points by x; long curves as the means of at most _MOST_POINTS equal stretches."""
    pairs = zip(curve.x, curve.y, strict=True)
    finite = sorted((x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y))
    stretch = -(-len(finite) // _MOST_POINTS) or 1
    points = []
    for start in range(0, len(finite), stretch):
        part = finite[start : start + stretch]
        ys = [y for _, y in part]
        mean_x = sum(x for x, _ in part) / len(part)
        points.append(_Point(mean_x, sum(ys) / len(ys), min(ys), max(ys)))
    return points


def _axes(
    plot: Plot, lines: list[list[_Point]], references: list[float], top: int, height: int
) -> tuple[_Axis, _Axis]:
    xs = [p.x for points in lines for p in points]
    lows = [p.low for points in lines for p in points] + references
    highs = [p.high for points in lines for p in points] + references
    low, high = min(lows), max(highs)
    log = plot.log if plot.log is not None else low > 0 and high / low > 50
    if log and low > 0:
        low, high = low / 1.15, high * 1.15
    else:
        log = False
        room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        # An axis that almost reaches zero shows zero: distances and fractions read better so.
        low = 0.0 if 0 <= low < 0.5 * high else low - room
        high = high + room
        if plot.fraction and max(highs) <= 1:
            high = min(high, 1.0)
    left, right = min(xs), max(xs)
    if left == right:
        left, right = left - 1, right + 1
    return (
        _Axis(left, right, _LEFT, _WIDTH - _RIGHT),
        _Axis(low, high, height - _BOTTOM, top, log),
    )


def _frame(plot: Plot, x_axis: _Axis, y_axis: _Axis, top: int, height: int) -> str:
    """Grid lines, tick labels and axis labels."""
    bottom, right = height - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for tick in y_axis.ticks():
        y = y_axis(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        label = number(tick, plot.fraction)
        parts.append(f'<text class="tick y" x="{_LEFT - 7}" y="{y + 4:.1f}">{label}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    for tick in x_axis.ticks():
        x = x_axis(tick)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 17}">{number(tick)}</text>')
    middle_x, middle_y = (_LEFT + right) / 2, (top + bottom) / 2
    kind = " (log scale)" if y_axis.log else ""
    parts.append(
        f'<text class="label" x="{middle_x}" y="{height - 8}">{escape(plot.x_label)}</text>'
        f'<text class="label" transform="translate(13 {middle_y}) rotate(-90)">'
        f"{escape(plot.y_label)}{kind}</text>"
    )
    return "".join(parts)


def _legend(labels: list[str], num_curves: int) -> tuple[str, int]:
    """A row (or rows) of line samples with names, and its height in pixels."""
    x, y, parts = float(_LEFT), 14, []
    for i, label in enumerate(labels):
        wide = 34 + _CHARACTER * len(label)
        if x > _LEFT and x + wide > _WIDTH - _RIGHT:
            x, y = float(_LEFT), y + _LEGEND_LINE
        kind = "curve" if i < num_curves else "reference"
        parts.append(
            f'<line class="{kind} series-{i % _SERIES}" x1="{x:.0f}" x2="{x + 22:.0f}" '
            f'y1="{y - 4}" y2="{y - 4}"{_dash(i, kind)}/>'
            f'<text class="legend" x="{x + 28:.0f}" y="{y}">{escape(label)}</text>'
        )
        x += wide + 8
    return "".join(parts), y + 4


def _reference(label: str, value: float, y_axis: _Axis, index: int, fraction: bool) -> str:
    y = y_axis(value)
    return (
        f'<line class="reference series-{index % _SERIES}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" '
        f'y1="{y:.1f}" y2="{y:.1f}"{_dash(index, "reference")}>'
        f"<title>{escape(label)}: {number(value, fraction)}</title></line>"
    )


def _line(
    label: str, points: list[_Point], x_axis: _Axis, y_axis: _Axis, index: int, plot: Plot
) -> str:
    """The band of a long curve, its line, and a point with a hover title at each of its places."""
    series = f"series-{index % _SERIES}"
    parts = []
    if any(p.low < p.high for p in points):
        upper = [f"{x_axis(p.x):.1f},{y_axis(p.high):.1f}" for p in points]
        lower = [f"{x_axis(p.x):.1f},{y_axis(p.low):.1f}" for p in reversed(points)]
        parts.append(f'<polygon class="band {series}" points="{" ".join(upper + lower)}"/>')
    path = " ".join(f"{x_axis(p.x):.1f},{y_axis(p.y):.1f}" for p in points)
    parts.append(f'<polyline class="curve {series}" points="{path}"{_dash(index, "curve")}/>')
    dense = len(points) > 30  # marks would hide the line: keep them to hover over, unseen
    for p in points:
        title = (
            f"{escape(label)}: {number(p.y, plot.fraction)}, {escape(plot.x_label)} {number(p.x)}"
        )
        parts.append(
            f'<circle class="{"unseen" if dense else "mark"} {series}" cx="{x_axis(p.x):.1f}" '
            f'cy="{y_axis(p.y):.1f}" r="{6 if dense else 3}"><title>{title}</title></circle>'
        )
    return "".join(parts)


def _dash(index: int, kind: str) -> str:
    pattern = "5 4" if kind == "reference" else _DASHES[index % _SERIES]
    return f' stroke-dasharray="{pattern}"' if pattern else ""
