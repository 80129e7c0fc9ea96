"""The instant lane: a small urgent job (`market: {start: now}`) gets a lease at the last round's prices, without a round.

Decided outside the transaction from a short read, guarded in the one that submits: the prices must still be the last
ones, the offers unchanged and the GPUs free. From then on it is a placement like any other: sites confirm or veto, the
next round finds it as an incumbent, and its term names the round whose prices it has. A job that cannot start now is
refused with the reason and leaves nothing behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from broker.abilities import lacking
from broker.allocation.clearing import Placement as Award
from broker.allocation.instant import NotNow, instant
from broker.allocation.snapshot import PoolState
from broker.database.tables import Job, Round, Site
from broker.errors import ConflictError, RefusedError
from broker.freeze import require_open
from broker.leases import propose
from broker.market import Market
from broker.rounds.snapshot import free_by_pool, job_state, left_s, take
from broker.speeds import read_speeds
from broker.staging import read_from, too_early
from broker.tenant_limits import budget_left_micros_per_hour
from broker.transitions import SiteState, record_event
from pricing.money import format_credits
from sites.protocol import Offer
from training.spec import JobSpec

LANE: Final = "instant"
# How often an offer that was overtaken by a round or by another job is made anew.
TRIES_MAX: Final = 3
_ADVICE: Final = "leave `start: now` out, and it waits for the next round"


class InstantRefusedError(RefusedError):
    """A job that cannot start at the last prices now."""

    code = "instant.refused"


class InstantOvertakenError(ConflictError):
    """The market changed between offer and commit, several times over."""

    code = "instant.overtaken"


@dataclass(frozen=True, slots=True)
class InstantOffer:
    """A placement at the prices of a round, and the versions of the offers that it was made from."""

    award: Award
    round_number: int
    site_versions: dict[str, int]


def wants_instant(spec: JobSpec) -> bool:
    """Say whether a job asks for the instant lane."""
    return spec.market.start == "now"


def make_offer(market: Market, tenant_id: str, spec: JobSpec) -> InstantOffer:
    """Return what a job gets at once. Raises InstantRefusedError with the reason where it gets nothing."""
    _require_small(market, spec)
    return market.database.read(lambda session: _offer(session, market, tenant_id, spec))


def commit_offer(session: Session, market: Market, job: Job, offer: InstantOffer) -> list[str] | None:
    """Propose the lease in the transaction that submits the job; return the sites to wake.

    Returns None, and writes nothing, where the offer no longer stands.
    """
    require_open(session)
    newest = session.scalar(select(func.max(Round.round_number)))
    if newest != offer.round_number:
        return None
    for site_id, version in offer.site_versions.items():
        site = session.get(Site, site_id)
        if site is None or site.version != version:
            return None
    left = budget_left_micros_per_hour(session, job.tenant_id)
    if left is not None and offer.award.charge_micros_per_hour > left:
        return None  # another job of the tenant was placed meanwhile
    award = offer.award.model_copy(update={"job_id": job.job_id, "job_version": job.version})
    sites = propose(session, market, job, award, offer.round_number, lane=LANE)
    if sites is not None:
        record_event(
            session,
            LANE,
            now_ms=market.clock.now_ms(),
            job_id=job.job_id,
            tenant_id=job.tenant_id,
            round_number=offer.round_number,
            detail=f"placed at once at the prices of round {offer.round_number}, "
            f"{format_credits(award.charge_micros_per_hour)} credits an hour",
        )
    return sites


def _require_small(market: Market, spec: JobSpec) -> None:
    most = market.settings.instant_gpus_max
    least = min(request.count_min for request in spec.resources.accelerators)
    if most == 0:
        raise InstantRefusedError(f"this market has no instant lane; {_ADVICE}")
    if least > most:
        raise InstantRefusedError(
            f"only jobs of up to {most} GPUs can start at the last prices, and this one wants {least}; {_ADVICE}"
        )


def _offer(session: Session, market: Market, tenant_id: str, spec: JobSpec) -> InstantOffer:
    require_open(session)
    newest = session.scalar(select(func.max(Round.round_number)))
    if newest is None:
        raise InstantRefusedError(f"no round has been held yet, so there are no prices; {_ADVICE}")
    taken = take(session, market, with_jobs=False)
    job = job_state(
        "instant",
        spec,
        version=0,
        submitted_ms=taken.snapshot.taken_at_ms,
        hold_left_micros=spec.market.budget_micros,
        sites=taken.site_versions,
        refused=lacking(spec, taken.abilities)
        | too_early(spec, taken.abilities, waited_s=0.0, left_s=left_s(spec, taken.snapshot.taken_at_ms)),
        read_from=read_from(spec, taken.abilities),
        speeds=read_speeds(session).valued(tenant_id, spec),
    ).model_copy(update={"sites_max": 1})
    pools = _free_pools(session, market, taken.snapshot.pools, taken.snapshot.last_prices)
    if not pools:
        raise InstantRefusedError(f"no GPU that has a price is free now; {_ADVICE}")
    alone = taken.snapshot.model_copy(update={"jobs": (job,), "pools": pools, "links": (), "market_equity_micros": 0})
    found = instant(alone)
    if isinstance(found, NotNow):
        raise InstantRefusedError(f"it cannot start now: {found.sentence}; or {_ADVICE}")
    left = budget_left_micros_per_hour(session, tenant_id)
    if left is not None and found.charge_micros_per_hour > left:
        raise InstantRefusedError(
            f"it would cost {format_credits(found.charge_micros_per_hour)} credits an hour, and the budget of "
            f"{tenant_id} has {format_credits(left)} an hour left; raise it (hansa budget), or {_ADVICE}"
        )
    sites = {part.site_id for part in found.configuration.parts}
    return InstantOffer(found, newest, {site: taken.site_versions[site] for site in sites})


def _free_pools(
    session: Session, market: Market, pools: tuple[PoolState, ...], last_prices: dict[str, int]
) -> tuple[PoolState, ...]:
    """Return what is free of the pools that the last round priced, at sites that sell now."""
    free = free_by_pool(session)
    selling = {
        site.site_id
        for site in session.scalars(select(Site).where(Site.state == SiteState.LIVE))
        if not Offer.model_validate_json(site.offer).draining
    }
    return tuple(
        pool.model_copy(
            update={
                "capacity_gpus": free[pool.pool_id],
                "job_gpus_max": min(market.settings.instant_gpus_max, pool.job_gpus_max or free[pool.pool_id]),
            }
        )
        for pool in pools
        if pool.site_id in selling and free.get(pool.pool_id, 0) and pool.pool_id in last_prices
    )
