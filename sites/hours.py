"""Times of the week, as owners write them: when a policy lets leases in, when an ask is another.

{zone: Europe/Berlin, open: [{days: mon-fri, from: 20:00, to: 07:00}, {days: sat-sun}]}

A window that ends before it begins goes on past midnight; it belongs to the day on which it began.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from typing import Annotated, Final
from zoneinfo import ZoneInfo

from pydantic import BeforeValidator, Field, field_validator

from sites.yaml_file import Section

DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
WINDOWS_MAX: Final = 32
MINUTES_PER_DAY: Final = 24 * 60
# A week and a day: every time of the week comes within it, whatever a clock change does.
_LOOKAHEAD: Final = dt.timedelta(days=8)

Span = tuple[dt.datetime, dt.datetime]


def _minutes(value: object) -> int:
    # YAML 1.1 reads 20:00 as 20 * 60 + 0, which is just the number of minutes; 08:00 and 00:30 stay text. A smaller
    # number is what a person wrote for an hour.
    if isinstance(value, int) and not isinstance(value, bool) and (value == 0 or 60 <= value <= MINUTES_PER_DAY):  # noqa: PLR2004  minutes of an hour
        return value
    hour, colon, minute = str(value).partition(":")
    if colon and hour.isdecimal() and minute.isdecimal() and int(minute) < 60:  # noqa: PLR2004  minutes of an hour
        total = int(hour) * 60 + int(minute)
        if total <= MINUTES_PER_DAY:
            return total
    message = f"{value!r} is not a time of day; write it as 08:30, midnight at the end as 24:00"
    raise ValueError(message)


def _days(value: object) -> tuple[int, ...]:
    found: list[int] = []
    for part in str(value).lower().split(","):
        first, dash, last = (word.strip() for word in part.partition("-"))
        if first not in DAYS or (dash and last not in DAYS):
            message = f"{value!r} are no days; write them as mon-fri, or sat,sun"
            raise ValueError(message)
        begin, end = DAYS.index(first), DAYS.index(last or first)
        found += range(begin, end + 1) if begin <= end else [*range(begin, 7), *range(end + 1)]
    return tuple(sorted(set(found)))


class Window(Section):
    """A part of some days; left out, every day and all of it."""

    days: Annotated[tuple[int, ...], BeforeValidator(_days)] = tuple(range(7))
    begins: Annotated[int, BeforeValidator(_minutes)] = Field(default=0, alias="from")
    ends: Annotated[int, BeforeValidator(_minutes)] = Field(default=MINUTES_PER_DAY, alias="to")


def check_zone(zone: str) -> str:
    """Return the name of a time zone. Raises ValueError where this host knows none of that name."""
    try:
        ZoneInfo(zone)
    except (OSError, ValueError, LookupError):
        message = f"this host knows no time zone {zone!r}; write one such as Europe/Berlin, or UTC"
        raise ValueError(message) from None
    return zone


class Hours(Section):
    """When something is so, in the local time of a zone."""

    zone: str = Field(default="UTC", max_length=64)
    open: tuple[Window, ...] = Field(min_length=1, max_length=WINDOWS_MAX)

    _known_zone = field_validator("zone")(check_zone)

    def covers(self, moment: dt.datetime) -> bool:
        """Return whether a moment lies within."""
        return any(begins <= moment < ends for begins, ends in self.spans(moment, moment + dt.timedelta(seconds=1)))

    def spans(self, begins: dt.datetime, ends: dt.datetime) -> list[Span]:
        """Return the times within, from `begins` to `ends`, in UTC, joined and in order."""
        found = sorted(span for window in self.open for span in spans(window, self.zone, begins, ends))
        joined: list[Span] = []
        for start, end in found:
            if joined and start <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
            else:
                joined.append((start, end))
        return joined

    def closed(self, begins: dt.datetime, ends: dt.datetime) -> list[Span]:
        """Return the times without, from `begins` to `ends`, in UTC and in order."""
        edges = [begins, *(edge for span in self.spans(begins, ends) for edge in span), ends]
        pairs = zip(edges[::2], edges[1::2], strict=True)
        return [(start, end) for start, end in pairs if start < end]

    def next_opening(self, moment: dt.datetime) -> dt.datetime | None:
        """Return when it is so next, `moment` where it is so now; None where it never is."""
        found = self.spans(moment, moment + _LOOKAHEAD)
        return found[0][0] if found else None


def spans(window: Window, zone: str, begins: dt.datetime, ends: dt.datetime) -> Iterator[Span]:
    """Yield when one window is, between two moments, in UTC."""
    here = ZoneInfo(zone)
    day = begins.astimezone(here).date() - dt.timedelta(days=1)
    while day <= ends.astimezone(here).date():
        if day.weekday() in window.days:
            overnight = window.ends <= window.begins
            start = _at(day, window.begins, here)
            end = _at(day + dt.timedelta(days=1) if overnight else day, window.ends, here)
            start, end = max(start, begins), min(end, ends)
            if start < end:
                yield start, end
        day += dt.timedelta(days=1)


def _at(day: dt.date, minutes: int, here: ZoneInfo) -> dt.datetime:
    day += dt.timedelta(days=minutes // MINUTES_PER_DAY)
    local = dt.datetime.combine(day, dt.time(minutes % MINUTES_PER_DAY // 60, minutes % 60), tzinfo=here)
    return local.astimezone(dt.UTC)
