"""The commit of a round: one short write transaction in which every placement is guarded.

A placement is dropped, and the drop recorded, where its job or its offer has changed since the
snapshot, where a site has refused it or its tenant's budget has shrunk meanwhile, where its GPUs are no
longer free, or where the hold no longer covers its term.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from broker import ledger
from broker.abilities import lacking, needs_abilities
from broker.allocation.clearing import Clearing
from broker.allocation.clearing import Placement as Award
from broker.allocation.snapshot import Incumbent
from broker.database.certificates import RoundCertificate
from broker.database.tables import Hold, Job, Lease, MarketState, Placement, Round, Site
from broker.errors import ConflictError
from broker.leases import leases_of, live_placement, propose
from broker.market import Market
from broker.moves import covers_two_terms, open_move, open_move_of
from broker.refusals import NOWHERE, Refused, read_refusals
from broker.reservations import due_of_ended
from broker.rounds.certificate import Statement, above_value, balance_of, sign_statement
from broker.rounds.last_round import write_links
from broker.rounds.snapshot import TakenSnapshot, free_equity, left_s
from broker.staging import too_early
from broker.tenant_limits import budgets_left
from broker.terms import append_term
from broker.transitions import JobState, LeaseState, PlacementState, note_change, record_event
from pricing.money import format_credits
from training.spec import JobSpec

# Such as those of a lease that is up for renewal and was outbid: it keeps them until its term ends.
# That end is a change of its own; to try again before would be to hold the same round over and over.
GPUS_TAKEN: Final = "its GPUs are no longer free"
# It was decided before, and the job counts as what it gets until its sites have left.
MOVING: Final = "the job is being moved already"
# Only where several moves of one round together cost more than equity has; the next snapshot says so.
NOT_COMPENSATED: Final = "market equity does not cover what the move would destroy"


class RoundOvertakenError(ConflictError):
    """A round that may no longer be committed: another one was, or the market is frozen."""

    code = "round.overtaken"


@dataclass(slots=True)
class Committed:
    """What a round came to: its row, the sites to wake, and the jobs whose word has changed."""

    round: Round
    wake: set[str] = field(default_factory=set)
    jobs: set[str] = field(default_factory=set)


def commit(
    session: Session,
    market: Market,
    taken: TakenSnapshot,
    clearing: Clearing,
    *,
    snapshot_digest: str,
    solve_s: float,
    phases: Mapping[str, float],
) -> Committed:
    """Write the round, its signed certificate and the placements that still hold; `phases` are seconds of the solver.

    Raises RoundOvertakenError where another worker has committed a round meanwhile, or an admin has
    frozen the market: nothing is written.
    """
    state = session.get_one(MarketState, 1)
    if state.frozen_ms is not None:
        message = "the market was frozen while the round was being solved"
        raise RoundOvertakenError(message)
    number = clearing.round_number
    newest = session.scalar(select(func.max(Round.round_number))) or 0
    if newest != number - 1:
        message = f"round {newest} was committed while round {number} was being solved; its snapshot is out of date"
        raise RoundOvertakenError(message)
    row = Round(
        round_number=number,
        taken_ms=taken.snapshot.taken_at_ms,
        committed_ms=market.clock.now_ms(),
        snapshot_digest=snapshot_digest,
        clearing_digest=clearing.digest(),
        status=clearing.status,
        solver=clearing.solver,
        solve_s=solve_s,
        prices=json.dumps(clearing.prices, sort_keys=True),
        link_prices=write_links(clearing),
        events_seen=taken.events_seen,
        certificate=clearing.certificate.model_dump_json(),
        dropped="[]",
        jobs_considered=len(taken.snapshot.jobs),
        placements_made=0,
    )
    session.add(row)
    session.flush()
    committed = Committed(row)
    dropped: list[dict[str, str]] = []
    refused = read_refusals(session, row.committed_ms)
    step = _Step(session, market, taken, committed, refused, _shrunk(taken, budgets_left(session)))
    # Moves last: what compensates them is what the new placements' uplift leaves.
    for award in sorted(clearing.placements, key=lambda award: award.action == "move"):
        try:
            step.apply(award)
        except _DroppedError as drop:
            dropped.append({"job_id": award.job_id, "reason": str(drop)})
            record_event(
                session, "dropped", now_ms=row.committed_ms, job_id=award.job_id, round_number=number, detail=str(drop)
            )
    for unplaced in clearing.unplaced:
        job = session.get(Job, unplaced.job_id)
        if job is not None and job.state == JobState.QUEUED:
            declined = refused.get(job.job_id, NOWHERE)
            if needs_abilities(job.spec):
                spec = JobSpec.model_validate_json(job.spec)
                taken_ms = taken.snapshot.taken_at_ms
                waited_s = (taken_ms - job.submitted_ms) / 1000
                declined |= lacking(spec, taken.abilities)
                declined |= too_early(spec, taken.abilities, waited_s=waited_s, left_s=left_s(spec, taken_ms))
            job.reason_code, job.reason = unplaced.code, "; ".join((unplaced.sentence, *declined.reasons))[:1000]
            committed.jobs.add(job.job_id)
    row.dropped = json.dumps(dropped)
    session.add(_certificate(market, taken, clearing, row, dropped=len(dropped), phases=phases))
    state.changes_cleared = taken.changes
    if any(drop["reason"] not in {GPUS_TAKEN, NOT_COMPENSATED, MOVING} for drop in dropped):
        note_change(session)  # what was dropped may fit in the next round
    session.flush()
    return committed


def _certificate(
    market: Market,
    taken: TakenSnapshot,
    clearing: Clearing,
    row: Round,
    *,
    dropped: int,
    phases: Mapping[str, float],
) -> RoundCertificate:
    """Return the round's certificate, signed; its economics are worked out later."""
    proof, jobs = clearing.certificate, len(taken.snapshot.jobs)
    lost = proof.regret_sum_micros_per_hour + proof.slack_sum_micros_per_hour
    asks = {pool.pool_id: pool.ask_micros_per_gpu_hour for pool in taken.snapshot.pools}
    statement = Statement(
        market=market.settings.market_name,
        round_number=row.round_number,
        taken_ms=row.taken_ms,
        committed_ms=row.committed_ms,
        snapshot_digest=clearing.snapshot_digest,
        clearing_digest=row.clearing_digest,
        status=clearing.status,
        solver=clearing.solver,
        payment_rule=taken.snapshot.payment_rule,
        jobs_considered=jobs,
        jobs_placed=len(clearing.placements),
        jobs_dropped=dropped,
        jobs_unsupported_share=proof.jobs_unsupported / max(1, jobs),
        regret_and_slack_share=lost / max(1, proof.bound_micros_per_hour),
        certificate=proof,
        balance=balance_of(clearing),
        buyers_above_value=above_value(clearing),
        pools_below_ask=sum(price < asks[pool_id] for pool_id, price in clearing.prices.items()),
        seconds={name: round(seconds, 6) for name, seconds in phases.items()},
    )
    return RoundCertificate(
        round_number=row.round_number,
        economics=statement.economics_state,
        document=sign_statement(market.authority, statement).model_dump_json(),
        signed_ms=row.committed_ms,
    )


