"""Step 6, the broker's side: who is in a job's round log, and when that changes.

A job's first view under an epoch is issued as its gang becomes active. A later one is opened when
`broker.membership` finds that the newest no longer fits: its members-to-be promise it in their
heartbeats, each with a report of how far its log reaches; when all have promised, the highest
report among those who were in the last view is the base and the view is issued. While nobody
changes, sealing needs no broker.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from broker.allocation.clearing import Placement as Award
from broker.database.tables import Job, Lease, Placement, Site, ViewChange, ViewPromise
from broker.membership import Change, Membership, Patience, Standing, needed_change
from broker.transitions import LeaseState, ViewState, change_state
from sites.protocol import AttemptPhase, AttemptReport
from training.roundlog.signing import SignedDocument
from training.roundlog.view import Member, View, ViewReport, open_view
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
    epoch = session.get_one(Placement, lease.placement_id).epoch
    if change is None or change.state != ViewState.PROMISING or change.epoch != epoch:
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

    Level-triggered: compares the newest view with the leases and the reports as they stand.
    """
    gang = list(
        session.scalars(
            select(Lease)
            .where(Lease.placement_id == placement.placement_id, Lease.state == LeaseState.ACTIVE)
            .order_by(Lease.site_id)
        )
    )
    newest = newest_view(session, placement.job_id, placement.epoch)
    issued = issued_view(session, placement.job_id, placement.epoch)
    if not gang or newest is None or issued is None:
        return []
    settings = market.settings
    change = needed_change(
        _membership(market, newest, issued),
        [_standing(session, market, lease) for lease in gang],
        Patience(settings.absent_s, settings.hub_lost_s, settings.heartbeat_s),
    )
    return [] if change is None else _open(session, market, placement, newest, change)


def take_complaints(session: Session, market: Market, lease: Lease, report: AttemptReport) -> list[str]:
    """Look at the view where a gateway has lost its peers or is not in it; return the sites to wake.

    Whoever is complained about is woken too: one that lives answers at once, and is not taken for lost.
    """
    gateway = report.gateway
    placement = session.get_one(Placement, lease.placement_id)
    issued = issued_view(session, lease.job_id, placement.epoch)
    if gateway is None or issued is None:
        return []
    accused = sorted(gateway.members_lost_s) if gateway.hub_lost_s is None else [issued.hub]
    if not accused and lease.site_id in json.loads(issued.sites):
        return []
    return [*accused, *check_view(session, market, placement)]


def knows_the_chain(session: Session, job_id: str, epoch: int, sites: Sequence[str]) -> bool:
    """Say whether any of `sites` is in the last issued view: only its members know what was sealed."""
    issued = issued_view(session, job_id, epoch)
    return issued is not None and not set(json.loads(issued.sites)).isdisjoint(sites)


def _membership(market: Market, newest: ViewChange, issued: ViewChange) -> Membership:
    return Membership(
        sites=tuple(json.loads(newest.sites)),
        hub=newest.hub,
        is_issued=newest.number == issued.number,
        issued_number=issued.number,
        issued_sites=tuple(json.loads(issued.sites)),
        issued_hub=issued.hub,
        standby=_document(market, issued).standby,
    )


def _standing(session: Session, market: Market, lease: Lease) -> Standing:
    site = session.get_one(Site, lease.site_id)
    unheard_s = 0.0
    # What was heard before this machine's last boot cannot be compared: it counts from the next heartbeat.
    if site.heard_monotonic_ms is not None and site.heard_era == market.clock.era():
        unheard_s = max(0.0, market.clock.monotonic_s() - site.heard_monotonic_ms / 1000)
    report = AttemptReport.model_validate_json(lease.attempt) if lease.attempt else None
    gateway = report.gateway if report is not None and report.phase is not AttemptPhase.EXITED else None
    return Standing(
        site_id=lease.site_id,
        listens=lease.gateway_address is not None,
        unheard_s=unheard_s,
        view_number=None if gateway is None else gateway.view_number,
        hub_lost_s=None if gateway is None else gateway.hub_lost_s,
        members_lost_s={} if gateway is None else gateway.members_lost_s,
    )


def _document(market: Market, issued: ViewChange) -> View:
    return open_view(SignedDocument.model_validate_json(issued.document), market.authority.authority_key)


def _open(session: Session, market: Market, placement: Placement, newest: ViewChange, needed: Change) -> list[str]:
    now_ms = market.clock.now_ms()
    if newest.state == ViewState.PROMISING:
        change_state(session, newest, ViewState.ABANDONED, now_ms=now_ms, detail=needed.cause)
        _forget_promises(session, newest)
    change = ViewChange(
        job_id=placement.job_id,
        number=_newest_number(session, placement.job_id) + 1,
        epoch=placement.epoch,
        state="",
        sites=json.dumps(needed.sites),
        hub=needed.hub,
        cause=needed.cause[:200],
        document="",
        created_ms=now_ms,
    )
    session.add(change)
    change_state(session, change, ViewState.PROMISING, now_ms=now_ms, detail=needed.cause)
    return list(needed.sites)


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
            .join(Placement, Placement.placement_id == Lease.placement_id)
            .where(
                Lease.job_id == change.job_id,
                # Those who joined it while it ran have later epochs than the gang's first.
                Placement.epoch == change.epoch,
                Lease.state == LeaseState.ACTIVE,
                Lease.site_id.in_(sites),
            )
            .order_by(Lease.site_id)
        )
    )
    if len(gang) != len(sites):
        return []  # a member was lost meanwhile: check_view opens another
    placement = session.get_one(Placement, gang[0].placement_id)
    issued = issued_view(session, change.job_id, change.epoch)
    assert issued is not None, "a view is promised after the first one was issued"
    # The highest report is the base; among equals the first site in order. Whoever was left out of the last view may
    # have sealed a round that its members never promised to know: its report does not count.
    known = sorted(set(sites) & set(json.loads(issued.sites)))
    if not known:
        return []
    reporter = max(known, key=lambda site_id: reports[site_id].sealed_round)
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
        joining=tuple(sorted(set(sites) - set(known))),
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
    joining: tuple[str, ...] = (),
) -> View:
    spec = JobSpec.model_validate_json(session.get_one(Job, placement.job_id).spec)
    award = Award.model_validate_json(placement.award)
    plan = spec.market.sync.placed(award.configuration.sync)
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
        joining=joining,
        quorum=plan.quorum_of(len(members)),
        grace_s=plan.grace_s if plan.strategy == "quorum" else market.settings.grace_s,
        issued_ms=market.clock.now_ms(),
    )


def weight_max(spec: JobSpec, award: Award, lease: Lease) -> int:
    """Return the most samples that one contribution of this lease may claim: its dealt share."""
    return award.configuration.sync.period_steps * spec.market.workload.batch_per_gpu * lease.gpus


def _newest_number(session: Session, job_id: str) -> int:
    return session.scalar(select(func.max(ViewChange.number)).where(ViewChange.job_id == job_id)) or 0
