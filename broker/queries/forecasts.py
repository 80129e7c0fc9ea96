"""What was forecast of a job, and how forecasts came out: what a job's page and the admins' page of calibration show."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from broker.database.forecasts import Forecast
from broker.database.tables import Job

FORECASTS_READ_MAX: Final = 2_000
RECENT_SHOWN: Final = 30


@dataclass(frozen=True, slots=True)
class Calibration:
    """How the newest forecasts of a family came out: `covered` is the share inside their interval, 0.9 is promised.

    `late` is the share that came after the interval, `early` before it. `width` is the median of the interval's end over
    its beginning, from when it was stated. Jobs that ended otherwise count as late where their interval was over by then.
    """

    family: str
    forecasts: int
    covered: float
    early: float
    late: float
    width: float


@dataclass(frozen=True, slots=True)
class Scored:
    """One forecast with what came."""

    row: Forecast
    name: str
    is_inside: bool


def newest_forecasts(session: Session, job_id: str) -> dict[str, Forecast]:
    """Return the newest forecast of a job's start and of its finish."""
    rows = select(Forecast).where(Forecast.job_id == job_id).order_by(Forecast.number)
    return {row.what: row for row in session.scalars(rows)}


def calibrations(session: Session) -> list[Calibration]:
    """Return how the newest forecasts of each family came out."""
    families: dict[str, list[Forecast]] = {}
    for row, _ in _scored(session, FORECASTS_READ_MAX):
        families.setdefault(row.family, []).append(row)
    return [_calibration(family, rows) for family, rows in sorted(families.items())]


def recent_forecasts(session: Session) -> list[Scored]:
    """Return the forecasts that were scored last, newest first."""
    return [Scored(row, job.name, is_inside(row)) for row, job in _scored(session, RECENT_SHOWN)]


def is_inside(row: Forecast) -> bool:
    """Say whether what came lies inside the interval; what never came does not."""
    return row.actual_ms is not None and row.low_ms <= row.actual_ms <= row.high_ms


def _scored(session: Session, limit: int) -> list[tuple[Forecast, Job]]:
    # What ended otherwise before its interval was over says nothing of the forecast.
    counts = Forecast.actual_ms.is_not(None) | (Forecast.high_ms < Forecast.scored_ms)
    rows = session.execute(
        select(Forecast, Job)
        .join(Job, Job.job_id == Forecast.job_id)
        .where(Forecast.scored_ms.is_not(None), counts)
        .order_by(Forecast.scored_ms.desc(), Forecast.job_id, Forecast.what)
        .limit(limit)
    )
    return [(row, job) for row, job in rows]


def _calibration(family: str, rows: list[Forecast]) -> Calibration:
    early = sum(row.actual_ms is not None and row.actual_ms < row.low_ms for row in rows)
    inside = sum(is_inside(row) for row in rows)
    widths = [(row.high_ms - row.stated_ms + 1000) / (row.low_ms - row.stated_ms + 1000) for row in rows]
    return Calibration(
        family=family,
        forecasts=len(rows),
        covered=inside / len(rows),
        early=early / len(rows),
        late=(len(rows) - inside - early) / len(rows),
        width=median(widths) if widths else math.nan,
    )
