"""The market page, for everyone who is signed in: prices now and over rounds, use, the last certificate."""

from __future__ import annotations

import json

from flask import Response as Answer
from flask import jsonify, request
from sqlalchemy.orm import Session
from werkzeug.wrappers import Response

from broker.allocation.clearing import Certificate
from broker.api.context import the_market
from broker.portal.blueprint import Access, page, show
from broker.queries.market import (
    CHARTED_POOLS_MAX,
    POOLS_PER_PAGE,
    PoolRow,
    last_round,
    list_pools,
    list_types,
    price_history,
)


@page("/market", Access.PERSON)
def market() -> Response:
    """Show prices per pool, capacity in use, and the last round's certificate."""
    gpu_type = request.args.get("type") or None
    after = request.args.get("after", "")

    def work(session: Session) -> dict[str, object]:
        newest = last_round(session)
        rows = list_pools(session, _prices(newest.prices if newest else "{}"), gpu_type=gpu_type, after=after)
        shown = rows[:POOLS_PER_PAGE]
        return {
            "round": newest,
            "certificate": None if newest is None else Certificate.model_validate_json(newest.certificate),
            "pools": shown,
            "charted": _charted(shown),
            "types": list_types(session),
            "next": shown[-1].pool_id if len(rows) > POOLS_PER_PAGE else None,
        }

    return show("market.html", gpu_type=gpu_type, **the_market().database.read(work))


@page("/market/prices.json", Access.PERSON)
def market_prices() -> Answer:
    """Return the prices of the pools named over the last rounds, as uPlot takes them."""
    names = request.args.getlist("pool")[:CHARTED_POOLS_MAX]
    return jsonify(the_market().database.read(lambda session: price_history(session, names)))


def _charted(pools: list[PoolRow]) -> list[str]:
    """Return the pools of a page whose prices say most: those in use, then the largest."""
    ranked = sorted(pools, key=lambda pool: (-pool.taken, -pool.gpus, pool.pool_id))
    return sorted(pool.pool_id for pool in ranked[:CHARTED_POOLS_MAX])


def _prices(text: str) -> dict[str, int]:
    return {str(pool_id): int(price) for pool_id, price in json.loads(text).items()}