def _shrunk(taken: TakenSnapshot, left: Mapping[str, int]) -> frozenset[str]:
    """Return the tenants whose budget leaves less than the snapshot knew: it was set or lowered, or spent at once."""
    return frozenset(tenant_id for tenant_id, now in left.items() if now < taken.budgets_left.get(tenant_id, now + 1))


class _DroppedError(Exception):
    """A placement that no longer holds; the message says why."""


@dataclass(frozen=True, slots=True)
class _Step:
    """Carries out the placements of one round, each guarded."""

    session: Session
    market: Market
    taken: TakenSnapshot
    committed: Committed
    refused: Mapping[str, Refused]
    shrunk_budgets: frozenset[str]

    def apply(self, award: Award) -> None:
        """Carry out one placement; raises _DroppedError where it no longer holds."""
        if award.action == "keep":
            return
        job = self.session.get(Job, award.job_id)
        if job is None or job.version != award.job_version:
            raise _DroppedError("the job has changed since the snapshot")
        for part in award.configuration.parts:
            site = self.session.get(Site, part.site_id)
            if site is None or self.taken.site_versions.get(part.site_id) != site.version:
                raise _DroppedError(f"the offer of {part.site_id} has changed since the snapshot")
        declined = self.refused.get(job.job_id, NOWHERE)
        sites = {part.site_id for part in award.configuration.parts}
        if declined.sites & sites or (declined.gangs and len(sites) > 1):
            raise _DroppedError("; ".join(declined.reasons))
        placement = live_placement(self.session, job.job_id)
        if award.action == "start":
            self._start(job, placement, award)
            return
        if placement is None or placement.state != PlacementState.ACTIVE:
            raise _DroppedError("the job's placement has ended since the snapshot")
        if open_move_of(self.session, placement.placement_id) is not None:
            raise _DroppedError(MOVING)
        if award.action == "renew":
            self._renew(job, placement, award)
        else:
            self._move(job, placement, award)
        self.committed.jobs.add(job.job_id)

    def _start(self, job: Job, placement: Placement | None, award: Award) -> None:
        if placement is not None or job.state != JobState.QUEUED:
            raise _DroppedError("the job is no longer waiting")
        if job.tenant_id in self.shrunk_budgets:
            raise _DroppedError("its tenant's hourly budget leaves less than at the snapshot")
        if award.reservation_micros > self._unposted(job):
            raise _DroppedError("the hold no longer covers the term")
        sites = propose(self.session, self.market, job, award, self.committed.round.round_number)
        if sites is None:
            raise _DroppedError(GPUS_TAKEN)
        self.committed.round.placements_made += 1
        self.committed.wake.update(sites)
        self.committed.jobs.add(job.job_id)

    def _renew(self, job: Job, placement: Placement, award: Award) -> None:
        """Append a term at this round's price: it begins where the running one ends."""
        leases = self.session.scalars(
            select(Lease).where(Lease.placement_id == placement.placement_id, Lease.state == LeaseState.ACTIVE)
        ).all()
        # A gang that lost a lease changes neither its job's version nor, always, its sites'.
        if {lease.site_id for lease in leases} != {part.site_id for part in award.configuration.parts}:
            raise _DroppedError("the gang has changed since the snapshot")
        if not covers_two_terms(self.session, self.market, placement, award):
            raise _DroppedError("the hold does not cover another term")
        placement.award = award.model_dump_json()
        placement.configuration = award.configuration.model_dump_json()
        placement.why = award.why[:1000]
        placement.samples_per_s_predicted = award.samples_per_s
        placement.value_micros_per_hour = award.value_micros_per_hour
        placement.charge_micros_per_hour = award.charge_micros_per_hour
        placement.uplift_micros_per_hour = award.uplift_micros_per_hour
        placement.term_s = award.term_s
        append_term(self.session, placement, award, self.committed.round.round_number)
        prices = {charge.pool_id: charge.price_micros_per_gpu_hour for charge in award.pools}
        for lease in leases:
            lease.price_micros_per_gpu_hour = prices[lease.pool_id]
        record_event(
            self.session,
            "renewed",
            now_ms=self.market.clock.now_ms(),
            job_id=job.job_id,
            tenant_id=job.tenant_id,
            round_number=self.committed.round.round_number,
            detail=f"for {award.term_s} s at {format_credits(award.charge_micros_per_hour)} credits per hour",
        )

    def _move(self, job: Job, placement: Placement, award: Award) -> None:
        """Let a running job come to another configuration that beats its own, with what its sites have learned.

        Inside its term its tenant is paid what the move destroys, as this round's snapshot counted it.
        """
        gang = leases_of(self.session, placement)
        if any(lease.state in {LeaseState.PROPOSED, LeaseState.CONFIRMED} for lease in gang):
            raise _DroppedError("a site is joining the job's gang")
        if award.reservation_micros > self._unposted(job):
            raise _DroppedError("the hold no longer covers the term")
        self._compensate(job, placement)
        incumbent = self._incumbent(job)
        self.committed.wake.update(
            open_move(
                self.session,
                self.market,
                placement,
                award,
                self.committed.round.round_number,
                0 if incumbent is None else incumbent.restart_cost_micros,
            )
        )

    def _incumbent(self, job: Job) -> Incumbent | None:
        return next(row.incumbent for row in self.taken.snapshot.jobs if row.job_id == job.job_id)

    def _compensate(self, job: Job, placement: Placement) -> None:
        snapshot = self.taken.snapshot
        incumbent = self._incumbent(job)
        if incumbent is None or incumbent.term_ends_ms <= snapshot.taken_at_ms or not incumbent.restart_cost_micros:
            return
        now_ms, amount = self.market.clock.now_ms(), incumbent.restart_cost_micros
        if amount > free_equity(self.session, now_ms):
            raise _DroppedError(NOT_COMPENSATED)
        number = self.committed.round.round_number
        memo = f"moved inside its term by round {number}"
        key = f"{placement.placement_id}/{number}"
        ledger.compensate(self.session, job.job_id, job.tenant_id, amount, key=key, now_ms=now_ms, memo=memo)
        record_event(
            self.session,
            "compensated",
            now_ms=now_ms,
            job_id=job.job_id,
            tenant_id=job.tenant_id,
            round_number=number,
            detail=f"{format_credits(amount)} credits for being moved inside its term",
        )

    def _unposted(self, job: Job) -> int:
        """Return what the hold has left beside what the job's ended placements may still be charged."""
        hold = self.session.get_one(Hold, job.job_id)
        left = hold.amount_micros - hold.posted_micros - hold.voided_micros
        return left - due_of_ended(self.session, self.market, job.job_id).get(job.job_id, 0)
