"""Step 6, the broker's side: who is in a job's round log, and when that changes.

A job's first view under an epoch is issued as its gang becomes active. A later one is opened when
a member is lost or the hub cannot be reached: its members-to-be promise it in their heartbeats,
each with a report of how far its log reaches; when all have promised, the highest report is the
base and the view is issued. While nobody changes, sealing needs no broker.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from broker.allocation.clearing import Placement as Award
from broker.database.tables import Job, Lease, Placement, ViewChange, ViewPromise
from broker.transitions import LeaseState, ViewState, change_state
from sites.protocol import AttemptReport
from training.roundlog.view import Member, View, ViewReport
from training.spec import JobSpec

if TYPE_CHECKING:
    from broker.market import Market


def issue_first_view(session: Session, market: Market, placement: Placement, gang: Sequence[Lease]) -> None:
    """Issue the view with which a gang starts, based on the checkpoint that it resumes from."""
    award = Award.model_validate_json(placement.award)
    hub = award.configuration.hub_site or gang[0].site_id
    number = _newest_number(session, placement.job_id) + 1
    view = _compose(
        session,
        market,
        placement,
        gang,
        number=number,
        hub=hub,
        base_round=placement.base_round,
        base_hash=placement.base_hash,
        base_reporter=None,
    )
    change = ViewChange(
        job_id=placement.job_id,
        number=number,
        epoch=placement.epoch,
        state="",
        sites=json.dumps([lease.site_id for lease in gang]),
        hub=hub,
        cause="the gang is active",
        document=market.authority.sign_view(view).model_dump_json(),
        created_ms=market.clock.now_ms(),
        issued_ms=market.clock.now_ms(),
    )
    session.add(change)
    change_state(session, change, ViewState.ISSUED, now_ms=market.clock.now_ms())


def newest_view(session: Session, job_id: str, epoch: int) -> ViewChange | None:
    """Return the view of this epoch with the highest number that is issued or being promised."""
    return session.scalar(
        select(ViewChange)
        .where(ViewChange.job_id == job_id, ViewChange.epoch == epoch, ViewChange.state != ViewState.ABANDONED)
        .order_by(ViewChange.number.desc())
        .limit(1)
    )


def issued_view(session: Session, job_id: str, epoch: int) -> ViewChange | None:
    """Return the newest issued view of this epoch."""
    return session.scalar(
        select(ViewChange)
        .where(ViewChange.job_id == job_id, ViewChange.epoch == epoch, ViewChange.state == ViewState.ISSUED)
        .order_by(ViewChange.number.desc())
        .limit(1)
    )


def take_promise(session: Session, market: Market, lease: Lease, report: ViewReport) -> list[str]:
    """Record a gateway's promise; with the last one issue the view. Returns the sites to wake."""
    change = session.get(ViewChange, (lease.job_id, report.promised))
    if change is None or change.state != ViewState.PROMISING or change.epoch != lease.epoch:
        return []
    if lease.site_id not in json.loads(change.sites):
        return []
    if session.get(ViewPromise, (lease.job_id, change.number, lease.site_id)) is None:
        session.add(
            ViewPromise(
                job_id=lease.job_id, number=change.number, site_id=lease.site_id, report=report.model_dump_json()
            )
        )
        session.flush()
    return _issue_if_promised(session, market, change)


def check_view(session: Session, market: Market, placement: Placement) -> list[str]:
    """Open the view that an active placement needs now, if any; return the sites to wake.

    Level-triggered: compares the newest view with the leases as they stand.
    """
    gang = list(
        session.scalars(
            select(Lease)
            .where(Lease.placement_id == placement.placement_id, Lease.state == LeaseState.ACTIVE)
            .order_by(Lease.site_id)
        )
    )
    newest = newest_view(session, placement.job_id, placement.epoch)
    if not gang or newest is None:
        return []
    sites = [lease.site_id for lease in gang]
    members = [site_id for site_id in json.loads(newest.sites) if site_id in sites]
    if members != json.loads(newest.sites):
        lost = ", ".join(sorted(set(json.loads(newest.sites)) - set(sites)))
        return _open(session, market, placement, gang, newest, avoid=None, cause=f"lost {lost}")
    if newest.state == ViewState.ISSUED:
        complaints = [lease for lease in gang if lease.site_id != newest.hub and _hub_lost(market, lease, newest)]
        others = [lease for lease in gang if lease.site_id != newest.hub]
        if others and len(complaints) * 2 > len(others):
            return _open(
                session, market, placement, gang, newest, avoid=newest.hub, cause=f"hub {newest.hub} cannot be reached"
            )
    return []


