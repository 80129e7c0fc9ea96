"""What the market knows of its links now, read from what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from broker.database.probes import LinkMeasurement, LinkProbe
from broker.links.estimate import Estimate, Measurement, estimate
from broker.links.states import ProbeState

Way = tuple[str, str]
# An older one weighs less than a thousandth of a new one.
HALF_LIVES_READ: Final = 10


def read_estimates(session: Session, half_life_s: float, now_ms: int) -> dict[Way, Estimate]:
    """Return what is known of each measured direction (source, target) at `now_ms`."""
    oldest_ms = now_ms - round(HALF_LIVES_READ * half_life_s * 1000)
    rows = session.scalars(
        select(LinkMeasurement)
        .where(LinkMeasurement.measured_ms > oldest_ms)
        .order_by(LinkMeasurement.measured_ms, LinkMeasurement.probe_id)
    )
    by_way: dict[Way, list[Measurement]] = {}
    for row in rows:
        measurement = Measurement(row.measured_ms, row.bandwidth_bits_per_s, row.delay_s, row.loss)
        by_way.setdefault((row.source, row.target), []).append(measurement)
    found = {way: estimate(measurements, now_ms, half_life_s) for way, measurements in by_way.items()}
    return {way: each for way, each in found.items() if each is not None}


def read_withheld(session: Session, found: Mapping[Way, Estimate]) -> set[Way]:
    """Return the measured directions between sites whose newest probe failed: what was measured there stands."""
    failed = (
        select(LinkProbe.dialler, LinkProbe.listener, func.max(LinkProbe.ended_ms))
        .where(LinkProbe.state == ProbeState.FAILED)
        .group_by(LinkProbe.dialler, LinkProbe.listener)
    )
    return {
        way
        for dialler, listener, ended_ms in session.execute(failed)
        for way in ((dialler, listener), (listener, dialler))
        if way in found and ended_ms is not None and ended_ms > found[way].measured_ms
    }
