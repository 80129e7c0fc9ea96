"""What is public in the market: pools with their prices and use, past prices, and rounds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from broker.allocation.clearing import Certificate
from broker.database.certificates import RoundCertificate
from broker.database.tables import Gpu, Lease, LeasedGpu, Pool, Round, Site
from broker.errors import NotFoundError
from broker.transitions import SiteState

POOLS_PER_PAGE: Final = 100
PRICED_ROUNDS_MAX: Final = 200
CHARTED_POOLS_MAX: Final = 8
ROUNDS_PER_PAGE: Final = 50


@dataclass(frozen=True, slots=True)
class PoolRow:
    """One pool as it stands: what it offers, what is taken, and its price in the last round."""

    pool_id: str
    site_id: str
    gpu_type: str
    site_state: str
    gpus: int
    taken: int
    ask_micros_per_gpu_hour: int
    price_micros_per_gpu_hour: int | None


@dataclass(frozen=True, slots=True)
class TypeRow:
    """All pools of one GPU type together."""

    gpu_type: str
    pools: int
    gpus: int
    taken: int


@dataclass(frozen=True, slots=True)
class RoundRow:
    """One round of the list, with its certificate."""

    row: Round
    certificate: Certificate


def last_round(session: Session) -> Round | None:
    """Return the newest committed round, None before the first."""
    return session.scalar(select(Round).order_by(Round.round_number.desc()).limit(1))


def list_pools(
    session: Session,
    prices: dict[str, int],
    *,
    gpu_type: str | None = None,
    pool_ids: list[str] | None = None,
    after: str = "",
) -> list[PoolRow]:
    """Return a page of pools by id, and one more where there is a next page.

    Of one type or those named; else all of sites that were not removed.
    """
    query = (
        select(Pool, Site.state)
        .join(Site, Site.site_id == Pool.site_id)
        .where(Pool.pool_id > after)
        .order_by(Pool.pool_id)
        .limit(POOLS_PER_PAGE + 1)
    )
    if pool_ids is not None:
        query = query.where(Pool.pool_id.in_(pool_ids))
    else:
        query = query.where(Site.state != SiteState.REMOVED)
    if gpu_type is not None:
        query = query.where(Pool.gpu_type == gpu_type)
    pools = session.execute(query).all()
    names = [pool.pool_id for pool, _ in pools]
    present = dict(
        session.execute(
            select(Gpu.pool_id, func.count()).where(Gpu.pool_id.in_(names), Gpu.present).group_by(Gpu.pool_id)
        ).all()
    )
    taken = _taken_by_pool(session, names)
    return [
        PoolRow(
            pool_id=pool.pool_id,
            site_id=pool.site_id,
            gpu_type=pool.gpu_type,
            site_state=state,
            gpus=present.get(pool.pool_id, 0),
            taken=taken.get(pool.pool_id, 0),
            ask_micros_per_gpu_hour=pool.ask_micros_per_gpu_hour,
            price_micros_per_gpu_hour=prices.get(pool.pool_id),
        )
        for pool, state in pools
    ]


def list_types(session: Session) -> list[TypeRow]:
    """Return capacity and use by GPU type."""
    # Counted by pool first: in one join each GPU's row would carry its pool's name through a sort.
    present = select(Gpu.pool_id, func.count().label("gpus")).where(Gpu.present).group_by(Gpu.pool_id).subquery()
    rows = session.execute(
        select(Pool.gpu_type, func.count(), func.coalesce(func.sum(present.c.gpus), 0))
        .join(Site, Site.site_id == Pool.site_id)
        .join(present, present.c.pool_id == Pool.pool_id, isouter=True)
        .where(Site.state != SiteState.REMOVED)
        .group_by(Pool.gpu_type)
        .order_by(Pool.gpu_type)
    )
    taken = dict(
        session.execute(
            select(Lease.gpu_type, func.count())
            .join(LeasedGpu, LeasedGpu.lease_id == Lease.lease_id)
            .where(LeasedGpu.live)
            .group_by(Lease.gpu_type)
        ).all()
    )
    return [TypeRow(gpu_type, pools, int(gpus), taken.get(gpu_type, 0)) for gpu_type, pools, gpus in rows]


def price_history(session: Session, pool_ids: list[str]) -> dict[str, list[float | None]]:
    """Return the prices of some pools, in credits, over the last rounds: uPlot's columns by name.

    `round` holds the round numbers in rising order; a pool that a round did not price has None there.
    """
    rows = session.execute(
        select(Round.round_number, Round.prices).order_by(Round.round_number.desc()).limit(PRICED_ROUNDS_MAX)
    )
    columns: dict[str, list[float | None]] = {"round": [], **{pool_id: [] for pool_id in pool_ids}}
    for number, text in reversed(rows.all()):
        prices = json.loads(text)
        columns["round"].append(number)
        for pool_id in pool_ids:
            price = prices.get(pool_id)
            columns[pool_id].append(None if price is None else price / 1e6)
    return columns


def list_rounds(session: Session, *, before: int | None = None, limit: int = ROUNDS_PER_PAGE) -> list[RoundRow]:
    """Return `limit` rounds, newest first, and one more where there is a next page."""
    query = select(Round).order_by(Round.round_number.desc()).limit(limit + 1)
    if before is not None:
        query = query.where(Round.round_number < before)
    return [round_row(row) for row in session.scalars(query)]


def rounds_span(session: Session) -> tuple[int, int] | None:
    """Return the numbers of the first and of the newest round, None before there is one."""
    first, last = session.execute(select(func.min(Round.round_number), func.max(Round.round_number))).one()
    return None if first is None else (first, last)


def round_near(session: Session, round_number: int) -> RoundRow:
    """Return the newest round up to a number, else the first. Raises NotFoundError before there is one."""
    upto = select(Round).where(Round.round_number <= round_number).order_by(Round.round_number.desc()).limit(1)
    found = session.scalar(upto) or session.scalar(select(Round).order_by(Round.round_number).limit(1))
    if found is None:
        raise NotFoundError("no round has been held yet")
    return round_row(found)


def round_history(session: Session) -> dict[str, list[float]]:
    """Return what the last rounds' certificates state, in credits per hour: uPlot's columns by name."""
    newest = select(Round.round_number, Round.certificate).order_by(Round.round_number.desc()).limit(PRICED_ROUNDS_MAX)
    rows = [(number, json.loads(text)) for number, text in reversed(session.execute(newest).all())]
    names = ("welfare", "bound", "gap", "uplift")
    return {
        "round": [float(number) for number, _ in rows],
        **{name: [stated[f"{name}_micros_per_hour"] / 1e6 for _, stated in rows] for name in names},
    }


def round_row(row: Round) -> RoundRow:
    """Return a round with its certificate read."""
    return RoundRow(row, Certificate.model_validate_json(row.certificate))


def find_round(session: Session, round_number: int) -> Round:
    """Return a round. Raises NotFoundError where there is none of that number."""
    row = session.get(Round, round_number)
    if row is None:
        raise NotFoundError(f"there is no round {round_number}")
    return row


def find_certificate(session: Session, round_number: int) -> RoundCertificate:
    """Return a round's signed certificate. Raises NotFoundError where there is none."""
    row = session.get(RoundCertificate, round_number)
    if row is None:
        find_round(session, round_number)
        raise NotFoundError(f"round {round_number} was committed before rounds were signed; its row is all there is")
    return row


def _taken_by_pool(session: Session, pool_ids: list[str]) -> dict[str, int]:
    rows = session.execute(
        select(Lease.pool_id, func.count())
        .join(LeasedGpu, LeasedGpu.lease_id == Lease.lease_id)
        .where(LeasedGpu.live, Lease.pool_id.in_(pool_ids))
        .group_by(Lease.pool_id)
    )
    return dict(rows.all())
