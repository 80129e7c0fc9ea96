"""The market's public face: prices, rounds with their certificates; and a tenant's account."""

from __future__ import annotations

import json
from typing import Final

from flask import Response
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select
from sqlalchemy.orm import Session

from broker.allocation.instance import RATE_MICROS_PER_HOUR_MAX
from broker.api.answers import answers
from broker.api.chunks import OFFSET_MAX
from broker.api.context import the_actor, the_market, the_principal, the_tenant_id
from broker.api.pages import CURSOR_LENGTH_MAX, PAGE_ROWS_MAX, PageQuery, decode_cursor, encode_cursor
from broker.api.problems import json_answer
from broker.database.tables import Job, MarketState, Placement, Pool, Round, Site, Tenant
from broker.identity.tokens import TokenKind
from broker.queries.market import RoundRow, find_certificate, find_round, list_rounds, round_row
from broker.queries.money import tenant_balance
from broker.rounds.certificate import SignedCertificate, Statement, read_statement
from broker.tenant_limits import set_budget, spending_micros_per_hour
from broker.transitions import SiteState
from training.roundlog.signing import SignedDocument

HISTORY_ROUNDS_MAX: Final = 1000
_tag = Tag(name="market", description="Prices and rounds, which anyone may see, and the caller's account.")
api = APIBlueprint("market", __name__, url_prefix="/v1", abp_tags=[_tag])


class PricesQuery(BaseModel):
    """Which page of pools; with a pool, its history over the last rounds."""

    limit: int = Field(default=PAGE_ROWS_MAX, ge=1, le=PAGE_ROWS_MAX)
    cursor: str | None = Field(default=None, max_length=CURSOR_LENGTH_MAX, description="`next_cursor` of the last page")
    pool: str | None = Field(default=None, max_length=100, pattern=r"^[A-Za-z0-9._/-]+$")
    rounds: int = Field(default=200, ge=1, le=HISTORY_ROUNDS_MAX)


class RoundPath(BaseModel):
    """A round by its number."""

    round_number: int = Field(ge=0, le=OFFSET_MAX)


class PoolPrice(BaseModel):
    """The price of one pool in the last round. `ask_micros_per_gpu_hour` is what its site asks now."""

    pool_id: str
    site_id: str
    gpu_type: str
    price_micros_per_gpu_hour: int | None
    ask_micros_per_gpu_hour: int


class PricePoint(BaseModel):
    """A pool's price in one round."""

    round_number: int
    committed_ms: int
    price_micros_per_gpu_hour: int


class PricesDocument(BaseModel):
    """Prices of the last round by pool; `history` of the pool that was asked for, oldest first."""

    round_number: int | None
    committed_ms: int | None
    items: list[PoolPrice]
    next_cursor: str | None
    history: list[PricePoint]


class RoundDocument(BaseModel):
    """A round in a list."""

    round_number: int
    taken_ms: int
    committed_ms: int
    status: str
    solver: str
    solve_s: float
    jobs_considered: int
    placements_made: int
    gap_micros_per_hour: int
    welfare_micros_per_hour: int


class RoundPage(BaseModel):
    """A page of rounds, newest first."""

    items: list[RoundDocument]
    next_cursor: str | None


class PlacementSummary(BaseModel):
    """A placement that the caller may see."""

    job_id: str
    placement_id: str
    state: str
    configuration_key: str
    charge_micros_per_hour: int
    why: str


class RoundDetail(RoundDocument):
    """A round with its prices and certificate, and those of its placements that are the caller's to see."""

    snapshot_digest: str
    clearing_digest: str
    prices: dict[str, object]
    certificate: dict[str, object]
    placements: list[PlacementSummary]


class CertificateDocument(BaseModel):
    """A round's certificate: `statement` to read, `signed` (the same, base64) and `key_pem` to check.

    The market's CA vouches for `key_pem`, whose key signed the statement. `economics` of the statement is there once
    it has been worked out; then the document is signed anew.
    """

    statement: Statement
    signed: SignedDocument
    key_pem: str
    signed_ms: int


class AccountDocument(BaseModel):
    """What a tenant may spend, and what its open jobs have set aside."""

    tenant_id: str
    balance_micros: int
    held_micros: int
    budget_micros_per_hour: int | None
    spending_micros_per_hour: int
    frozen: bool


class Budget(BaseModel):
    """What all jobs of a tenant may cost together."""

    model_config = ConfigDict(extra="forbid")

    budget_micros_per_hour: int | None = Field(
        ge=1, le=RATE_MICROS_PER_HOUR_MAX, description="micro-credits per hour; null: no bound"
    )


@api.get("/prices", responses=answers(PricesDocument))
def get_prices(query: PricesQuery) -> Response:
    """Show what a GPU costs in each pool, by the last round."""
    market = the_market()
    after = "" if query.cursor is None else str(decode_cursor(market, "prices", query.cursor)[0])
    document, more = market.database.read(lambda session: _prices(session, query, after))
    if more:
        document.next_cursor = encode_cursor(market, "prices", [document.items[-1].pool_id])
    return json_answer(document)


@api.get("/rounds", responses=answers(RoundPage))
def get_rounds(query: PageQuery) -> Response:
    """List rounds, newest first."""
    market = the_market()
    before = None if query.cursor is None else int(decode_cursor(market, "rounds", query.cursor)[0])
    rows = market.database.read(lambda session: list_rounds(session, before=before, limit=query.limit))
    shown = rows[: query.limit]
    more = encode_cursor(market, "rounds", [shown[-1].row.round_number]) if len(rows) > len(shown) else None
    return json_answer(RoundPage(items=[RoundDocument(**_round_fields(row)) for row in shown], next_cursor=more))


