"""Going through the rounds with a slider: prices, bound, gap, uplift and certificate as they were, one round after another."""

from __future__ import annotations

import json
from dataclasses import dataclass

from flask import Response as Answer
from flask import jsonify, request
from sqlalchemy.orm import Session
from werkzeug.wrappers import Response

from broker.api.context import the_market
from broker.database.certificates import RoundCertificate
from broker.errors import NotFoundError
from broker.portal.blueprint import Access, is_fragment, page, show
from broker.queries.market import CHARTED_POOLS_MAX, RoundRow, price_history, round_history, round_near, rounds_span
from broker.rounds.certificate import SignedCertificate, Statement, read_statement

PRICES_SHOWN = 60
_DIGITS_MAX = 15  # below 2^63


@dataclass(frozen=True, slots=True)
class PriceChange:
    """A pool's price in a round and in the one before; None where that did not price it."""

    pool_id: str
    price_micros_per_gpu_hour: int
    before_micros_per_gpu_hour: int | None


@page("/admin/replay", Access.ADMIN)
def replay_rounds() -> Response:
    """Show one round of all, as the slider stands."""
    text = request.args.get("round", "")
    wanted = int(text) if text.isascii() and text.isdigit() and len(text) <= _DIGITS_MAX else None

    def work(session: Session) -> dict[str, object]:
        span = rounds_span(session)
        if span is None:
            raise NotFoundError("no round has been held yet")
        shown = round_near(session, span[1] if wanted is None else wanted)
        before = round_near(session, shown.row.round_number - 1) if shown.row.round_number > span[0] else None
        signed = session.get(RoundCertificate, shown.row.round_number)
        changes = _changes(shown, before)
        charted = sorted(row.pool_id for row in changes[:CHARTED_POOLS_MAX])
        return {
            "first": span[0],
            "last": span[1],
            "shown": shown,
            "before": before,
            "statement": _statement(signed),
            "prices": changes[:PRICES_SHOWN],
            "prices_in_all": len(changes),
            "charted": charted,
        }

    return show("replay_at.html" if is_fragment() else "replay.html", **the_market().database.read(work))


@page("/admin/replay/rounds.json", Access.ADMIN)
def replay_figures() -> Answer:
    """Return welfare, bound, gap and uplift over the last rounds, as uPlot takes them."""
    return jsonify(the_market().database.read(round_history))


@page("/admin/replay/prices.json", Access.ADMIN)
def replay_prices() -> Answer:
    """Return the prices of the pools named over the last rounds, as uPlot takes them."""
    names = request.args.getlist("pool")[:CHARTED_POOLS_MAX]
    return jsonify(the_market().database.read(lambda session: price_history(session, names)))


def _changes(shown: RoundRow, before: RoundRow | None) -> list[PriceChange]:
    """Return the prices of a round, those that changed most first."""
    prices = json.loads(shown.row.prices)
    former = {} if before is None else json.loads(before.row.prices)
    rows = [PriceChange(pool_id, int(price), former.get(pool_id)) for pool_id, price in prices.items()]
    return sorted(
        rows,
        key=lambda row: (
            -abs(row.price_micros_per_gpu_hour - (row.before_micros_per_gpu_hour or 0)),
            -row.price_micros_per_gpu_hour,
            row.pool_id,
        ),
    )


def _statement(signed: RoundCertificate | None) -> Statement | None:
    return None if signed is None else read_statement(SignedCertificate.model_validate_json(signed.document))
