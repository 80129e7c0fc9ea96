"""The route of the links: what is declared, measured and counted of each, for admins."""

from __future__ import annotations

from flask import Response
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag

from broker.api.answers import answers
from broker.api.context import the_market
from broker.api.pages import PageQuery, decode_cursor, encode_cursor
from broker.api.problems import json_answer
from broker.links.estimate import Figures
from broker.queries.links import LinkRow, list_links

_tag = Tag(name="admin", description="What the market's admins do.")
api = APIBlueprint("links", __name__, url_prefix="/v1/admin", abp_tags=[_tag], abp_security=[{"token": []}])


@api.get("/links", responses=answers())
def get_links(query: PageQuery) -> Response:
    """List the links between sites: what their owners declare, what probes measured, what the market counts with."""
    market = the_market()
    after = ("", "") if query.cursor is None else tuple(map(str, decode_cursor(market, "links", query.cursor)))
    half_life_s, now_ms = market.settings.link_half_life_s, market.clock.now_ms()
    rows = market.database.read(
        lambda session: list_links(session, half_life_s, now_ms, after=after, limit=query.limit)
    )
    shown = rows[: query.limit]
    more = encode_cursor(market, "links", [shown[-1].source, shown[-1].target]) if len(rows) > len(shown) else None
    return json_answer({"items": [_document(row) for row in shown], "next_cursor": more})


def _document(row: LinkRow) -> dict[str, object]:
    measured = row.measured
    return {
        "source": row.source,
        "target": row.target,
        "declared": _figures(row.declared),
        "measured": None
        if measured is None
        else {
            "bandwidth_bits_per_s": measured.bandwidth_bits_per_s,
            "delay_s": measured.delay_s,
            "loss": measured.loss,
            "confidence": measured.confidence,
            "measured_ms": measured.measured_ms,
        },
        "counted": _figures(row.counted),
        "age_s": row.age_s,
        "tried_ms": row.tried_ms,
        "trouble": row.trouble,
    }


def _figures(figures: Figures) -> dict[str, float]:
    return {
        "bandwidth_bits_per_s": figures.bandwidth_bits_per_s,
        "delay_s": figures.delay_s,
        "loss": figures.loss,
    }
