"""The links as an admin sees them: what is declared, what was measured and how sure that is, what the market counts with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import func, select, tuple_
from sqlalchemy.orm import Session

from broker.database.probes import LinkMeasurement, LinkProbe
from broker.database.tables import Link
from broker.links.estimate import Estimate, Figures, counted
from broker.links.estimates import read_estimates, read_withheld

LINKS_PER_PAGE: Final = 200
# Of more sites a matrix is no longer read, the list below it is.
MATRIX_SITES_MAX: Final = 20

Way = tuple[str, str]


@dataclass(frozen=True, slots=True)
class LinkRow:
    """One direction of a link. `trouble` says where both ends disagreed, or why the newest probe failed."""

    source: str
    target: str
    declared: Figures
    measured: Estimate | None
    counted: Figures
    age_s: float | None
    tried_ms: int | None
    trouble: str


def list_links(
    session: Session, half_life_s: float, now_ms: int, *, after: Sequence[str] = ("", ""), limit: int = LINKS_PER_PAGE
) -> list[LinkRow]:
    """Return `limit` links by source and target, and one more where there is a next page."""
    found = read_estimates(session, half_life_s, now_ms)
    withheld = read_withheld(session, found)
    disagreements, probes = _disagreements(session), _newest_probes(session)
    rows = []
    position = tuple_(Link.source, Link.target)
    wanted = select(Link).where(position > tuple_(*after)).order_by(Link.source, Link.target).limit(limit + 1)
    for link in session.scalars(wanted):
        way = (link.source, link.target)
        declared = Figures(link.bandwidth_bits_per_s, link.delay_s, link.loss)
        estimate, probe = found.get(way), probes.get(way)
        failed = "" if probe is None or probe.state != "failed" else f"the newest probe failed: {probe.detail}"
        rows.append(
            LinkRow(
                source=link.source,
                target=link.target,
                declared=declared,
                measured=estimate,
                counted=counted(declared, estimate, withheld=way in withheld),
                age_s=None if estimate is None else (now_ms - estimate.measured_ms) / 1000,
                tried_ms=None if probe is None else probe.asked_ms,
                trouble="; ".join(part for part in (disagreements.get(way, ""), failed) if part),
            )
        )
    return rows


def matrix(rows: Sequence[LinkRow]) -> tuple[list[str], dict[Way, LinkRow]]:
    """Return the sites in order and each direction between two of them; no sites where they are too many to read."""
    sites = sorted({name for row in rows for name in (row.source, row.target)})
    if len(sites) > MATRIX_SITES_MAX:
        return [], {}
    return sites, {(row.source, row.target): row for row in rows}


def _disagreements(session: Session) -> dict[Way, str]:
    """Return what the two ends of each direction said differently in its newest measurement."""
    newest = (
        select(LinkMeasurement.source, LinkMeasurement.target, func.max(LinkMeasurement.measured_ms))
        .group_by(LinkMeasurement.source, LinkMeasurement.target)
        .subquery()
    )
    rows = session.scalars(
        select(LinkMeasurement).where(
            tuple_(LinkMeasurement.source, LinkMeasurement.target, LinkMeasurement.measured_ms).in_(select(newest))
        )
    )
    return {(row.source, row.target): row.disagreement for row in rows if row.disagreement}


def _newest_probes(session: Session) -> dict[Way, LinkProbe]:
    """Return the newest probe between two sites, by both directions."""
    newest = (
        select(LinkProbe.dialler, LinkProbe.listener, func.max(LinkProbe.asked_ms))
        .group_by(LinkProbe.dialler, LinkProbe.listener)
        .subquery()
    )
    rows = session.scalars(
        select(LinkProbe)
        .where(tuple_(LinkProbe.dialler, LinkProbe.listener, LinkProbe.asked_ms).in_(select(newest)))
        .order_by(LinkProbe.asked_ms)
    )
    return {way: row for row in rows for way in ((row.dialler, row.listener), (row.listener, row.dialler))}
