"""What owners refuse: a site's veto as the next rounds see it, so that no job is proposed where it was just declined.

A veto of one configuration bars that one for some rounds (`barred_configurations`). One that reaches further is kept here until
its time is over or the site's policy is another: the job is then not offered to that site, or not to several sites at once.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from broker.database.refusals import BarredConfiguration, SiteRefusal
from broker.database.tables import Job, Lease, Placement, Round
from broker.market import Market
from broker.transitions import FINAL_JOB_STATES, note_change, record_event
from sites.protocol import RefusalScope, Veto

# However far ahead an owner says that a refusal lasts, the site is asked again after this.
REFUSAL_MS_MAX: Final = 7 * 86_400_000


@dataclass(frozen=True, slots=True)
class Refused:
    """Where a job is not wanted now: these sites, or any several at once; `reasons` are sentences."""

    sites: frozenset[str]
    gangs: bool
    reasons: tuple[str, ...]

    def __or__(self, other: Refused) -> Refused:
        """Return where either does not want it."""
        return Refused(self.sites | other.sites, self.gangs or other.gangs, (*self.reasons, *other.reasons))


NOWHERE: Final = Refused(frozenset(), gangs=False, reasons=())


def remember(session: Session, market: Market, lease: Lease, refusal: Veto) -> bool:
    """Keep what a veto says of the rounds to come; say whether that is news."""
    if refusal.scope is RefusalScope.CONFIGURATION:
        newest = session.scalar(select(Round.round_number).order_by(Round.round_number.desc()).limit(1)) or 0
        session.merge(
            BarredConfiguration(
                job_id=lease.job_id,
                configuration_key=session.get_one(Placement, lease.placement_id).configuration_key,
                until_round=newest + market.settings.barred_rounds,
                reason=f"{lease.site_id}: {refusal.reason}"[:1000],
            )
        )
        return True
    now_ms = market.clock.now_ms()
    until_ms = refusal.until_ms or now_ms + round(market.settings.refusal_s * 1000)
    row = SiteRefusal(
        job_id=lease.job_id,
        site_id=lease.site_id,
        scope=refusal.scope,
        code=refusal.code,
        reason=refusal.reason[:1000],
        until_ms=min(max(until_ms, now_ms), now_ms + REFUSAL_MS_MAX),
    )
    known = session.get(SiteRefusal, (lease.job_id, lease.site_id))
    if known is not None and known.until_ms > now_ms and (known.scope, known.code) == (row.scope, row.code):
        return False  # said again with each heartbeat while the lease runs: its time runs from the first
    session.merge(row)
    record_event(
        session,
        "refusal",
        now_ms=now_ms,
        job_id=lease.job_id,
        site_id=lease.site_id,
        lease_id=lease.lease_id,
        after=row.scope,
        detail=f"{refusal.code}: {refusal.reason}"[:1000],
    )
    note_change(session)
    return True


def forget_refusals(session: Session, site_id: str) -> None:
    """Ask a site anew about everything: its policy is another."""
    session.execute(delete(SiteRefusal).where(SiteRefusal.site_id == site_id))


def drop_refusals_over(session: Session, now_ms: int) -> None:
    """Forget refusals whose time is over, and ask for a round where a job still waits for that."""
    over = list(session.scalars(select(SiteRefusal).where(SiteRefusal.until_ms <= now_ms)))
    for row in over:
        if session.get_one(Job, row.job_id).state not in FINAL_JOB_STATES:
            note_change(session)
        session.delete(row)


def read_refusals(session: Session, now_ms: int) -> dict[str, Refused]:
    """Return what is refused now, by job."""
    found: dict[str, Refused] = {}
    rows = session.scalars(select(SiteRefusal).where(SiteRefusal.until_ms > now_ms).order_by(SiteRefusal.site_id))
    for row in rows:
        before = found.get(row.job_id, NOWHERE)
        here = frozenset({row.site_id} if row.scope == RefusalScope.SITE else ())
        reasons = (*before.reasons, f"{row.site_id} declined it ({row.code}: {row.reason})")
        found[row.job_id] = Refused(before.sites | here, before.gangs or not here, reasons)
    return found


def sites_left(allowed: Collection[str] | None, refused: Refused, sites: Collection[str]) -> tuple[str, ...] | None:
    """Return the sites that a job may still use; None where it may use any."""
    if not refused.sites:
        return None if allowed is None else tuple(allowed)
    return tuple(sorted(set(sites if allowed is None else allowed) - refused.sites))
