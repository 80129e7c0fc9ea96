"""Steps 4 to 6 once more: a running job gets other GPUs, because a round says so, and loses no work by it.

A round that gives a running job another configuration opens a *move*. The sites that have to leave are asked to stop
at the end of a sync round; each writes a checkpoint (outer state, carry, moments, data position) and ships it. Once all
have left, or their time is up, the move is carried out: in place, where other sites of the gang stay and train on
(`broker.handover` decides), else by a new placement that resumes from the checkpoint. While a move is open its job counts
in rounds as what it gets, and the GPUs for that are promised to it. A term that is not renewed ends likewise, with
no award to follow.
"""

from __future__ import annotations

import json
from typing import Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from broker.allocation.clearing import Placement as Award
from broker.allocation.configuration import Configuration
from broker.database.moves import Move
from broker.database.standing import PLACEMENT_STANDS
from broker.database.tables import Hold, Job, JobArtifact, Lease, Placement
from broker.handover import Handover, plan_handover, promised_gpus
from broker.leases import (
    Start,
    choose_gpus,
    end_lease,
    end_placement,
    free_leased_gpus,
    leases_of,
    propose,
    propose_lease,
    requeue,
)
from broker.market import Market
from broker.reservations import due_of_ended
from broker.terms import append_term, cut_terms
from broker.transitions import EndCause, LeaseState, MoveState, PlacementState, change_state, note_change
from broker.views import check_view
from pricing.money import format_credits
from sites.protocol import AttemptPhase, AttemptReport, ExitCause
from training.exchange import Leaving

GPUS_GONE: Final = "the GPUs that it was to get are no longer free"
HOLD_SHORT: Final = "its hold does not cover the new term beside what the old one may still cost"


def open_move(  # noqa: PLR0917  what a move is
    session: Session, market: Market, placement: Placement, award: Award, round_number: int, restart_micros: int
) -> list[str]:
    """Ask the sites that a round's award leaves out to stop at the end of a sync round; return the sites to wake.

    `restart_micros` is what the round counted the move to destroy.
    """
    gang = _active(session, placement)
    now = standing_configuration(placement, gang)
    handover = plan_handover(
        now,
        award.configuration,
        listening={lease.site_id for lease in gang if lease.gateway_address is not None},
        former={lease.site_id for lease in leases_of(session, placement)},
        # In place the cut term's reservation stands beside the new one until all have reported.
        may_stay=covers_two_terms(session, market, placement, award),
    )
    _open(session, market, placement, handover, now, award, round_number, restart_micros)
    session.flush()
    return list(handover.leaving) or look_at_move(session, market, placement)


def open_farewell(session: Session, market: Market, placement: Placement) -> list[str]:
    """Ask the sites of a term that nobody renewed to stop with a checkpoint before its end; return the sites to wake."""
    gang = _active(session, placement)
    now = standing_configuration(placement, gang)
    handover = Handover(in_place=False, leaving=tuple(lease.site_id for lease in gang), joining=(), heirs={})
    _open(session, market, placement, handover, now, None, None, 0)
    session.flush()
    return list(handover.leaving)


def open_move_of(session: Session, placement_id: str) -> Move | None:
    """Return the move under which sites of a placement are leaving, None where there is none."""
    return session.scalar(select(Move).where(Move.placement_id == placement_id, Move.state == MoveState.LEAVING))


def leaving_of(session: Session, lease: Lease) -> Leaving | None:
    """Return whether a lease's site is asked to stop, and with whom."""
    move = open_move_of(session, lease.placement_id)
    if move is None or lease.site_id not in json.loads(move.leaving):
        return None
    return "site" if move.in_place else "gang"


