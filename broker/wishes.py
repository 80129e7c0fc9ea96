"""What a site's operator asks of their own site from the portal: kept here, taken or refused by the site's agent.

The site's settings stay in charge. A wish travels in the answer to a heartbeat of an agent that says it takes wishes,
again and again until another one stands; the agent says what it made of it, and what it offers then is the truth.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from broker.database.tables import Pool, Site
from broker.database.wishes import SiteWish
from broker.errors import NotFoundError, RefusedError
from broker.market import Market
from broker.transitions import SiteState, record_event
from pricing.money import format_credits
from sites.protocol import RATE_MICROS_MAX, Heartbeat, Wish


@dataclass(frozen=True, slots=True)
class WishView:
    """A wish as it stands: `is_answered` once the site has said what it made of it."""

    number: int
    asks: dict[str, int]
    draining: bool | None
    asked_ms: int
    is_answered: bool
    refused: str


def make_wish(
    market: Market, site_id: str, asks: Mapping[str, int], *, draining: bool | None, actor: str | None = None
) -> int:
    """Keep what an operator wants their site to offer, in place of the wish before, and return its number.

    `asks` are micro-credits per GPU-hour by type. Raises NotFoundError for a site that is not there, RefusedError
    for a type that it does not offer or an ask out of range.
    """

    def work(session: Session) -> int:
        site = session.get(Site, site_id)
        if site is None or site.state == SiteState.REMOVED:
            raise NotFoundError(f"there is no site {site_id[:64]!r}")
        check_asks(session, site_id, asks)
        row = session.get(SiteWish, site_id)
        if row is None:
            row = SiteWish(site_id=site_id, number=0, answered=0, answer="")
            session.add(row)
        row.number += 1
        row.asks = json.dumps(dict(sorted(asks.items())))
        row.draining = draining
        row.asked_ms = market.clock.now_ms()
        row.answer = ""
        told = [f"{gpu_type} at {format_credits(ask)} credits" for gpu_type, ask in sorted(asks.items())]
        told += [] if draining is None else ["draining" if draining else "not draining"]
        record_event(
            session,
            "wish",
            now_ms=row.asked_ms,
            after="asked",
            site_id=site_id,
            detail=f"{row.number}: {', '.join(told) or 'as its settings say'}",
            actor=actor,
        )
        return row.number

    number = market.database.write("wish", work)
    market.doorbell.wake_site(site_id)
    return number


def check_asks(session: Session, site_id: str, asks: Mapping[str, int]) -> None:
    """Raise RefusedError for an ask of a type that the site does not offer, or one out of range."""
    offered = set(session.scalars(select(Pool.gpu_type).where(Pool.site_id == site_id)))
    unknown = sorted(set(asks) - offered)
    if unknown:
        raise RefusedError(
            f"this site offers no {unknown[0][:40]}; it offers {', '.join(sorted(offered)) or 'nothing'}"
        )
    if not all(0 <= ask <= RATE_MICROS_MAX for ask in asks.values()):
        raise RefusedError("an ask must not be below nought, nor beyond what the market can count")


def standing_wish(session: Session, site_id: str, heartbeat: Heartbeat) -> Wish | None:
    """Take a site's word on a wish, and return what its operator wishes now; None for a site that takes no wishes."""
    row = session.get(SiteWish, site_id)
    if row is None:
        return None
    if not heartbeat.takes_wishes:
        row.answered, row.answer = 0, ""  # its settings allow none any more: what it said before is no answer
        return None
    # Said with every heartbeat, and judged anew whenever the agent starts: the newest word counts.
    reply = heartbeat.wish_reply
    if reply is not None and reply.number == row.number:
        row.answered, row.answer = reply.number, reply.refused
    return Wish(number=row.number, asks_micros_per_gpu_hour=json.loads(row.asks), draining=row.draining)


def read_wish(session: Session, site_id: str) -> WishView | None:
    """Return the wish that stands for a site, None where none was ever made."""
    row = session.get(SiteWish, site_id)
    if row is None:
        return None
    return WishView(
        number=row.number,
        asks=json.loads(row.asks),
        draining=row.draining,
        asked_ms=row.asked_ms,
        is_answered=row.answered == row.number,
        refused=row.answer,
    )
