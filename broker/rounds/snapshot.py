"""The snapshot of a round: one short read of what the market holds.

Beside the snapshot, which the solver sees, stand the versions of the offers that it was taken
from: the commit checks them again and drops what has changed meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from broker.abilities import Ability, lacking, read_abilities
from broker.allocation.clearing import Placement as Award
from broker.allocation.configuration import Configuration
from broker.allocation.snapshot import (
    AskStep,
    BidStep,
    DataEgress,
    DataState,
    Incumbent,
    JobSpeed,
    JobState,
    PoolState,
    Reservation,
    SiteState,
    Snapshot,
)
from broker.database.moves import Move
from broker.database.refusals import BarredConfiguration
from broker.database.standing import LEASE_STANDS, PLACEMENT_STANDS
from broker.database.tables import (
    Account,
    Gpu,
    Hold,
    Job,
    Lease,
    LeasedGpu,
    MarketState,
    Placement,
    Pool,
    Round,
    Site,
    Tenant,
)
from broker.leases import leases_of
from broker.ledger import EQUITY
from broker.market import Market
from broker.moves import moved_terms, promised_by_pool
from broker.payment_rules import payment_rule
from broker.refusals import NOWHERE, Refused, read_refusals, sites_left
from broker.reservations import due_of_ended
from broker.rounds.last_round import may_follow, read_last_round
from broker.rounds.round_links import counted_links
from broker.speeds import read_speeds
from broker.staging import least_elsewhere_s, read_from, too_early
from broker.tenant_limits import budgets_left, limited_tenants
from broker.terms import terms_of
from broker.transitions import JobState as State
from broker.transitions import LeaseState, MoveState, PlacementState
from broker.transitions import SiteState as Hearing
from pricing.money import SECONDS_PER_HOUR
from sites.protocol import Offer, PoolOffer
from training.spec import BUDGET_MICROS_MAX, DataTerms, JobSpec

# A term is offered again this long before its end, so that the job need not stop in between.
RENEWAL_SHARE: Final = 1 / 3
RENEWAL_S_MAX: Final = 30.0
RESTART_MICROS_UNAFFORDABLE: Final = BUDGET_MICROS_MAX


@dataclass(frozen=True, slots=True)
class TakenSnapshot:
    """A snapshot and what its commit must find unchanged; `changes` and `events_seen` are the market's counters then.

    `abilities` is what each site can do for a job beyond running it.
    `budgets_left` is what the hourly budgets of tenants left, in micro-credits: no less may be left at the commit.
    """

    snapshot: Snapshot
    site_versions: dict[str, int]
    changes: int
    abilities: Mapping[str, Ability]
    events_seen: int
    budgets_left: dict[str, int]


def take(session: Session, market: Market, *, with_jobs: bool = True) -> TakenSnapshot:
    """Read the snapshot for the next round; without its jobs for who asks for another one's place and price alone."""
    now_ms = market.clock.now_ms()
    state = session.get(MarketState, 1)
    sites = list(session.scalars(select(Site).where(Site.state != Hearing.REMOVED)))
    number = (session.scalar(select(func.max(Round.round_number))) or 0) + 1
    placements = {
        placement.job_id: placement for placement in session.scalars(select(Placement).where(PLACEMENT_STANDS))
    }
    tenants = limited_tenants(session)
    abilities = read_abilities(session)
    limited = {tenant.tenant_id for tenant in tenants}
    last = read_last_round(session, market.settings)
    names = {site.site_id for site in sites}
    jobs = _jobs(session, market, placements, now_ms, number, abilities) if with_jobs else []
    snapshot = Snapshot(
        round_number=number,
        taken_at_ms=now_ms,
        seed=0 if state is None else state.seed,
        term_s=market.settings.term_s,
        market_equity_micros=free_equity(session, now_ms),
        fee_basis_points=market.settings.fee_basis_points,
        payment_rule=payment_rule(session).value,
        pools=tuple(_pools(session, {site.site_id: site for site in sites}, now_ms)),
        sites=tuple(_site_state(site) for site in sites),
        links=tuple(counted_links(session, market, names, last.link_prices)),
        jobs=tuple(job if owner not in limited else job.model_copy(update={"tenant_id": owner}) for owner, job in jobs),
        last_prices=last.prices,
        follow_last_prices=may_follow(last, jobs=len(jobs), settings=market.settings),
        tenants=tenants,
        floor_penalty_micros_per_gpu_hour=market.settings.floor_penalty_micros_per_gpu_hour,
        slots=market.settings.slots,
        slot_s=market.settings.slot_s,
        waiting_discount=market.settings.waiting_discount if market.settings.slots > 1 else 0.0,
    )
    return TakenSnapshot(
        snapshot,
        site_versions={site.site_id: site.version for site in sites},
        changes=0 if state is None else state.changes,
        events_seen=last.events_seen,
        abilities=abilities,
        budgets_left=budgets_left(session),
    )


