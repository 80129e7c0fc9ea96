"""Reconcile: look at everything that stands and bring it to where it should be.

Level-triggered and idempotent: it may run at any time, twice at once, or late, and only the delay
changes. It ends what has run out (proposals, terms, livenesses), opens the views that are needed,
notices sites that fell silent, fails jobs that waited beyond their deadline, and asks for a round when a term is up for
renewal, a bar is about to lift or a time that an owner announced has come.
"""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from broker.attempts import Ending, end_job, lose_lease
from broker.database.refusals import BarredConfiguration
from broker.database.standing import LEASE_STANDS, PLACEMENT_STANDS
from broker.database.tables import Job, Lease, LeasedGpu, Placement, Round, Site
from broker.leases import (
    end_placement,
    free_leased_gpus,
    leases_of,
    liveness_over,
    requeue,
    stay_away,
    void_proposal,
)
from broker.market import Market
from broker.moves import look_at_move, open_farewell, open_move_of
from broker.offers import note_times_passed
from broker.refusals import drop_refusals_over
from broker.rounds.snapshot import renewal_starts_ms
from broker.staging import note_waits_over
from broker.terms import release_finished
from broker.transitions import (
    EndCause,
    JobState,
    LeaseState,
    PlacementState,
    SiteState,
    change_state,
    is_round_due,
    note_change,
)
from broker.views import check_view
from training.spec import JobSpec


def reconcile(market: Market) -> bool:
    """Run one pass over sites, leases, placements and views; say whether a round is due now."""

    def work(session: Session) -> tuple[set[str], bool]:
        _mark_silent_sites(session, market)
        wake = _end_dead_leases(session, market)
        session.flush()
        # Sorted here: to give them in order, SQLite would go through every placement that ever was.
        standing = session.scalars(select(Placement).where(PLACEMENT_STANDS))
        for placement in sorted(standing, key=lambda placement: placement.placement_id):
            wake.update(_look_at(session, market, placement))
        session.flush()
        _fail_overdue_jobs(session, market)
        _look_again_at_barred_jobs(session)
        drop_refusals_over(session, market.clock.now_ms())
        note_times_passed(session, market.clock.now_ms())
        note_waits_over(session, market.clock.now_ms())
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
    standing = session.scalars(select(Lease).where(LEASE_STANDS))
    for lease in sorted(standing, key=lambda lease: lease.lease_id):
        if lease.state == LeaseState.ACTIVE and liveness_over(market, lease):
            silent = f"site {lease.site_id} was not heard for longer than its lease's liveness"
            wake.update(lose_lease(session, market, lease, EndCause.EXPIRED, silent))
    session.flush()
    held = select(LeasedGpu.lease_id).where(LeasedGpu.live)
    for lease in list(session.scalars(select(Lease).where(Lease.state == LeaseState.ENDED, Lease.lease_id.in_(held)))):
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
        return void_proposal(session, market, placement, EndCause.UNCONFIRMED, f"{missing} did not confirm in time")
    if placement.state != PlacementState.ACTIVE:
        return []
    assert placement.term_ends_ms is not None, "an active placement has a term"
    wake = look_at_move(session, market, placement, term_is_over=now_ms >= placement.term_ends_ms)
    if placement.state != PlacementState.ACTIVE:
        return wake
    if now_ms >= placement.term_ends_ms:
        wake = end_placement(session, market, placement, EndCause.TERM_ENDED)
        job = session.get_one(Job, placement.job_id)
        requeue(session, market, job, "term_ended", "its term ended and was not renewed; it waits for another")
        return wake
    if release_finished(session, placement):
        note_change(session)  # what it holds no longer may pay for more
    _end_stale_joins(session, market, placement, now_ms)
    if now_ms >= renewal_starts_ms(placement):
        if not _was_offered_again(session, placement, now_ms):
            note_change(session)
        elif now_ms >= _farewell_starts_ms(placement) and open_move_of(session, placement.placement_id) is None:
            wake += open_farewell(session, market, placement)
    return [*wake, *check_view(session, market, placement)]


def _end_stale_joins(session: Session, market: Market, placement: Placement, now_ms: int) -> None:
    """End the proposals of sites that were to join a running gang and did not confirm in time."""
    if now_ms < placement.proposal_ends_ms:
        return
    for lease in leases_of(session, placement):
        if lease.state in {LeaseState.PROPOSED, LeaseState.CONFIRMED}:
            stay_away(session, market, lease, EndCause.UNCONFIRMED, "it did not confirm in time")


def _farewell_starts_ms(placement: Placement) -> int:
    """Return when the sites of a term that nobody renewed are asked to stop: half of the time since it was offered again."""
    assert placement.term_ends_ms is not None, "only an active placement has a term"
    return (renewal_starts_ms(placement) + placement.term_ends_ms) // 2


def _was_offered_again(session: Session, placement: Placement, now_ms: int) -> bool:
    """Say whether a round has looked at a term since it is up for renewal.

    One look is enough: whatever could change its mind counts as a change of its own.
    """
    taken_ms = session.scalar(select(Round.taken_ms).order_by(Round.round_number.desc()).limit(1))
    return taken_ms is not None and renewal_starts_ms(placement) <= taken_ms <= now_ms


def _fail_overdue_jobs(session: Session, market: Market) -> None:
    """End the jobs that wait beyond their deadline: no round can place them any more."""
    stated = Job.spec.not_like('%"deadline_ms":null%')
    for job in list(session.scalars(select(Job).where(Job.state == JobState.QUEUED, stated).order_by(Job.job_id))):
        deadline_ms = JobSpec.model_validate_json(job.spec).market.deadline_ms
        if deadline_ms is not None and deadline_ms <= market.clock.now_ms():
            sentence = f"its deadline passed while it waited; the last reason: {job.reason}"
            end_job(session, market, job.job_id, Ending(JobState.FAILED, "deadline_passed", sentence))


def _look_again_at_barred_jobs(session: Session) -> None:
    """Let rounds go on while a job waits for a bar to lift: bars are counted in rounds, and quiet markets hold none."""
    newest = session.scalar(select(func.max(Round.round_number))) or 0
    waiting = (
        select(BarredConfiguration.job_id)
        .join(Job, Job.job_id == BarredConfiguration.job_id)
        .where(Job.state == JobState.QUEUED, BarredConfiguration.until_round >= newest)
        .limit(1)
    )
    if session.scalar(waiting) is not None:
        note_change(session)
