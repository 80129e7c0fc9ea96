"""The picture of a comparison: loss over samples, over bytes and over wall time, as SVG in a page and as PNG.

One layout, two ways to draw it: `Line` and `Text` in pixels become SVG elements here and dots in `training.lab.png`.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from training.lab.compare import Outcome, Point
from training.lab.png import Canvas

WIDTH: Final = 1380
HEIGHT: Final = 470
_PANEL: Final = 430
_LEFT, _TOP, _PLOT_WIDTH, _PLOT_HEIGHT = 62, 46, 350, 310
# Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLOURS: Final = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_INK: Final = "#333333"
_GRID: Final = "#dddddd"
_TICKS: Final = 5


@dataclass(frozen=True, slots=True)
class Line:
    """A polyline in pixels."""

    points: tuple[tuple[float, float], ...]
    colour: str
    width: float = 1.0


@dataclass(frozen=True, slots=True)
class Text:
    """A text whose baseline starts, ends or is centred (`anchor`) at x, y."""

    x: float
    y: float
    text: str
    anchor: str = "start"
    colour: str = _INK


Shape = Line | Text


@dataclass(frozen=True, slots=True)
class Axis:
    """A scale from values to pixels; `log` for bytes, which differ by orders."""

    low: float
    high: float
    log: bool = False

    def share(self, value: float) -> float:
        """Return where `value` lies between the ends, 0 to 1."""
        if self.log:
            return (math.log(max(value, self.low)) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Return round values inside the axis."""
        if self.log:
            decades = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            return [10.0**decade for decade in decades]
        raw = (self.high - self.low) / _TICKS
        unit = 10 ** math.floor(math.log10(raw))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
        first = math.ceil(self.low / step)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def shapes(outcomes: Sequence[Outcome], title: str) -> list[Shape]:
    """Return the whole picture. `outcomes` have at least one point each."""
    losses = [point.loss for each in outcomes for point in each.points]
    spread = max(max(losses) - min(losses), 1e-6)
    loss = Axis(min(losses) - 0.05 * spread, max(losses) + 0.05 * spread)
    name = "held-out loss" if all(each.held_out for each in outcomes) else "loss"
    drawn: list[Shape] = [Text(_LEFT, 20, title)]
    panels: tuple[tuple[str, Callable[[Point], float], bool], ...] = (
        ("samples", lambda point: point.samples, False),
        ("payload bytes of one site", lambda point: point.payload_bytes, True),
        ("seconds", lambda point: point.seconds, False),
    )
    for number, (label, of, log) in enumerate(panels):
        drawn += _panel(number * _PANEL + _LEFT, outcomes, loss, (label, of, log), name)
    for number, each in enumerate(outcomes):
        x, y = _LEFT + number % 4 * 320, HEIGHT - 50 + number // 4 * 22
        drawn.append(Line(((x, y - 4), (x + 26, y - 4)), _colour(number), 3))
        drawn.append(Text(x + 34, y, f"{each.strategy} ({each.codec}): {each.last_loss:.3f}"))
    return drawn


def _panel(
    left: float,
    outcomes: Sequence[Outcome],
    loss: Axis,
    panel: tuple[str, Callable[[Point], float], bool],
    name: str,
) -> list[Shape]:
    label, of, log = panel
    values = [of(point) for each in outcomes for point in each.points]
    positive = [value for value in values if value > 0] or [1.0]
    # A curve over bytes begins at the left edge, where nothing has been sent yet.
    axis = Axis(min(positive) / 3, max(*positive, min(positive) * 10), log=True) if log else Axis(0.0, max(positive))
    bottom = _TOP + _PLOT_HEIGHT

    def place(value: float, height: float) -> tuple[float, float]:
        return left + axis.share(value) * _PLOT_WIDTH, bottom - loss.share(height) * _PLOT_HEIGHT

    drawn: list[Shape] = []
    for tick in axis.ticks():
        x = place(tick, loss.low)[0]
        drawn += [Line(((x, _TOP), (x, bottom)), _GRID), Text(x, bottom + 16, short(tick), "middle")]
    for tick in loss.ticks():
        y = place(axis.low, tick)[1]
        drawn += [Line(((left, y), (left + _PLOT_WIDTH, y)), _GRID), Text(left - 6, y + 4, f"{tick:.4g}", "end")]
    drawn.append(Line(((left, _TOP), (left, bottom), (left + _PLOT_WIDTH, bottom)), _INK))
    drawn.append(Text(left + _PLOT_WIDTH / 2, bottom + 36, f"{name} over {label}", "middle"))
    for number, each in enumerate(outcomes):
        track = [place(of(point), point.loss) for point in each.points]
        if len(track) > 1:
            drawn.append(Line(tuple(track), _colour(number), 2))
    return drawn


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def short(value: float) -> str:
    """Return a number as people write it beside an axis: 20k, 1.5M, 10G."""
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:g}{letter}"
    return f"{value:g}"


def svg(drawn: Sequence[Shape]) -> str:
    """Return the picture as an SVG element."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">'
    ]
    for shape in drawn:
        if isinstance(shape, Line):
            track = " ".join(f"{x:.1f},{y:.1f}" for x, y in shape.points)
            parts.append(
                f'<polyline points="{track}" fill="none" stroke="{shape.colour}" stroke-width="{shape.width}"/>'
            )
        else:
            text = html.escape(shape.text)
            parts.append(
                f'<text x="{shape.x:.1f}" y="{shape.y:.1f}" text-anchor="{shape.anchor}" fill="{shape.colour}">{text}</text>'
            )
    return "\n".join([*parts, "</svg>"])


def png(drawn: Sequence[Shape]) -> bytes:
    """Return the picture as a PNG file."""
    canvas = Canvas(WIDTH, HEIGHT)
    for shape in drawn:
        if isinstance(shape, Line):
            canvas.line(shape.points, shape.colour, shape.width)
        else:
            canvas.text(shape.x, shape.y, shape.text, shape.anchor, shape.colour)
    return canvas.encoded()


def page(outcomes: Sequence[Outcome], title: str, about: str) -> str:
    """Return an HTML page with the picture and the table of figures; it loads nothing."""
    rows = "\n".join(
        f"<tr><td>{html.escape(each.strategy)}<td>{html.escape(each.codec)}<td>{each.last_loss:.4f}"
        f"<td>{each.payload_bytes:,}<td>{'-' if each.ratio is None else f'{each.ratio:.1f}'}"
        f"<td>{each.rounds}<td>{each.seconds:.1f}<td>{each.stall_s:.1f}"
        for each in outcomes
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>body{{font:15px/1.5 sans-serif;max-width:{WIDTH}px;margin:2em auto;color:{_INK}}}
td,th{{text-align:right;padding:.2em .9em}}td:first-child,th:first-child,td:nth-child(2),th:nth-child(2){{text-align:left}}</style>
<h1>{html.escape(title)}</h1><p>{html.escape(about)}</p>
{svg(shapes(outcomes, title))}
<table><tr><th>strategy<th>codec<th>last loss<th>payload bytes of one site<th>times smaller than fp32<th>rounds<th>seconds<th>of them waiting
{rows}</table></html>
"""
