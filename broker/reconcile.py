"""Reconcile: look at everything that stands and bring it to where it should be.

Level-triggered and idempotent: it may run at any time, twice at once, or late, and only the delay
changes. It ends what has run out (proposals, terms, livenesses), opens the views that are needed,
notices sites that fell silent, and asks for a round when a term is up for renewal.
"""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from broker.attempts import lose_lease
from broker.database.tables import Job, Lease, LeasedGpu, Placement, Site
from broker.leases import end_placement, free_leased_gpus, liveness_over, requeue, void_proposal
from broker.market import Market
from broker.rounds.snapshot import renewal_starts_ms
from broker.transitions import LeaseState, PlacementState, SiteState, change_state, is_round_due, note_change
from broker.views import check_view


def reconcile(market: Market) -> bool:
    """Run one pass over sites, leases, placements and views; say whether a round is due now."""

    def work(session: Session) -> tuple[set[str], bool]:
        _mark_silent_sites(session, market)
        wake = _end_dead_leases(session, market)
        session.flush()
        for placement in list(
            session.scalars(
                select(Placement).where(Placement.state != PlacementState.ENDED).order_by(Placement.placement_id)
            )
        ):
            wake.update(_look_at(session, market, placement))
        session.flush()
        return wake, is_round_due(session)

    wake, due = market.database.write("reconcile", work)
    for site_id in sorted(wake):
        market.doorbell.wake_site(site_id)
    if due:
        market.doorbell.ring_round()
    return due


def _mark_silent_sites(session: Session, market: Market) -> None:
    silent_s = market.settings.liveness_s + market.settings.liveness_margin_s
    for site in session.scalars(select(Site).where(Site.state == SiteState.LIVE)):
        if site.heard_monotonic_ms is None:
            continue
        if site.heard_era != market.clock.era():
            # Heard before this machine's last boot: count from now, which only delays.
            site.heard_era = market.clock.era()
            site.heard_monotonic_ms = round(market.clock.monotonic_s() * 1000)
        elif market.clock.monotonic_s() * 1000 - site.heard_monotonic_ms > silent_s * 1000:
            change_state(session, site, SiteState.SILENT, now_ms=market.clock.now_ms())
            note_change(session)


def _end_dead_leases(session: Session, market: Market) -> set[str]:
    """End active leases whose liveness is over, and free the GPUs of ended ones for which it is."""
    wake: set[str] = set()
    for lease in list(session.scalars(select(Lease).where(Lease.state == LeaseState.ACTIVE).order_by(Lease.lease_id))):
        if lease.state == LeaseState.ACTIVE and liveness_over(market, lease):
            silent = f"site {lease.site_id} was not heard for longer than its lease's liveness"
            wake.update(lose_lease(session, market, lease, "expired", silent))
    session.flush()
    held = select(LeasedGpu.lease_id).where(LeasedGpu.lease_id == Lease.lease_id, LeasedGpu.live).exists()
    for lease in list(session.scalars(select(Lease).where(Lease.state == LeaseState.ENDED, held))):
        if liveness_over(market, lease):
            free_leased_gpus(session, lease)
    return wake


def _look_at(session: Session, market: Market, placement: Placement) -> list[str]:
    now_ms = market.clock.now_ms()
    if placement.state == PlacementState.PROPOSED:
        if now_ms < placement.proposal_ends_ms:
            return []
        missing = ", ".join(
            session.scalars(
                select(Lease.site_id)
                .where(Lease.placement_id == placement.placement_id, Lease.state == LeaseState.PROPOSED)
                .order_by(Lease.site_id)
            )
        )
        return void_proposal(session, market, placement, "unconfirmed", f"{missing} did not confirm in time")
    if placement.state != PlacementState.ACTIVE:
        return []
    assert placement.term_ends_ms is not None, "an active placement has a term"
    if now_ms >= placement.term_ends_ms:
        wake = end_placement(session, market, placement, "term_ended")
        job = session.get_one(Job, placement.job_id)
        requeue(session, market, job, "term_ended", "its term ended and was not renewed; it waits for another")
        return wake
    if now_ms >= renewal_starts_ms(placement):
        note_change(session)
    return check_view(session, market, placement)