def left_s(spec: JobSpec, now_ms: int) -> float | None:
    """Return the time to a job's deadline, None without one."""
    return None if spec.market.deadline_ms is None else (spec.market.deadline_ms - now_ms) / 1000


def renewal_starts_ms(placement: Placement) -> int:
    """Return when the placement's term is offered again."""
    assert placement.term_ends_ms is not None, "only an active placement has a term"
    lead_s = min(placement.term_s * RENEWAL_SHARE, RENEWAL_S_MAX)
    return placement.term_ends_ms - round(lead_s * 1000)


def _site_state(site: Site) -> SiteState:
    offer = Offer.model_validate_json(site.offer)
    return SiteState(
        site_id=site.site_id,
        listens=site.state == Hearing.LIVE and offer.listens,
        region=offer.region,
        continent=offer.continent,
        egress_micros_per_gb=DataEgress(
            to_region=offer.data_egress_to_region,
            to_continent=offer.data_egress_to_continent,
            beyond=offer.data_egress_beyond,
        ),
    )


def _pools(session: Session, sites: dict[str, Site], now_ms: int) -> list[PoolState]:
    held = _held_by_pool(session, sites, now_ms)
    free = free_by_pool(session)
    rows = []
    for pool in session.scalars(select(Pool).order_by(Pool.pool_id)):
        site = sites.get(pool.site_id)
        if site is None:
            continue
        offer = Offer.model_validate_json(site.offer)
        offered = next((each for each in offer.pools if each.gpu_type == pool.gpu_type), None)
        selling = site.state == Hearing.LIVE and not offer.draining
        rows.append(
            PoolState(
                **_terms_of_offer(offer, offered),
                pool_id=pool.pool_id,
                site_id=pool.site_id,
                gpu_type=pool.gpu_type,
                capacity_gpus=held.get(pool.pool_id, 0) + (free.get(pool.pool_id, 0) if selling else 0),
                ask_micros_per_gpu_hour=pool.ask_micros_per_gpu_hour,
                flops_per_s=pool.flops_per_s,
            )
        )
    return rows


def _terms_of_offer(offer: Offer, offered: PoolOffer | None) -> dict[str, Any]:
    """Return what a pool's owner asks beyond its flat price: the curve, a quota, reservations, an announced drain."""
    if offered is None:
        return {}  # its running leases keep their prices; nothing else of it is sold
    return {
        "ask_steps": tuple(AskStep(**step.model_dump()) for step in offered.ask_steps),
        "job_gpus_max": offered.job_gpus_max,
        "reserved": tuple(Reservation(**kept.model_dump()) for kept in offered.reserved),
        "drains_at_ms": offer.drains_at_ms,
    }


