"""Freeze and thaw: an admin stops the market from taking anything new; what runs goes on.

`market_state.frozen_ms` is what a round looks at too: a frozen market clears no new placement.
"""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from broker.database.tables import Event, MarketState
from broker.errors import ConflictError
from broker.market import Market
from broker.transitions import note_change, record_event


class FrozenError(ConflictError):
    """The market is frozen by its admin: nothing new is taken."""

    code = "market.frozen"


def set_frozen(market: Market, *, frozen: bool, reason: str = "", actor: str | None = None) -> bool:
    """Freeze or thaw the market; return whether that changed anything."""
    now_ms = market.clock.now_ms()

    def work(session: Session) -> bool:
        note_change(session)
        state = session.get_one(MarketState, 1)
        if (state.frozen_ms is not None) == frozen:
            return False
        state.frozen_ms = now_ms if frozen else None
        record_event(
            session, "market", now_ms=now_ms, after="frozen" if frozen else "thawed", detail=reason, actor=actor
        )
        return True

    changed = market.database.write("freeze", work)
    market.doorbell.ring_round()
    return changed


def frozen_since(session: Session) -> Event | None:
    """Return the event with which the market was frozen, None while it is open."""
    state = session.get(MarketState, 1)
    if state is None or state.frozen_ms is None:
        return None
    frozen = select(Event).where(Event.kind == "market", Event.after == "frozen")
    return session.scalar(frozen.order_by(Event.event_id.desc()).limit(1))


def require_open(session: Session) -> None:
    """Raise FrozenError while the market is frozen."""
    state = session.get(MarketState, 1)
    if state is not None and state.frozen_ms is not None:
        raise FrozenError("the market is frozen by its admin; jobs that run go on, submit again once it is thawed")
