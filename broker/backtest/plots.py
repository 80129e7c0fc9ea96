"""Plots as inline SVG: axes with units, direct legends, colours that colour-blind readers can tell apart.

The palette is Okabe and Ito's; lines differ by dash as well, so that a plot survives grey printing. No script,
no fonts and no links: the page must stand alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

import numpy as np

COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5b5b5b", "#8a6d00", "#000000")
DASHES: Final = ("", "7 3", "2 3", "9 3 2 3", "", "5 2", "2 2", "12 3", "4 4")
WIDTH: Final = 860
HEIGHT: Final = 340
LEFT: Final = 76
RIGHT: Final = 170
TOP: Final = 14
BOTTOM: Final = 52
TICKS: Final = 5
POINTS_MAX: Final = 600
# Numbers from here are written with separators, and from here without decimals.
THOUSANDS_FROM: Final = 10_000
WHOLE_FROM: Final = 100


@dataclass(frozen=True, slots=True)
class Line:
    """A named series of points."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True, slots=True)
class Axis:
    """A scale from `low` to `high`, linear or logarithmic, with its label and unit."""

    label: str
    low: float
    high: float
    log: bool = False
    ticks: tuple[tuple[float, str], ...] = ()

    def share(self, value: float) -> float:
        """Return where a value stands between 0 and 1."""
        if self.log:
            value = max(value, self.low)
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def marks(self) -> list[tuple[float, str]]:
        """Return the ticks: those given, decades of a logarithm, or about five round numbers."""
        if self.ticks:
            return [tick for tick in self.ticks if self.low <= tick[0] <= self.high]
        if self.log:
            decades = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            return [(10.0**power, _number(10.0**power)) for power in decades]
        step = _step(self.low, self.high)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [(place * step, _number(place * step)) for place in range(first, last + 1)]


def spanning(label: str, values: Sequence[float], *, zero: bool = True) -> Axis:
    """Return a linear axis that holds all finite values, with 0 unless told otherwise, and some air."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high <= low:
        high = low + 1.0
    step = _step(low, high)
    return Axis(label, math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step)


def lines(series: Sequence[Line], x: Axis, y: Axis, *, title: str, steps: bool = False) -> str:
    """Return a line plot; `steps` draws each value as holding until the next."""
    body = [_frame(x, y)]
    for number, line in enumerate(series):
        points = _path(line, x, y, steps=steps)
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        body.append(f'<path d="{points}" fill="none" stroke="{colour}" stroke-width="1.8"{dashes}/>')
        at = TOP + 12 + 19 * number
        body.append(
            f'<line x1="{WIDTH - RIGHT + 12}" x2="{WIDTH - RIGHT + 40}" y1="{at}" y2="{at}" stroke="{colour}" '
            f'stroke-width="2.4"{dashes}/><text x="{WIDTH - RIGHT + 46}" y="{at + 4}">{escape(line.name)}</text>'
        )
    return _svg(body, title, HEIGHT)


def bars(
    rows: Sequence[tuple[str, Sequence[float]]],
    groups: Sequence[str],
    axis: Axis,
    *,
    title: str,
    marker: float | None = None,
) -> str:
    """Return horizontal bars, for each row one of each group; `marker` draws a line to compare with."""
    thick = 15 if len(groups) == 1 else 10
    pitch = len(groups) * thick + 10
    left, right = 150, 96 if len(groups) == 1 else RIGHT
    height = TOP + pitch * len(rows) + BOTTOM
    span = WIDTH - left - right

    def at(value: float) -> float:
        return left + span * axis.share(value)

    bottom = TOP + pitch * len(rows)
    body = []
    for value, text in axis.marks():
        body.append(f'<line class="grid" x1="{at(value):.1f}" x2="{at(value):.1f}" y1="{TOP}" y2="{bottom}"/>')
        body.append(f'<text x="{at(value):.1f}" y="{bottom + 18}" text-anchor="middle">{text}</text>')
    body.append(f'<text x="{left + span / 2}" y="{bottom + 40}" text-anchor="middle">{escape(axis.label)}</text>')
    zero = at(min(max(0.0, axis.low), axis.high))
    for row, (name, values) in enumerate(rows):
        top = TOP + pitch * row + 5
        body.append(
            f'<text x="{left - 8}" y="{top + len(groups) * thick / 2 + 4}" text-anchor="end">{escape(name)}</text>'
        )
        for group, value in enumerate(values):
            if not math.isfinite(value):
                continue
            x, width = min(zero, at(value)), abs(at(value) - zero)
            y = top + group * thick
            body.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{thick - 2}" fill="{COLOURS[group]}"/>'
            )
            if len(groups) == 1:
                body.append(f'<text x="{max(zero, at(value)) + 5:.1f}" y="{y + thick - 4}">{_number(value)}</text>')
    if marker is not None:
        body.append(
            f'<line x1="{at(marker):.1f}" x2="{at(marker):.1f}" y1="{TOP}" y2="{bottom}" class="ink" stroke-dasharray="3 3"/>'
        )
    if len(groups) > 1:
        for group, name in enumerate(groups):
            y = TOP + 6 + 19 * group
            body.append(f'<rect x="{WIDTH - right + 14}" y="{y}" width="13" height="10" fill="{COLOURS[group]}"/>')
            body.append(f'<text x="{WIDTH - right + 33}" y="{y + 9}">{escape(name)}</text>')
    return _svg(body, title, height)


def cumulative(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return the points of a distribution: sorted values, thinned, and the share at or below each."""
    ordered = np.sort(np.asarray(values, dtype=float))
    ordered = ordered[np.isfinite(ordered)]
    if not len(ordered):
        return [], []
    places = np.unique(np.linspace(0, len(ordered) - 1, POINTS_MAX).astype(int))
    return ordered[places].tolist(), ((places + 1) / len(ordered)).tolist()


