"""What an admin sees of the sites: when each was heard, what it offers, what it runs, its links."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from broker.database.standing import LEASE_STANDS
from broker.database.tables import Account, Event, Lease, Link, Pool, Site
from broker.errors import NotFoundError
from broker.ledger import site_account
from broker.queries.market import PoolRow, list_pools
from sites.protocol import Offer

SITES_PER_PAGE: Final = 100
LEASES_MAX: Final = 200
LINKS_MAX: Final = 200
EVENTS_MAX: Final = 50


@dataclass(frozen=True, slots=True)
class SiteRow:
    """One line of the list of sites: what it offers now, how many leases it holds, what it earned."""

    row: Site
    offer: Offer
    leases: int
    balance_micros: int


@dataclass(frozen=True, slots=True)
class SiteView:
    """One site with all that its page shows."""

    row: Site
    offer: Offer
    pools: tuple[PoolRow, ...]
    leases: tuple[Lease, ...]
    links: tuple[Link, ...]
    events: tuple[Event, ...]
    balance_micros: int


def list_sites(session: Session, *, after: str = "", limit: int = SITES_PER_PAGE) -> list[SiteRow]:
    """Return `limit` sites by id, and one more where there is a next page."""
    rows = list(session.scalars(select(Site).where(Site.site_id > after).order_by(Site.site_id).limit(limit + 1)))
    names = [row.site_id for row in rows]
    leases = dict(
        session.execute(
            select(Lease.site_id, func.count()).where(Lease.site_id.in_(names), LEASE_STANDS).group_by(Lease.site_id)
        ).all()
    )
    accounts = [site_account(name) for name in names]
    balances = dict(
        session.execute(select(Account.owner, Account.balance_micros).where(Account.account_id.in_(accounts))).all()
    )
    return [
        SiteRow(
            row=row,
            offer=Offer.model_validate_json(row.offer),
            leases=leases.get(row.site_id, 0),
            balance_micros=balances.get(row.site_id, 0),
        )
        for row in rows
    ]


def read_site(session: Session, site_id: str, prices: dict[str, int]) -> SiteView:
    """Return everything about a site. Raises NotFoundError where there is none."""
    row = session.get(Site, site_id)
    if row is None:
        raise NotFoundError(f"there is no site {site_id[:64]!r}")
    leases = select(Lease).where(Lease.site_id == site_id, LEASE_STANDS)
    links = select(Link).where((Link.source == site_id) | (Link.target == site_id))
    events = select(Event).where(Event.site_id == site_id).order_by(Event.event_id.desc()).limit(EVENTS_MAX)
    pool_ids = list(session.scalars(select(Pool.pool_id).where(Pool.site_id == site_id)))
    account = session.get(Account, site_account(site_id))
    return SiteView(
        row=row,
        offer=Offer.model_validate_json(row.offer),
        pools=tuple(list_pools(session, prices, pool_ids=pool_ids)),
        leases=tuple(session.scalars(leases.order_by(Lease.lease_id).limit(LEASES_MAX))),
        links=tuple(session.scalars(links.order_by(Link.source, Link.target).limit(LINKS_MAX))),
        events=tuple(session.scalars(events)),
        balance_micros=0 if account is None else account.balance_micros,
    )