def look_at_move(session: Session, market: Market, placement: Placement, *, term_is_over: bool = False) -> list[str]:
    """Carry an open move out once its sites have left, or their time is up; return the sites to wake. Level-triggered."""
    move = open_move_of(session, placement.placement_id)
    if move is None or placement.state != PlacementState.ACTIVE:
        return []
    gang = _active(session, placement)
    leaving = [lease for lease in gang if lease.site_id in json.loads(move.leaving)]
    staying = [lease for lease in gang if lease not in leaving]
    if not (term_is_over or _is_over(market, move) or all(_has_left(session, lease, staying) for lease in leaving)):
        return []
    if move.in_place:
        return _change_in_place(session, market, placement, move, leaving, staying)
    return _change_placement(session, market, placement, move, gang)


def standing_configuration(placement: Placement, gang: list[Lease]) -> Configuration:
    """Return the parts of a placement's configuration whose leases stand; its speed and traffic stay as sold."""
    configuration = Award.model_validate_json(placement.award).configuration
    standing = {lease.site_id for lease in gang}
    parts = tuple(part for part in configuration.parts if part.site_id in standing)
    return configuration.model_copy(update={"parts": parts})


def promised_by_pool(session: Session) -> dict[str, int]:
    """Count the free GPUs that open moves need beside what their jobs give up."""
    promised: dict[str, int] = {}
    for move, placement in _open_moves(session):
        if move.award is None:
            continue
        then = Award.model_validate_json(move.award).configuration
        now = standing_configuration(placement, _active(session, placement))
        leaving = tuple(json.loads(move.leaving))
        joining = then.parts if not move.in_place else tuple(part for part in then.parts if part not in now.parts)
        plan = Handover(in_place=move.in_place, leaving=leaving, joining=joining, heirs={})
        for pool_id, gpus in promised_gpus(now, plan).items():
            promised[pool_id] = promised.get(pool_id, 0) + gpus
    return promised


def moved_terms(session: Session) -> set[tuple[str, int]]:
    """Return job and round of every term that running jobs were moved into."""
    done = session.scalars(
        select(Move)
        .join(Placement, Placement.job_id == Move.job_id)
        .where(Move.state == MoveState.DONE, PLACEMENT_STANDS)
    )
    return {(move.job_id, move.round_number) for move in done if move.round_number is not None}


def covers_two_terms(session: Session, market: Market, placement: Placement, award: Award) -> bool:
    """Say whether a job's hold covers a new term beside what its running placement may still be charged."""
    hold = session.get_one(Hold, placement.job_id)
    left = hold.amount_micros - hold.posted_micros - hold.voided_micros
    left -= due_of_ended(session, market, placement.job_id).get(placement.job_id, 0)
    return award.reservation_micros + placement.reserved_micros - placement.charged_micros <= left


def _open(  # noqa: PLR0917  what a move is
    session: Session,
    market: Market,
    placement: Placement,
    handover: Handover,
    now: Configuration,
    award: Award | None,
    round_number: int | None,
    restart_micros: int,
) -> None:
    clock = market.clock
    after_key = "" if award is None else award.configuration.key
    move = Move(
        move_id=market.ids.new("move"),
        job_id=placement.job_id,
        placement_id=placement.placement_id,
        round_number=round_number,
        state="",
        award=None if award is None else award.model_dump_json(),
        in_place=handover.in_place,
        leaving=json.dumps(handover.leaving),
        heirs=json.dumps(handover.heirs, sort_keys=True),
        before_key=now.key,
        after_key=after_key,
        restart_micros=restart_micros,
        opened_ms=clock.now_ms(),
        until_monotonic_ms=round((clock.monotonic_s() + market.settings.handover_s) * 1000),
        until_era=clock.era(),
    )
    session.add(move)
    job = session.get_one(Job, placement.job_id)
    if award is None:
        sentence = "its term is not renewed; its sites stop with a checkpoint"
    else:
        how = "the other sites go on" if handover.in_place else "it resumes from a checkpoint"
        sentence = (
            f"from {now.key} to {after_key}: {award.why}; counted to cost {format_credits(restart_micros)} credits of "
            f"work, {how}"
        )
    change_state(
        session, move, MoveState.LEAVING, now_ms=clock.now_ms(), tenant_id=job.tenant_id, detail=sentence[:1000]
    )
    job.reason_code, job.reason = "moving", sentence[:1000]