def _path(line: Line, x: Axis, y: Axis, *, steps: bool) -> str:
    parts: list[str] = []
    before: float | None = None
    for value_x, value_y in zip(line.x, line.y, strict=True):
        if not (math.isfinite(value_x) and math.isfinite(value_y)):
            before = None
            continue
        at_x, at_y = _x(x, value_x), _y(y, value_y)
        if before is None:
            parts.append(f"M{at_x:.1f} {at_y:.1f}")
        else:
            parts.append(f"H{at_x:.1f}V{at_y:.1f}" if steps else f"L{at_x:.1f} {at_y:.1f}")
        before = at_y
    return "".join(parts)


def _x(axis: Axis, value: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * min(1.0, max(0.0, axis.share(value)))


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(1.0, max(0.0, axis.share(value)))


def _frame(x: Axis, y: Axis) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for value, text in x.marks():
        at = _x(x, value)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{escape(text)}</text>')
    for value, text in y.marks():
        at = _y(y, value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{escape(text)}</text>')
    parts.append(f'<path class="ink" fill="none" d="M{LEFT} {TOP}V{bottom}H{right}"/>')
    middle = (TOP + bottom) / 2
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{bottom + 40}" text-anchor="middle">{escape(x.label)}</text>')
    parts.append(
        f'<text x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">{escape(y.label)}</text>'
    )
    return "".join(parts)


def _svg(body: Sequence[str], title: str, height: int) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" '
        f'aria-label="{escape(title, quote=True)}"><title>{escape(title)}</title>{"".join(body)}</svg>'
    )


def _step(low: float, high: float) -> float:
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * unit for unit in (1, 2, 2.5, 5, 10) if power * unit >= rough * (1 - 1e-9))


def _number(value: float) -> str:
    if value == 0:
        return "0"
    size = abs(value)
    if size >= THOUSANDS_FROM:
        return f"{value:,.0f}"
    if size >= WHOLE_FROM:
        return f"{value:.0f}"
    return f"{value:.3g}"