def _held_by_pool(session: Session, sites: dict[str, Site], now_ms: int) -> dict[str, int]:
    """Count the GPUs of live leases, and of what moving jobs get in their place.

    A site that drains keeps its running terms and renews none.
    """
    held: dict[str, int] = {}
    moves = open_moves(session)
    for opened in moves.values():
        if opened.award is not None:
            stays = _held_by_those_who_stay(session, opened)
            for part in Award.model_validate_json(opened.award).configuration.parts:
                if part.pool_id not in stays:
                    held[part.pool_id] = held.get(part.pool_id, 0) + part.gpus
    live = select(Lease, Placement).join(Placement, Placement.placement_id == Lease.placement_id).where(LEASE_STANDS)
    for lease, placement in session.execute(live):
        site = sites.get(lease.site_id)
        move = moves.get(lease.placement_id)
        if move is not None and lease.site_id in json.loads(move.leaving):
            continue  # what its job gets instead is counted
        up_for_renewal = placement.term_ends_ms is not None and now_ms >= renewal_starts_ms(placement)
        if site is not None and not (up_for_renewal and _drains(site)):
            held[lease.pool_id] = held.get(lease.pool_id, 0) + lease.gpus
    return held


def open_moves(session: Session) -> dict[str, Move]:
    """Return the moves whose sites have not all left, by placement."""
    leaving = session.scalars(select(Move).where(Move.state == MoveState.LEAVING))
    return {move.placement_id: move for move in leaving}


def _held_by_those_who_stay(session: Session, move: Move) -> set[str]:
    """Return the pools of the sites that go on while others of their gang leave; they are counted by their leases."""
    leaving = json.loads(move.leaving)
    standing = select(Lease.site_id, Lease.pool_id).where(
        Lease.placement_id == move.placement_id, Lease.state != LeaseState.ENDED
    )
    return {pool_id for site_id, pool_id in session.execute(standing) if site_id not in leaving}


def free_by_pool(session: Session) -> dict[str, int]:
    """Count the present GPUs that serve no lease, not even one that ended and may still have processes.

    Those that a moving job gets once its sites have left are promised.
    """
    promised = promised_by_pool(session)
    taken = select(LeasedGpu.gpu_id).where(
        LeasedGpu.site_id == Gpu.site_id, LeasedGpu.gpu_id == Gpu.gpu_id, LeasedGpu.live
    )
    counted = session.execute(
        select(Gpu.pool_id, func.count()).where(Gpu.present, ~taken.exists()).group_by(Gpu.pool_id)
    )
    return {pool_id: max(0, count - promised.get(pool_id, 0)) for pool_id, count in counted}


def _drains(site: Site) -> bool:
    return Offer.model_validate_json(site.offer).draining


def _jobs(  # noqa: PLR0917  what a round's jobs depend on
    session: Session,
    market: Market,
    placements: dict[str, Placement],
    now_ms: int,
    number: int,
    abilities: Mapping[str, Ability],
) -> list[tuple[str, JobState]]:
    """Return the jobs that a round may place, each with its tenant; `abilities` names the round's sites."""
    sites = set(abilities)
    barred: dict[str, list[str]] = {}
    for bar in session.scalars(select(BarredConfiguration).where(BarredConfiguration.until_round >= number)):
        barred.setdefault(bar.job_id, []).append(bar.configuration_key)
    rows = session.execute(
        select(Job, Hold)
        .join(Hold, Hold.job_id == Job.job_id)
        .where(Job.state.in_([State.QUEUED, State.PROPOSED, State.RUNNING]))
        .order_by(Job.job_id)
    )
    due = due_of_ended(session, market)
    refused = read_refusals(session, now_ms)
    homes = _homes(session, sites)
    equity = free_equity(session, now_ms)
    speeds = read_speeds(session)
    moves, moved = open_moves(session), moved_terms(session)
    states = []
    for job, hold in rows:
        spec = JobSpec.model_validate_json(job.spec)
        placement = placements.get(job.job_id)
        move = None if placement is None else moves.get(placement.placement_id)
        if move is not None and move.award is None:
            continue  # it stops, and waits for another term then
        incumbent = (
            None
            if placement is None
            else _incumbent(session, market, placement, now_ms, equity, moved, spec, abilities)
        )
        if move is not None and move.award is not None and placement is not None:
            incumbent = _as_moved(Award.model_validate_json(move.award), placement, now_ms)
        reserved = 0 if placement is None else placement.reserved_micros - placement.charged_micros
        left = max(0, hold.amount_micros - hold.posted_micros - hold.voided_micros - due.get(job.job_id, 0))
        up_for_renewal = incumbent is not None and incumbent.term_ends_ms <= now_ms
        standing = set() if incumbent is None else {part.site_id for part in incumbent.configuration.parts}
        declined = refused.get(job.job_id, NOWHERE) if incumbent is None or up_for_renewal else NOWHERE
        declined |= lacking(spec, abilities, but=standing)
        if incumbent is None:
            declined |= too_early(
                spec, abilities, waited_s=(now_ms - job.submitted_ms) / 1000, left_s=left_s(spec, now_ms)
            )
        state = job_state(
            job.job_id,
            spec,
            version=job.version,
            submitted_ms=job.submitted_ms,
            samples_done=job.samples_done,
            # What the running term may still cost is not there for the next one.
            hold_left_micros=max(0, left - reserved) if up_for_renewal else left,
            barred=tuple(sorted(barred.get(job.job_id, ()))),
            incumbent=incumbent,
            home_site=homes.get(job.tenant_id),
            sites=sites,
            # An owner's word is about what comes next: a running term keeps its place.
            refused=declined,
            read_from=read_from(spec, abilities),
            speeds=speeds.valued(job.tenant_id, spec),
        )
        states.append((job.tenant_id, state))
    return states


