"""The rounds as an admin sees them: the list, one round with its clearing, its replay, and freezing the market."""

from __future__ import annotations

import json
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from flask import redirect, request, url_for
from sqlalchemy.orm import Session
from werkzeug.wrappers import Response

from broker.allocation.clearing import Certificate, Clearing, Placement, Unplaced
from broker.api.context import the_market
from broker.artifacts import ArtifactMissingError
from broker.database.certificates import RoundCertificate
from broker.database.tables import Round
from broker.errors import NotFoundError
from broker.freeze import frozen_since, set_frozen
from broker.portal.blueprint import Access, page, show, the_actor, the_person
from broker.queries.market import ROUNDS_PER_PAGE, find_round, list_rounds
from broker.rounds.certificate import SignedCertificate, Statement, read_statement
from broker.rounds.replay import replay

PLACEMENTS_SHOWN: Final = 100
PRICES_SHOWN: Final = 200
SITES_SHOWN: Final = 200
REASON_LENGTH_MAX: Final = 500


@dataclass(frozen=True, slots=True)
class RoundView:
    """One round; placements are None once its clearing is past its retention, its statement before rounds were signed."""

    row: Round
    certificate: Certificate
    statement: Statement | None
    sites: tuple[dict[str, Any], ...]
    prices: tuple[tuple[str, int], ...]
    prices_in_all: int
    placements: tuple[Placement, ...] | None
    placements_in_all: int
    unplaced: tuple[Unplaced, ...]
    unplaced_in_all: int
    dropped: tuple[dict[str, str], ...]


@page("/admin/rounds", Access.ADMIN)
def rounds() -> Response:
    """List the rounds, newest first, and say whether any are held."""
    text = request.args.get("before", "")
    before = int(text) if text.isascii() and text.isdigit() and len(text) < 16 else None  # noqa: PLR2004  below 2^63

    def work(session: Session) -> dict[str, object]:
        rows = list_rounds(session, before=before)
        shown = rows[:ROUNDS_PER_PAGE]
        return {
            "rows": shown,
            "next": shown[-1].row.round_number if len(rows) > ROUNDS_PER_PAGE else None,
            "frozen": frozen_since(session),
        }

    return show("rounds.html", **the_market().database.read(work))


@page("/admin/market/freeze", Access.ADMIN, method="POST")
def freeze() -> Response:
    """Stop the market from taking anything new; what runs goes on."""
    return _set_frozen(frozen=True)


@page("/admin/market/thaw", Access.ADMIN, method="POST")
def thaw() -> Response:
    """Let the market take work again."""
    return _set_frozen(frozen=False)


def _set_frozen(*, frozen: bool) -> Response:
    reason = request.form.get("reason", "").strip()[:REASON_LENGTH_MAX]
    login = the_person().login
    set_frozen(
        the_market(),
        frozen=frozen,
        reason=f"{reason} (by {login})" if reason else f"by {login}",
        actor=the_actor(),
    )
    return redirect(url_for("portal.rounds"), HTTPStatus.SEE_OTHER)


@page("/admin/rounds/<int:round_number>", Access.ADMIN)
def round_page(round_number: int) -> Response:
    """Show one round: prices, certificate, placements with why, and what was dropped."""
    return show("round.html", view=_read(round_number))


@page("/admin/rounds/<int:round_number>/replay", Access.ADMIN, method="POST")
def replay_round(round_number: int) -> Response:
    """Solve a round again from its snapshot and say whether it comes out the same."""
    view = _read(round_number)
    return show("round.html", view=view, replay=replay(the_market(), round_number))


def _read(round_number: int) -> RoundView:
    market = the_market()
    if round_number >= 2**62:  # beyond what a database's column holds
        raise NotFoundError("there is no round of that number")
    row, signed = market.database.read(
        lambda session: (find_round(session, round_number), session.get(RoundCertificate, round_number))
    )
    try:
        clearing = Clearing.from_json(market.artifacts.get_bytes(row.clearing_digest))
    except ArtifactMissingError:
        clearing = None
    prices = sorted(json.loads(row.prices).items())
    dropped = json.loads(row.dropped)
    return RoundView(
        row=row,
        certificate=Certificate.model_validate_json(row.certificate),
        statement=None if signed is None else read_statement(SignedCertificate.model_validate_json(signed.document)),
        sites=() if signed is None else tuple(json.loads(signed.sites)[:SITES_SHOWN]),
        prices=tuple((pool_id, int(price)) for pool_id, price in prices[:PRICES_SHOWN]),
        prices_in_all=len(prices),
        placements=None if clearing is None else clearing.placements[:PLACEMENTS_SHOWN],
        placements_in_all=0 if clearing is None else len(clearing.placements),
        unplaced=() if clearing is None else clearing.unplaced[:PLACEMENTS_SHOWN],
        unplaced_in_all=0 if clearing is None else len(clearing.unplaced),
        dropped=tuple(dropped[:PLACEMENTS_SHOWN]),
    )
