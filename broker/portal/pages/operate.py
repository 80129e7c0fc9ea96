"""The pages of a site's operator: what it earns and runs, other asks tried on recent rounds, the statement, draining.

The site's own settings stay in charge: what is set here is a wish (`broker.wishes`), which the agent takes or refuses.
"""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Final

from flask import Response as Answer
from flask import jsonify, redirect, request, url_for
from sqlalchemy.orm import Session
from werkzeug.wrappers import Response

from broker.api.context import the_market
from broker.errors import BrokerError, RefusedError
from broker.invoices import statement
from broker.portal.blueprint import Access, own_site_id, page, show, the_actor
from broker.queries.market import last_round
from broker.queries.operators import delivery, newest_standing
from broker.queries.sites import read_site
from broker.what_if import WhatIf, what_if
from broker.wishes import make_wish, read_wish
from pricing.errors import PricingError
from pricing.money import format_credits, parse_credits

LINES_PER_PAGE: Final = 50
ASK_LENGTH_MAX: Final = 30


@page("/site", Access.OPERATOR)
def own_site() -> Response:
    """Show the operator's site."""
    return _show()


@page("/site/delivery.json", Access.OPERATOR)
def own_delivery() -> Answer:
    """Return what the site delivered and earned by the hour, as uPlot takes it."""
    market, site_id = the_market(), own_site_id()
    found = market.database.read(lambda session: delivery(session, site_id, market.clock.now_ms()))
    return jsonify(
        hour=found.hours,
        earned=[micros / 1e6 for micros in found.earned_micros],
        gpu_hours=found.gpu_hours,
    )


@page("/site/ask", Access.OPERATOR, method="POST")
def take_asks() -> Response:
    """Try the asks in the form on recent rounds, or wish for them, as the pressed button says."""
    market, site_id = the_market(), own_site_id()
    texts = {
        name.removeprefix("ask-"): text.strip()[:ASK_LENGTH_MAX]
        for name, text in request.form.items()
        if name.startswith("ask-") and text.strip()
    }
    step = request.form.get("step", "try")
    try:
        asks = {gpu_type: _micros(gpu_type, text) for gpu_type, text in texts.items()}
        if step == "try":
            if not asks:
                raise RefusedError("write at least one ask to try")
            return _show(texts=texts, tried=what_if(market, site_id, asks))
        wished = market.database.read(lambda session: read_wish(session, site_id))
        draining = None if wished is None else wished.draining
        make_wish(market, site_id, {} if step == "reset" else asks, draining=draining, actor=the_actor())
    except BrokerError as error:
        if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR and error.status != HTTPStatus.SERVICE_UNAVAILABLE:
            raise
        return _show(error.status, texts=texts, refused=str(error))
    return redirect(url_for("portal.own_site"), HTTPStatus.SEE_OTHER)


@page("/site/drain", Access.OPERATOR, method="POST")
def wish_draining() -> Response:
    """Wish for the site to take no new leases, or to take them again."""
    market, site_id = the_market(), own_site_id()
    wished = market.database.read(lambda session: read_wish(session, site_id))
    asks = {} if wished is None else wished.asks
    make_wish(market, site_id, asks, draining=request.form.get("draining") == "yes", actor=the_actor())
    return redirect(url_for("portal.own_site"), HTTPStatus.SEE_OTHER)


@page("/site/statement", Access.OPERATOR)
def own_statement() -> Response:
    """Show what the site earned, job by job."""
    site_id, after = own_site_id(), request.args.get("after", "")[:64]
    found = the_market().database.read(lambda session: statement(session, site_id, after=after, limit=LINES_PER_PAGE))
    return show("own_statement.html", statement=found)


def _show(
    status: int = HTTPStatus.OK,
    /,
    *,
    texts: dict[str, str] | None = None,
    tried: WhatIf | None = None,
    refused: str = "",
) -> Response:
    market, site_id = the_market(), own_site_id()

    def work(session: Session) -> dict[str, object]:
        newest = last_round(session)
        view = read_site(session, site_id, {} if newest is None else json.loads(newest.prices))
        earned = delivery(session, site_id, market.clock.now_ms())
        return {
            "view": view,
            "earned": earned,
            "utilisation": earned.utilisation_day(sum(pool.gpus for pool in view.pools)),
            "standing": newest_standing(session, site_id),
            "wish": read_wish(session, site_id),
        }

    values = market.database.read(work)
    lines = [] if tried is None else [f"{gpu}: {format_credits(ask)}" for gpu, ask in sorted(tried.asks.items())]
    return show("own_site.html", status, texts=texts or {}, tried=tried, lines=lines, refused=refused, **values)


def _micros(gpu_type: str, text: str) -> int:
    try:
        return parse_credits(text)
    except PricingError as error:
        raise RefusedError(f"the ask of {gpu_type[:40]}: {error}") from None