def _open(
    session: Session,
    market: Market,
    placement: Placement,
    gang: Sequence[Lease],
    newest: ViewChange,
    *,
    avoid: str | None,
    cause: str,
) -> list[str]:
    hub = _choose_hub(gang, preferred=newest.hub, avoid=avoid)
    if hub is None:
        return []
    now_ms = market.clock.now_ms()
    if newest.state == ViewState.PROMISING:
        change_state(session, newest, ViewState.ABANDONED, now_ms=now_ms, detail=cause)
        _forget_promises(session, newest)
    change = ViewChange(
        job_id=placement.job_id,
        number=_newest_number(session, placement.job_id) + 1,
        epoch=placement.epoch,
        state="",
        sites=json.dumps([lease.site_id for lease in gang]),
        hub=hub,
        cause=cause[:200],
        document="",
        created_ms=now_ms,
    )
    session.add(change)
    change_state(session, change, ViewState.PROMISING, now_ms=now_ms, detail=cause)
    return [lease.site_id for lease in gang]


def _issue_if_promised(session: Session, market: Market, change: ViewChange) -> list[str]:
    reports = {
        promise.site_id: ViewReport.model_validate_json(promise.report)
        for promise in session.scalars(
            select(ViewPromise).where(ViewPromise.job_id == change.job_id, ViewPromise.number == change.number)
        )
    }
    sites = json.loads(change.sites)
    if set(reports) != set(sites):
        return []
    gang = list(
        session.scalars(
            select(Lease)
            .where(
                Lease.job_id == change.job_id,
                Lease.epoch == change.epoch,
                Lease.state == LeaseState.ACTIVE,
                Lease.site_id.in_(sites),
            )
            .order_by(Lease.site_id)
        )
    )
    if len(gang) != len(sites):
        return []  # a member was lost meanwhile: check_view opens another
    placement = session.get_one(Placement, gang[0].placement_id)
    # The highest report is the base; among equals the first site in order.
    reporter = max(sorted(sites), key=lambda site_id: reports[site_id].sealed_round)
    base = reports[reporter]
    view = _compose(
        session,
        market,
        placement,
        gang,
        number=change.number,
        hub=change.hub,
        base_round=base.sealed_round,
        base_hash=base.chain_hash,
        base_reporter=reporter,
    )
    now_ms = market.clock.now_ms()
    change.document = market.authority.sign_view(view).model_dump_json()
    change.issued_ms = now_ms
    change_state(session, change, ViewState.ISSUED, now_ms=now_ms, detail=f"base round {base.sealed_round}")
    _forget_promises(session, change)
    return list(sites)


def _forget_promises(session: Session, change: ViewChange) -> None:
    # A report names up to ten thousand blobs, and nobody reads it once the view stands or is given up.
    session.execute(delete(ViewPromise).where(ViewPromise.job_id == change.job_id, ViewPromise.number == change.number))


def _compose(
    session: Session,
    market: Market,
    placement: Placement,
    gang: Sequence[Lease],
    *,
    number: int,
    hub: str,
    base_round: int,
    base_hash: str,
    base_reporter: str | None,
) -> View:
    spec = JobSpec.model_validate_json(session.get_one(Job, placement.job_id).spec)
    award = Award.model_validate_json(placement.award)
    listening = [lease.site_id for lease in gang if lease.gateway_address is not None and lease.site_id != hub]
    members = []
    for lease in gang:
        assert lease.attempt_key is not None, "a confirmed lease has its attempt's key"
        members.append(
            Member(
                site_id=lease.site_id,
                epoch=lease.epoch,
                gpus=lease.gpus,
                attempt_key=lease.attempt_key,
                address=lease.gateway_address,
                weight_max=weight_max(spec, award, lease),
            )
        )
    return View(
        job_id=placement.job_id,
        number=number,
        members=tuple(members),
        hub=hub,
        standby=listening[0] if listening else None,
        base_round=base_round,
        base_hash=base_hash,
        base_reporter=base_reporter,
        quorum=len(members),
        grace_s=market.settings.grace_s,
        issued_ms=market.clock.now_ms(),
    )


def weight_max(spec: JobSpec, award: Award, lease: Lease) -> int:
    """Return the most samples that one contribution of this lease may claim: its dealt share."""
    return award.configuration.sync.period_steps * spec.market.workload.batch_per_gpu * lease.gpus


def _choose_hub(gang: Sequence[Lease], *, preferred: str, avoid: str | None) -> str | None:
    if len(gang) == 1:
        return gang[0].site_id
    listening = [lease.site_id for lease in gang if lease.gateway_address is not None and lease.site_id != avoid]
    if preferred in listening:
        return preferred
    return listening[0] if listening else None


def _hub_lost(market: Market, lease: Lease, view: ViewChange) -> bool:
    if not lease.attempt:
        return False
    report = AttemptReport.model_validate_json(lease.attempt).gateway
    return (
        report is not None
        and report.view_number == view.number
        and report.hub_lost_s is not None
        and report.hub_lost_s >= market.settings.hub_lost_s
    )


def _newest_number(session: Session, job_id: str) -> int:
    return session.scalar(select(func.max(ViewChange.number)).where(ViewChange.job_id == job_id)) or 0