def _homes(session: Session, sites: set[str]) -> dict[str, str]:
    """Return the home sites of tenants, those that are in this round."""
    known = session.execute(select(Tenant.tenant_id, Tenant.home_site).where(Tenant.home_site.is_not(None)))
    return {tenant_id: home for tenant_id, home in known if home in sites}


def job_state(
    job_id: str,
    spec: JobSpec,
    *,
    version: int,
    submitted_ms: int,
    hold_left_micros: int,
    samples_done: int = 0,
    barred: tuple[str, ...] = (),
    sites: Collection[str],
    incumbent: Incumbent | None = None,
    home_site: str | None = None,
    refused: Refused = NOWHERE,
    read_from: DataState | None = None,
    speeds: tuple[JobSpeed, ...] = (),
) -> JobState:
    """Return a job as the solver sees it; `home_site` is whose customer its tenant is, its data may be anywhere.

    `read_from` says where datasets that must be brought come from. `sites` are those of the round: a job whose data may not leave a site that is gone can be nowhere.
    """
    data, allowed = spec.market.data, spec.market.sites_allowed
    if data is not None and data.home_site not in sites:
        allowed = allowed if data.residency == "world" else (data.home_site,)
        data = None
    return JobState(
        job_id=job_id,
        version=version,
        submitted_ms=submitted_ms,
        accelerators=spec.resources.accelerators,
        sites_max=1 if refused.gangs else spec.market.sites_max,
        sites_allowed=sites_left(allowed, refused, sites),
        workload=spec.market.workload,
        sync=spec.market.sync,
        samples_done=samples_done,
        bid_micros_per_million_samples=spec.bid_micros_per_million_samples,
        hold_left_micros=hold_left_micros,
        deadline_ms=spec.market.deadline_ms,
        barred=barred,
        incumbent=incumbent,
        data=_data(data, home_site) if read_from is None else read_from,
        bid_steps=tuple(BidStep(**step.model_dump()) for step in spec.market.bid_steps),
        mixed_types=spec.market.mixed_types,
        # A rule of merging that few ways go with leaves nothing to choose.
        sync_open=spec.market.sync.strategy == "auto" and spec.market.sync.merge == "mean",
        speeds=speeds,
    )


def _data(data: DataTerms | None, home_site: str | None) -> DataState | None:
    """Return where the job's data lies as its tenant says, else that its tenant is `home_site`'s customer."""
    if data is not None:
        return DataState(**data.model_dump())
    return None if home_site is None else DataState(home_site=home_site, bytes_per_sample=0.0)


