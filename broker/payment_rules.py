"""The market's payment rule: what buyers pay from the next round on. What is sold already keeps its terms.

A round's snapshot holds the rule, so that a replay charges as the round did; `pricing.payments` says what each means.
"""

from __future__ import annotations

from sqlalchemy.orm import Session

from broker.database.tables import MarketState
from broker.market import Market
from broker.transitions import note_change, record_event
from pricing.payments import PaymentRule


def payment_rule(session: Session) -> PaymentRule:
    """Return the rule in force."""
    state = session.get(MarketState, 1)
    return PaymentRule.UNIFORM if state is None else PaymentRule(state.payment_rule)


def set_payment_rule(market: Market, rule: PaymentRule, *, actor: str | None = None) -> bool:
    """Charge by `rule` from the next round on; return whether that changed anything."""
    now_ms = market.clock.now_ms()

    def work(session: Session) -> bool:
        note_change(session)
        state = session.get_one(MarketState, 1)
        before = state.payment_rule
        if before == rule:
            return False
        state.payment_rule = rule.value
        record_event(session, "payment_rule", now_ms=now_ms, before=before, after=rule.value, actor=actor)
        return True

    changed = market.database.write("payment rule", work)
    market.doorbell.ring_round()
    return changed
