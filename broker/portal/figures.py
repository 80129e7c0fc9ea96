"""How figures read on a page: money, times, sizes and shares, as Jinja filters.

Times are shown in UTC with their machine-readable form beside them; amounts keep every micro-credit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

from markupsafe import Markup

from pricing.money import format_credits

_UNITS: Final = ("B", "kB", "MB", "GB", "TB", "PB")
_SPANS: Final = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))
_ID_SHOWN: Final = 14
_NOTHING: Final = "\N{EN DASH}"


def credits_of(micros: int | None) -> str:
    """Return micro-credits as credits, `1234.50`; a dash where there is no amount."""
    return _NOTHING if micros is None else format_credits(micros)


def instant(ms: int | None) -> Markup:
    """Return a UTC instant as a `time` element; a dash where there is none."""
    if ms is None:
        return Markup.escape(_NOTHING)
    when = datetime.fromtimestamp(ms / 1000, UTC)
    return Markup('<time datetime="{}">{}</time>').format(
        when.isoformat(timespec="seconds"), when.strftime("%Y-%m-%d %H:%M:%S")
    )


def span(seconds: float | None) -> str:
    """Return a length of time in its two largest units: `2 h 5 min`."""
    if seconds is None or not math.isfinite(seconds):
        return _NOTHING
    left = max(0, round(seconds))
    parts: list[str] = []
    for size, unit in _SPANS:
        if left >= size or (unit == "s" and not parts):
            parts.append(f"{left // size} {unit}")
            left %= size
    return " ".join(parts[:2])


def size(count: float | None) -> str:
    """Return a number of bytes in decimal units, as links and egress are billed: `1.2 GB`."""
    if count is None:
        return _NOTHING
    value = float(count)
    for unit in _UNITS:
        if abs(value) < 1000 or unit == _UNITS[-1]:  # noqa: PLR2004  the step between two units
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return ""


def bits(rate: float) -> str:
    """Return a link's bandwidth: `1.0 Gbit/s`."""
    for factor, unit in ((1e9, "Gbit/s"), (1e6, "Mbit/s"), (1e3, "kbit/s")):
        if rate >= factor:
            return f"{rate / factor:.1f} {unit}"
    return f"{rate:.0f} bit/s"


def number(value: float | None) -> str:
    """Return a number with thin spaces between thousands and three meaningful digits after the point."""
    if value is None or not math.isfinite(value):
        return _NOTHING
    if isinstance(value, int) or float(value).is_integer():
        text = f"{int(value):,}"
    else:
        text = f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3g}"  # noqa: PLR2004  below, digits matter more
    return text.replace(",", "\u202f")


def share(part: float, whole: float) -> str:
    """Return `part` of `whole` in per cent; a dash of nothing."""
    if not whole:
        return _NOTHING
    percent = 100 * part / whole
    return "below 0.01 %" if 0 < percent < 0.01 else f"{percent:.2g} %" if 0 < percent < 1 else f"{percent:.0f} %"  # noqa: PLR2004  the smallest that reads well


def shortened(name: str) -> str:
    """Return the beginning of an id or a digest, long enough to tell it from others on a page."""
    return name if len(name) <= _ID_SHOWN else f"{name[:_ID_SHOWN]}…"


def places(configuration_key: str) -> str:
    """Return a configuration's key as people say it: `8 H100 at ada + 4 H100 at bob`."""
    parts = []
    for part in configuration_key.split("+"):
        pool_id, _, gpus = part.rpartition(":")
        site_id, _, gpu_type = pool_id.partition("/")
        parts.append(f"{gpus} {gpu_type} at {site_id}")
    return " + ".join(parts)


FILTERS: Final[dict[str, Callable[..., Any]]] = {
    "credits": credits_of,
    "instant": instant,
    "span": span,
    "size": size,
    "bits": bits,
    "number": number,
    "share": share,
    "shortened": shortened,
    "places": places,
}