def _as_moved(award: Award, placement: Placement, now_ms: int) -> Incumbent:
    """Return a job that is being moved as what it gets: decided, paid for and not asked about again."""
    return Incumbent(
        configuration=award.configuration,
        epoch=placement.epoch,
        locked_prices={charge.pool_id: charge.price_micros_per_gpu_hour for charge in award.pools},
        term_ends_ms=now_ms + award.term_s * 1000,
        restart_cost_micros=RESTART_MICROS_UNAFFORDABLE,
    )


def _incumbent(  # noqa: PLR0917  what an incumbent depends on
    session: Session,
    market: Market,
    placement: Placement,
    now_ms: int,
    equity_micros: int,
    moved: Collection[tuple[str, int]],
    spec: JobSpec,
    abilities: Mapping[str, Ability],
) -> Incumbent | None:
    award = Award.model_validate_json(placement.award)
    if placement.state == PlacementState.PROPOSED or placement.term_ends_ms is None:
        ends_ms = now_ms + placement.term_s * 1000
    elif now_ms >= renewal_starts_ms(placement):
        ends_ms = now_ms
    else:
        ends_ms = placement.term_ends_ms
    leases = [lease for lease in leases_of(session, placement) if lease.state != LeaseState.ENDED]
    standing = {lease.site_id for lease in leases}
    configuration = _standing_part(award.configuration, standing)
    if configuration is None:
        return None
    restart_s = market.settings.restart_s + least_elsewhere_s(spec, abilities, standing)
    restart_micros = min(
        round(placement.value_micros_per_hour * restart_s / SECONDS_PER_HOUR), RESTART_MICROS_UNAFFORDABLE
    )
    is_joined = placement.state == PlacementState.ACTIVE and any(lease.state != LeaseState.ACTIVE for lease in leases)
    if ends_ms > now_ms and (
        # A move inside a term is compensated: what the market cannot pay for is not worth any move.
        restart_micros > equity_micros
        # A move earns its cost over the term that it was made for: before its end there is no other.
        or (placement.job_id, terms_of(session, placement.placement_id)[-1].round_number) in moved
        or is_joined
    ):
        restart_micros = RESTART_MICROS_UNAFFORDABLE
    return Incumbent(
        configuration=configuration,
        epoch=placement.epoch,
        locked_prices={charge.pool_id: charge.price_micros_per_gpu_hour for charge in award.pools},
        term_ends_ms=ends_ms,
        restart_cost_micros=restart_micros,
    )


def _standing_part(configuration: Configuration, standing: set[str]) -> Configuration | None:
    """Return the configuration without the sites that were lost, its speed reduced by their share."""
    parts = tuple(part for part in configuration.parts if part.site_id in standing)
    if len(parts) == len(configuration.parts):
        return configuration
    if not parts:
        return None
    share = sum(part.gpus for part in parts) / configuration.gpus
    sites = {part.site_id for part in parts}
    return configuration.model_copy(
        update={
            "parts": parts,
            "samples_per_s": configuration.samples_per_s * share,
            "hub_site": configuration.hub_site if configuration.hub_site in sites else parts[0].site_id,
            "traffic": tuple(row for row in configuration.traffic if {row.from_site, row.to_site} <= sites),
        }
    )


def free_equity(session: Session, now_ms: int) -> int:
    """Return what the market may still promise beyond the uplift of running terms, in micro-credits."""
    equity = session.get(Account, EQUITY)
    balance = 0 if equity is None else equity.balance_micros
    promised = 0
    for placement in session.scalars(select(Placement).where(PLACEMENT_STANDS, Placement.uplift_micros_per_hour > 0)):
        ends_ms = placement.term_ends_ms or now_ms + placement.term_s * 1000
        promised += placement.uplift_micros_per_hour * max(0, ends_ms - now_ms) // 3_600_000 + 1
    return max(0, balance - promised)
