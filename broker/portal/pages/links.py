"""The links between sites: a matrix of what the market counts with, each figure with its age, and the list behind it."""

from __future__ import annotations

from flask import request
from werkzeug.wrappers import Response

from broker.api.context import the_market
from broker.portal.blueprint import Access, page, show
from broker.queries.links import LINKS_PER_PAGE, list_links, matrix


@page("/admin/links", Access.ADMIN)
def links() -> Response:
    """Show the links as declared, as measured and as counted."""
    market = the_market()
    source, _, target = request.args.get("after", "")[:200].partition(" ")
    half_life_s, now_ms = market.settings.link_half_life_s, market.clock.now_ms()
    rows = market.database.read(
        lambda session: list_links(session, half_life_s, now_ms, after=(source, target), limit=LINKS_PER_PAGE)
    )
    shown = rows[:LINKS_PER_PAGE]
    sites, cells = matrix(shown)
    following = f"{shown[-1].source} {shown[-1].target}" if len(rows) > LINKS_PER_PAGE else None
    return show("links.html", rows=shown, sites=sites, cells=cells, next=following)
