"""What the operator of a site sees of it: what it earned and how busy it was by the hour, and what sharing was worth."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from broker.database.certificates import RoundCertificate
from broker.database.tables import Lease, UsageReport
from pricing.money import MILLISECONDS_PER_HOUR

HOURS_SHOWN: Final = 48
HOURS_A_DAY: Final = 24
# How far back a round is looked for whose economics have been worked out.
CERTIFICATES_READ_MAX: Final = 50


@dataclass(frozen=True, slots=True)
class Delivery:
    """What a site delivered and earned in each of the last hours, oldest first; the last one is not over yet.

    `hours` counts back from now: 0 is the hour that runs. Usage counts in the hour in which it was reported.
    """

    hours: tuple[int, ...]
    earned_micros: tuple[int, ...]
    gpu_hours: tuple[float, ...]

    @property
    def earned_day_micros(self) -> int:
        """Earned in the last day, the running hour included."""
        return sum(self.earned_micros[-HOURS_A_DAY:])

    def utilisation_day(self, gpus: int) -> float:
        """Return the share of `gpus` that was delivered in the last day; 0 where there are none."""
        return sum(self.gpu_hours[-HOURS_A_DAY:]) / (gpus * HOURS_A_DAY) if gpus else 0.0


@dataclass(frozen=True, slots=True)
class Standing:
    """What a site and its own customers had in one round in the federation, and would have had alone."""

    round_number: int
    rent_micros_per_hour: int
    federated_micros_per_hour: int
    alone_micros_per_hour: int
    shapley_micros_per_hour: int | None


def delivery(session: Session, site_id: str, now_ms: int) -> Delivery:
    """Return what a site delivered and earned by the hour."""
    newest = now_ms // MILLISECONDS_PER_HOUR
    first = newest - HOURS_SHOWN + 1
    since_ms = first * MILLISECONDS_PER_HOUR
    hour = UsageReport.received_ms // MILLISECONDS_PER_HOUR
    rows = session.execute(
        select(
            hour,
            func.sum(UsageReport.payout_micros + UsageReport.link_revenue_micros),
            func.sum(UsageReport.gpu_milliseconds),
        )
        .join(Lease, Lease.lease_id == UsageReport.lease_id)
        .where(
            Lease.site_id == site_id,
            # Leases that were over long before have no reports in these hours.
            or_(Lease.ended_ms.is_(None), Lease.ended_ms >= since_ms - MILLISECONDS_PER_HOUR),
            UsageReport.received_ms >= since_ms,
        )
        .group_by(hour)
    )
    found = {int(index): (int(earned), float(gpu_ms) / MILLISECONDS_PER_HOUR) for index, earned, gpu_ms in rows}
    hours = range(first, newest + 1)
    return Delivery(
        hours=tuple(index - newest for index in hours),
        earned_micros=tuple(found.get(index, (0, 0.0))[0] for index in hours),
        gpu_hours=tuple(found.get(index, (0, 0.0))[1] for index in hours),
    )


def newest_standing(session: Session, site_id: str) -> Standing | None:
    """Return what sharing was worth to a site in the newest round for which that is known, None before there is one."""
    rows = session.execute(
        select(RoundCertificate.round_number, RoundCertificate.sites)
        .where(RoundCertificate.economics == "done")
        .order_by(RoundCertificate.round_number.desc())
        .limit(CERTIFICATES_READ_MAX)
    )
    for number, text in rows:
        documents: list[dict[str, Any]] = json.loads(text)
        for row in documents:
            if row["site_id"] == site_id:
                return Standing(
                    round_number=number,
                    rent_micros_per_hour=row["rent_micros_per_hour"],
                    federated_micros_per_hour=row["federated_micros_per_hour"],
                    alone_micros_per_hour=row["alone_micros_per_hour"],
                    shapley_micros_per_hour=row["shapley_micros_per_hour"],
                )
    return None