@api.get("/rounds/<int:round_number>", responses=answers(RoundDetail))
def get_round(path: RoundPath) -> Response:
    """Show one round: prices, certificate, and the caller's placements in it."""
    return json_answer(the_market().database.read(lambda session: _round(session, path.round_number)))


@api.get("/rounds/<int:round_number>/certificate", responses=answers(CertificateDocument))
def get_certificate(path: RoundPath) -> Response:
    """Show what the market states of a round, signed: bound, gap, price support, balance, and what sharing was worth."""
    row = the_market().database.read(lambda session: find_certificate(session, path.round_number))
    document = SignedCertificate.model_validate_json(row.document)
    return json_answer(
        CertificateDocument(
            statement=read_statement(document),
            signed=document.signed,
            key_pem=document.key_pem,
            signed_ms=row.signed_ms,
        )
    )


@api.get("/account", responses=answers(AccountDocument), security=[{"token": []}])
def get_account() -> Response:
    """Show the tenant's balance and what is held for its jobs."""
    tenant_id = the_tenant_id()
    return json_answer(the_market().database.read(lambda session: _account(session, tenant_id)))


@api.put("/account/budget", responses=answers(AccountDocument), security=[{"token": []}])
def put_budget(body: Budget) -> Response:
    """Bound what the tenant's jobs may cost together. What runs already runs on; nothing new starts beyond it."""
    market, tenant_id, actor = the_market(), the_tenant_id(), the_actor()

    def work(session: Session) -> AccountDocument:
        set_budget(session, market, tenant_id, body.budget_micros_per_hour, actor=actor)
        return _account(session, tenant_id)

    return json_answer(market.database.write("budget", work))


def _account(session: Session, tenant_id: str) -> AccountDocument:
    state = session.get(MarketState, 1)
    tenant = session.get_one(Tenant, tenant_id)
    balance = tenant_balance(session, tenant_id)
    return AccountDocument(
        tenant_id=tenant_id,
        balance_micros=balance.free_micros,
        held_micros=balance.held_micros,
        budget_micros_per_hour=tenant.budget_micros_per_hour,
        spending_micros_per_hour=spending_micros_per_hour(session, tenant_id),
        frozen=state is not None and state.frozen_ms is not None,
    )


def _prices(session: Session, query: PricesQuery, after: str) -> tuple[PricesDocument, bool]:
    """Return a page of prices, and whether there is another after it."""
    rows = list(session.scalars(select(Round).order_by(Round.round_number.desc()).limit(query.rounds)))
    newest = rows[0] if rows else None
    prices = {} if newest is None else json.loads(newest.prices)
    history = []
    if query.pool is not None:
        for row in reversed(rows):
            price = json.loads(row.prices).get(query.pool)
            if price is not None:
                history.append(
                    PricePoint(
                        round_number=row.round_number, committed_ms=row.committed_ms, price_micros_per_gpu_hour=price
                    )
                )
    offered = select(Pool).join(Site, Site.site_id == Pool.site_id).where(Site.state != SiteState.REMOVED)
    page = offered.where(Pool.pool_id > after).order_by(Pool.pool_id).limit(query.limit + 1)
    pools = session.scalars(page).all()
    document = PricesDocument(
        round_number=None if newest is None else newest.round_number,
        committed_ms=None if newest is None else newest.committed_ms,
        items=[
            PoolPrice(
                pool_id=pool.pool_id,
                site_id=pool.site_id,
                gpu_type=pool.gpu_type,
                price_micros_per_gpu_hour=prices.get(pool.pool_id),
                ask_micros_per_gpu_hour=pool.ask_micros_per_gpu_hour,
            )
            for pool in pools[: query.limit]
        ],
        next_cursor=None,
        history=history,
    )
    return document, len(pools) > query.limit


def _round(session: Session, round_number: int) -> RoundDetail:
    row = find_round(session, round_number)
    return RoundDetail(
        **_round_fields(round_row(row)),
        snapshot_digest=row.snapshot_digest,
        clearing_digest=row.clearing_digest,
        prices=json.loads(row.prices),
        certificate=json.loads(row.certificate),
        placements=_visible_placements(session, round_number),
    )


def _visible_placements(session: Session, round_number: int) -> list[PlacementSummary]:
    """Return the round's placements: an admin's token sees all, a tenant's its own, no token none."""
    principal = the_principal()
    if principal is None:
        return []
    wanted = select(Placement).where(Placement.round_number == round_number)
    if principal.kind is TokenKind.TENANT:
        wanted = wanted.join(Job, Job.job_id == Placement.job_id).where(Job.tenant_id == principal.tenant_id)
    return [
        PlacementSummary(
            job_id=placement.job_id,
            placement_id=placement.placement_id,
            state=placement.state,
            configuration_key=placement.configuration_key,
            charge_micros_per_hour=placement.charge_micros_per_hour,
            why=placement.why,
        )
        for placement in session.scalars(wanted.order_by(Placement.placement_id))
    ]


def _round_fields(listed: RoundRow) -> dict[str, object]:
    row = listed.row
    return {
        "round_number": row.round_number,
        "taken_ms": row.taken_ms,
        "committed_ms": row.committed_ms,
        "status": row.status,
        "solver": row.solver,
        "solve_s": row.solve_s,
        "jobs_considered": row.jobs_considered,
        "placements_made": row.placements_made,
        "gap_micros_per_hour": listed.certificate.gap_micros_per_hour,
        "welfare_micros_per_hour": listed.certificate.welfare_micros_per_hour,
    }
