"""The links of a round: what their owners declare, and what the market counts with once they were measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from sqlalchemy import select
from sqlalchemy.orm import Session

from broker.allocation.snapshot import LinkState
from broker.database.tables import Link
from broker.links.estimate import Figures, counted
from broker.links.estimates import read_estimates, read_withheld
from broker.market import Market
from broker.rounds.last_round import SitePair


def counted_links(
    session: Session, market: Market, sites: set[str], last_prices: Mapping[SitePair, int] | None = None
) -> list[LinkState]:
    """Return the links between `sites`, in order: no more than is declared, nor than was measured.

    `last_prices` are the last round's, where they are known.
    """
    declared = declared_links(session, sites, last_prices)
    found = read_estimates(session, market.settings.link_half_life_s, market.clock.now_ms())
    if not found:
        return declared
    withheld = read_withheld(session, found)
    states = []
    for link in declared:
        way = (link.from_site, link.to_site)
        stated = Figures(link.bandwidth_bits_per_s, link.delay_s, link.loss)
        figures = counted(stated, found.get(way), withheld=way in withheld)
        states.append(link.model_copy(update=asdict(figures)))
    return states


def declared_links(
    session: Session, sites: set[str], last_prices: Mapping[SitePair, int] | None = None
) -> list[LinkState]:
    """Return the links between `sites` as their owners declare them, in order."""
    prices = last_prices or {}
    return [
        LinkState(
            from_site=link.source,
            to_site=link.target,
            bandwidth_bits_per_s=link.bandwidth_bits_per_s,
            delay_s=link.delay_s,
            loss=link.loss,
            egress_price_micros_per_gb=link.egress_price_micros_per_gb,
            last_price_micros_per_share_hour=prices.get((link.source, link.target), 0),
        )
        for link in session.scalars(select(Link).order_by(Link.source, Link.target))
        if link.source in sites and link.target in sites and link.source != link.target
    ]