def _change_in_place(  # noqa: PLR0917  who is who in it
    session: Session,
    market: Market,
    placement: Placement,
    move: Move,
    leaving: list[Lease],
    staying: list[Lease],
) -> list[str]:
    """End the leases of those that left, begin a term at the new round's prices, and propose the joiners' leases."""
    assert move.award is not None, "only a whole gang stops with nothing to follow"
    assert move.round_number is not None, "an award is of a round"
    award = Award.model_validate_json(move.award)
    left_at = {lease.site_id: _left_with(lease) for lease in leaving}
    for lease in leaving:
        end_lease(session, market, lease, EndCause.MOVED)
        if lease.phase == AttemptPhase.EXITED:
            free_leased_gpus(session, lease)
    session.flush()
    sites = {lease.site_id for lease in staying}
    joining = [part for part in award.configuration.parts if part.site_id not in sites]
    chosen = choose_gpus(session, joining)
    wake = [lease.site_id for lease in leaving]
    if not staying or chosen is None or not covers_two_terms(session, market, placement, award):
        reason = "no site stayed" if not staying else GPUS_GONE if chosen is None else HOLD_SHORT
        _close(session, market, move, MoveState.ABANDONED, f"{reason}; the rest of the gang goes on")
        note_change(session)
        return [*wake, *check_view(session, market, placement)]
    _close(session, market, move, MoveState.DONE, _outcome(market, move, left_at))
    now_ms = market.clock.now_ms()
    cut_terms(session, placement, now_ms)
    session.flush()
    placement.award, placement.configuration = award.model_dump_json(), award.configuration.model_dump_json()
    placement.configuration_key, placement.why = award.configuration.key, award.why[:1000]
    placement.samples_per_s_predicted = award.samples_per_s
    placement.value_micros_per_hour = award.value_micros_per_hour
    placement.charge_micros_per_hour = award.charge_micros_per_hour
    placement.uplift_micros_per_hour = award.uplift_micros_per_hour
    placement.term_s = award.term_s
    placement.proposal_ends_ms = now_ms + round(market.settings.proposal_s * 1000)
    append_term(session, placement, award, move.round_number)
    prices = {charge.pool_id: charge.price_micros_per_gpu_hour for charge in award.pools}
    for lease in staying:
        lease.price_micros_per_gpu_hour = prices[lease.pool_id]
    job = session.get_one(Job, placement.job_id)
    job.reason_code, job.reason = "running", award.why[:1000]
    heirs = json.loads(move.heirs)
    if joining:
        job.epoch += 1
    for part in joining:
        heir_of = heirs.get(part.site_id, "")
        # Without its predecessor's checkpoint a site joins with a snapshot alone, and the carry is lost.
        start = Start() if left_at.get(heir_of) is None else _left_by(session, job.job_id, heir_of)
        propose_lease(session, market, job, placement, part, chosen[part.pool_id], start)
    note_change(session)
    return [*wake, *(part.site_id for part in joining), *check_view(session, market, placement)]


def _change_placement(
    session: Session, market: Market, placement: Placement, move: Move, gang: list[Lease]
) -> list[str]:
    """End a placement whose sites have stopped, and propose the one that follows it in the same transaction."""
    left_at = {lease.site_id: _left_with(lease) for lease in gang}
    _close(session, market, move, MoveState.DONE, _outcome(market, move, left_at))
    session.flush()
    cause = EndCause.MOVED if move.award is not None else EndCause.TERM_ENDED
    wake = end_placement(session, market, placement, cause)
    for lease in gang:
        if lease.phase == AttemptPhase.EXITED:
            free_leased_gpus(session, lease)
    session.flush()
    job = session.get_one(Job, placement.job_id)
    if move.award is None:
        requeue(session, market, job, "term_ended", "its term ended and was not renewed; it waits for another")
        return wake
    assert move.round_number is not None, "an award is of a round"
    award = Award.model_validate_json(move.award)
    requeue(session, market, job, "moving", f"{award.why}; its former place is given up")
    hold = session.get_one(Hold, job.job_id)
    left = hold.amount_micros - hold.posted_micros - hold.voided_micros
    left -= due_of_ended(session, market, job.job_id).get(job.job_id, 0)
    if award.reservation_micros > left:
        job.reason = HOLD_SHORT
        return wake
    sites = propose(session, market, job, award, move.round_number, heirs=json.loads(move.heirs))
    if sites is None:
        job.reason = f"{GPUS_GONE}; it waits for a round"
        return wake
    return [*wake, *sites]


def _close(session: Session, market: Market, move: Move, state: MoveState, detail: str) -> None:
    move.ended_ms = market.clock.now_ms()
    tenant_id = session.get_one(Job, move.job_id).tenant_id
    change_state(session, move, state, now_ms=move.ended_ms, tenant_id=tenant_id, detail=detail[:1000])


def _outcome(market: Market, move: Move, left_at: dict[str, int | None]) -> str:
    """Return what a move came to, in a sentence: who left after which round, and how long that took."""
    took_s = (market.clock.now_ms() - move.opened_ms) / 1000
    stopped = sorted(site_id for site_id, number in left_at.items() if number is None)
    words = [
        f"{site_id} left after round {number}" for site_id, number in sorted(left_at.items()) if number is not None
    ]
    if stopped:
        words.append(f"{', '.join(stopped)} was stopped where it stood")
    return f"{'; '.join(words) or 'nobody had to leave'}; that took {took_s:.1f} s"


def _is_over(market: Market, move: Move) -> bool:
    """Say whether the time for leaving is up; a reading of another boot cannot be compared and is taken to be over."""
    if move.until_era != market.clock.era():
        return True
    return market.clock.monotonic_s() * 1000 >= move.until_monotonic_ms


def _has_left(session: Session, lease: Lease, staying: list[Lease]) -> bool:
    """Say whether a site has stopped, its checkpoint is here, and those that stay know the round that it stopped at."""
    round_number = _left_with(lease)
    held = session.get(JobArtifact, (lease.job_id, "checkpoint", lease.site_id))
    if round_number is None or held is None or held.round_number < round_number:
        return False
    return all(_sealed_round(other) >= round_number for other in staying)


def _left_with(lease: Lease) -> int | None:
    """Return the round after which a site stopped as it was asked to, None where it did not."""
    if not lease.attempt:
        return None
    report = AttemptReport.model_validate_json(lease.attempt)
    if report.phase is not AttemptPhase.EXITED or report.cause is not ExitCause.LEFT or report.checkpoint is None:
        return None
    return report.checkpoint.round_number


def _left_by(session: Session, job_id: str, site_id: str) -> Start:
    """Return the checkpoint that a site left, as its heir starts from it."""
    held = session.get(JobArtifact, (job_id, "checkpoint", site_id))
    return Start() if held is None else Start(held.digest, site_id)


def _sealed_round(lease: Lease) -> int:
    report = AttemptReport.model_validate_json(lease.attempt) if lease.attempt else None
    return 0 if report is None or report.gateway is None else report.gateway.sealed_round


def _active(session: Session, placement: Placement) -> list[Lease]:
    return [lease for lease in leases_of(session, placement) if lease.state == LeaseState.ACTIVE]


def _open_moves(session: Session) -> list[tuple[Move, Placement]]:
    rows = session.execute(
        select(Move, Placement)
        .join(Placement, Placement.placement_id == Move.placement_id)
        .where(Move.state == MoveState.LEAVING)
        .order_by(Move.move_id)
    )
    return [(move, placement) for move, placement in rows]
