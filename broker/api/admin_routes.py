"""The routes of admins: tenants, users, sites, freeze, audit, replay, ledger."""

from __future__ import annotations

import json
from collections.abc import Callable
from http import HTTPStatus
from typing import Annotated, Final

from flask import Response
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from sqlalchemy import select
from sqlalchemy.orm import Session

from broker import ledger
from broker.allocation.instance import RATE_MICROS_PER_HOUR_MAX
from broker.api.answers import answers
from broker.api.context import the_actor, the_market
from broker.api.documents import EventPage, event_document
from broker.api.idempotency import IdempotencyHeader, Once, once
from broker.api.market_routes import RoundPath
from broker.api.pages import PageQuery, decode_cursor, encode_cursor
from broker.api.problems import json_answer
from broker.api.token_routes import TokenPath, new_token_document, token_document
from broker.audit import audit
from broker.database.tables import Event, Transfer
from broker.enrol import remove_site
from broker.freeze import set_frozen
from broker.identity.join import LIFE_S as JOIN_LIFE_S
from broker.identity.join import invite_site
from broker.identity.passwords import PASSWORD_LENGTH_MAX, Role, change_password, create_user, disable_user
from broker.identity.tokens import LIFE_S_MAX, Scope, TokenKind, create_token, revoke_token, tokens_of
from broker.invoices import statement
from broker.market import Market
from broker.payment_rules import payment_rule, set_payment_rule
from broker.queries.accounts import list_accounts
from broker.queries.market import find_certificate, find_round
from broker.queries.money import list_tenants
from broker.queries.sites import SiteRow, list_sites
from broker.rounds.replay import replay
from broker.tenant_limits import FLOOR_GPUS_MAX, set_budget, set_floor
from broker.tenants import add_equity, create_tenant, deposit
from pricing.payments import PaymentRule
from training.spec import BUDGET_MICROS_MAX, SiteId

DEFAULT_TOKEN_LIFE_S: Final = 30 * 86_400

_tag = Tag(name="admin", description="What the market's admins do.")
api = APIBlueprint("admin", __name__, url_prefix="/v1/admin", abp_tags=[_tag], abp_security=[{"token": []}])

TenantId = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,50}$")]
Login = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9.@_+-]{1,100}$")]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NewTenant(_Body):
    """A tenant to open."""

    tenant_id: TenantId
    name: str = Field(default="", max_length=200)
    home_site: SiteId | None = Field(default=None, description="the site whose own customer it is")


class TenantPath(BaseModel):
    """A tenant."""

    tenant_id: TenantId


class Deposit(_Body):
    """Credits to give."""

    amount_micros: int = Field(ge=1, le=BUDGET_MICROS_MAX)


class Limits(_Body):
    """What a tenant may spend over all of its jobs, and the GPUs that it should have at least."""

    budget_micros_per_hour: int | None = Field(
        default=None, ge=1, le=RATE_MICROS_PER_HOUR_MAX, description="micro-credits per hour; null: no bound"
    )
    floor_gpus: int = Field(default=0, ge=0, le=FLOOR_GPUS_MAX, description="0: none")


class TokenTerms(_Body):
    """A token to make. Without scopes it gets all that a tenant's token can have."""

    scopes: list[Scope] | None = Field(default=None, min_length=1, max_length=len(Scope))
    life_s: int = Field(default=DEFAULT_TOKEN_LIFE_S, ge=1, le=LIFE_S_MAX)
    label: str = Field(default="", max_length=200)


class UserPath(BaseModel):
    """A person's account, by the name that they sign in with."""

    login: Login


class NewPassword(_Body):
    """A password in place of the former one."""

    password: str = Field(max_length=PASSWORD_LENGTH_MAX)


class NewUser(_Body):
    """A person to give an account."""

    login: Login
    password: str = Field(max_length=PASSWORD_LENGTH_MAX)
    role: Role
    tenant_id: TenantId | None = Field(default=None, description="with the role tenant: whose jobs they see")
    site_id: SiteId | None = Field(default=None, description="with the role operator: the site that they run")


class Invitation(_Body):
    """A site to invite."""

    site_id: SiteId


class SitePath(BaseModel):
    """A site."""

    site_id: SiteId


class FreezeReason(_Body):
    """Why, for the record."""

    reason: str = Field(default="", max_length=500)


class PaymentRuleBody(_Body):
    """What buyers pay: the market's prices, or their whole value."""

    payment_rule: PaymentRule


@api.post("/tenants", responses=answers(None, 201))
def post_tenant(body: NewTenant) -> Response:
    """Open a tenant with its accounts."""
    tenant = create_tenant(the_market(), body.tenant_id, body.name, home_site=body.home_site, actor=the_actor())
    return json_answer({"tenant_id": tenant.tenant_id, "name": tenant.name}, HTTPStatus.CREATED)


@api.get("/tenants", responses=answers())
def get_tenants(query: PageQuery) -> Response:
    """List tenants with their balances."""
    market = the_market()
    after = "" if query.cursor is None else str(decode_cursor(market, "tenants", query.cursor)[0])
    rows = market.database.read(lambda session: list_tenants(session, after=after, limit=query.limit))
    shown = rows[: query.limit]
    items = [
        {
            "tenant_id": row.tenant_id,
            "name": row.name,
            "balance_micros": row.balance_micros,
            "held_micros": row.held_micros,
            "open_jobs": row.open_jobs,
        }
        for row in shown
    ]
    more = encode_cursor(market, "tenants", [shown[-1].tenant_id]) if len(rows) > len(shown) else None
    return json_answer({"items": items, "next_cursor": more})


@api.post("/tenants/<string:tenant_id>/deposit", responses=answers())
def post_deposit(path: TenantPath, header: IdempotencyHeader, body: Deposit) -> Response:  # noqa: ARG001  the header is for the documentation
    """Give a tenant credits, once for each idempotency key."""
    market = the_market()
    key = once(market, "admin")
    actor = the_actor()

    def work(session: Session) -> dict[str, object]:
        transfer_id = market.ids.new("deposit")
        balance = deposit(session, market, path.tenant_id, body.amount_micros, transfer_id, actor=actor)
        return {"tenant_id": path.tenant_id, "balance_micros": balance}

    return key.run(lambda: _given(market, key, work))


@api.put("/tenants/<string:tenant_id>/limits", responses=answers())
def put_limits(path: TenantPath, body: Limits) -> Response:
    """Set a tenant's budget and floor in place of what they were."""
    market, actor = the_market(), the_actor()

    def work(session: Session) -> dict[str, object]:
        set_budget(session, market, path.tenant_id, body.budget_micros_per_hour, actor=actor)
        set_floor(session, market, path.tenant_id, body.floor_gpus, actor=actor)
        return {"tenant_id": path.tenant_id, **body.model_dump()}

    return json_answer(market.database.write("limits", work))


@api.post("/equity", responses=answers())
def post_equity(header: IdempotencyHeader, body: Deposit) -> Response:  # noqa: ARG001  the header is for the documentation
    """Give the market money of its own for uplift, once for each idempotency key."""
    market = the_market()
    key = once(market, "admin")
    actor = the_actor()

    def work(session: Session) -> dict[str, object]:
        transfer_id = market.ids.new("equity")
        return {"balance_micros": add_equity(session, market, body.amount_micros, transfer_id, actor=actor)}

    return key.run(lambda: _given(market, key, work))


def _given(market: Market, key: Once, work: Callable[[Session], dict[str, object]]) -> Response:
    """Move money and keep the answer under the key, in one transaction."""

    def effect(session: Session) -> str:
        text = json.dumps(work(session))
        key.record(session, HTTPStatus.OK, text)
        return text

    return Response(market.database.write("deposit", effect), content_type="application/json")


@api.post("/tenants/<string:tenant_id>/tokens", responses=answers(None, 201))
def post_token(path: TenantPath, body: TokenTerms) -> Response:
    """Make a token for a tenant; it is shown in this answer and never again."""
    scopes = None if body.scopes is None else frozenset(body.scopes)
    made = create_token(
        the_market(),
        TokenKind.TENANT,
        tenant_id=path.tenant_id,
        scopes=scopes,
        life_s=body.life_s,
        label=body.label,
    )
    return json_answer(new_token_document(made), HTTPStatus.CREATED)


@api.get("/tenants/<string:tenant_id>/tokens", responses=answers())
def get_tokens(path: TenantPath) -> Response:
    """List a tenant's tokens, newest first: what they are for and when last used, never their secrets."""
    rows = the_market().database.read(lambda session: tokens_of(session, path.tenant_id))
    return json_answer({"items": [token_document(row).model_dump() for row in rows]})


@api.post("/tokens/<string:token_id>/revoke", responses=answers())
def post_revoke(path: TokenPath) -> Response:
    """Revoke a token, at once and for good."""
    revoke_token(the_market(), path.token_id)
    return json_answer({"token_id": path.token_id, "revoked": True})


@api.post("/users", responses=answers(None, 201))
def post_user(body: NewUser) -> Response:
    """Give a person an account for the portal."""
    user = create_user(
        the_market(), body.login, body.password, body.role, body.tenant_id, site_id=body.site_id, actor=the_actor()
    )
    return json_answer(
        {
            "user_id": user.user_id,
            "login": user.login,
            "role": user.role,
            "tenant_id": user.tenant_id,
            "site_id": user.site_id,
        },
        HTTPStatus.CREATED,
    )


@api.get("/users", responses=answers())
def get_users(query: PageQuery) -> Response:
    """List people's accounts, closed ones too."""
    market = the_market()
    after = "" if query.cursor is None else str(decode_cursor(market, "users", query.cursor)[0])
    rows = market.database.read(lambda session: list_accounts(session, after=after, limit=query.limit))
    shown = rows[: query.limit]
    items = [
        {
            "login": row.login,
            "role": row.role,
            "tenant_id": row.tenant_id,
            "site_id": row.site_id,
            "created_ms": row.created_ms,
            "closed_ms": row.disabled_ms,
        }
        for row in shown
    ]
    more = encode_cursor(market, "users", [shown[-1].login]) if len(rows) > len(shown) else None
    return json_answer({"items": items, "next_cursor": more})


@api.post("/users/<string:login>/password", responses=answers())
def post_password(path: UserPath, body: NewPassword) -> Response:
    """Set a person's password; all of their sessions end."""
    change_password(the_market(), path.login, body.password, actor=the_actor())
    return json_answer({"login": path.login, "changed": True})


@api.post("/users/<string:login>/close", responses=answers())
def post_close(path: UserPath) -> Response:
    """Close a person's account for good."""
    disable_user(the_market(), path.login, actor=the_actor())
    return json_answer({"login": path.login, "closed": True})


@api.post("/sites/invite", responses=answers(None, 201))
def post_invitation(body: Invitation) -> Response:
    """Invite a site; the join string in this answer works once."""
    market = the_market()
    join_string = invite_site(market, body.site_id, actor=the_actor())
    expires_ms = market.clock.now_ms() + JOIN_LIFE_S * 1000
    return json_answer(
        {"site_id": body.site_id, "join_string": join_string, "expires_ms": expires_ms}, HTTPStatus.CREATED
    )


@api.get("/sites", responses=answers())
def get_sites(query: PageQuery) -> Response:
    """List sites with what they offer and how they are heard."""
    market = the_market()
    after = "" if query.cursor is None else str(decode_cursor(market, "sites", query.cursor)[0])
    rows = market.database.read(lambda session: list_sites(session, after=after, limit=query.limit))
    shown = rows[: query.limit]
    more = encode_cursor(market, "sites", [shown[-1].row.site_id]) if len(rows) > len(shown) else None
    return json_answer({"items": [_site_document(site) for site in shown], "next_cursor": more})


@api.get("/sites/<string:site_id>/statement", responses=answers())
def get_statement(path: SitePath, query: PageQuery) -> Response:
    """Show what a site has earned, job by job, and what its account holds."""
    market = the_market()
    listing = f"statement {path.site_id}"
    after = "" if query.cursor is None else str(decode_cursor(market, listing, query.cursor)[0])
    page = market.database.read(lambda session: statement(session, path.site_id, after=after, limit=query.limit))
    document = page.as_json()
    del document["next_after"]
    document["next_cursor"] = None if page.next_after is None else encode_cursor(market, listing, [page.next_after])
    return json_answer(document)


@api.post("/sites/<string:site_id>/remove", responses=answers())
def post_remove(path: SitePath) -> Response:
    """Take a site out of the market for good."""
    remove_site(the_market(), path.site_id, actor=the_actor())
    return json_answer({"site_id": path.site_id, "state": "removed"})


@api.post("/freeze", responses=answers())
def post_freeze(body: FreezeReason) -> Response:
    """Stop the market from taking anything new; what runs goes on."""
    return _set_frozen(body, frozen=True)


@api.post("/thaw", responses=answers())
def post_thaw(body: FreezeReason) -> Response:
    """Let the market take work again."""
    return _set_frozen(body, frozen=False)


def _set_frozen(body: FreezeReason, *, frozen: bool) -> Response:
    changed = set_frozen(the_market(), frozen=frozen, reason=body.reason, actor=the_actor())
    return json_answer({"frozen": frozen, "changed": changed})


@api.get("/payment-rule", responses=answers())
def get_payment_rule() -> Response:
    """Show what buyers pay from the next round on."""
    return json_answer({"payment_rule": the_market().database.read(payment_rule).value})


@api.post("/payment-rule", responses=answers())
def post_payment_rule(body: PaymentRuleBody) -> Response:
    """Set what buyers pay from the next round on; what is sold already keeps its terms."""
    changed = set_payment_rule(the_market(), body.payment_rule, actor=the_actor())
    return json_answer({"payment_rule": body.payment_rule.value, "changed": changed})


@api.get("/audit", responses=answers())
def get_audit() -> Response:
    """Recompute the market's promises from its rows; `findings` is empty where all hold."""
    findings = [finding.as_json() for finding in the_market().database.read(audit)]
    return json_answer({"sound": not findings, "findings": findings})


@api.get("/events", responses=answers(EventPage))
def get_events(query: PageQuery) -> Response:
    """List everything that happened in the market, newest first."""
    market = the_market()
    wanted = select(Event).order_by(Event.event_id.desc()).limit(query.limit + 1)
    if query.cursor is not None:
        wanted = wanted.where(Event.event_id < int(decode_cursor(market, "events", query.cursor)[0]))
    rows = market.database.read(lambda session: list(session.scalars(wanted)))
    shown = rows[: query.limit]
    more = encode_cursor(market, "events", [shown[-1].event_id]) if len(rows) > len(shown) else None
    return json_answer(EventPage(items=[event_document(event, to_admin=True) for event in shown], next_cursor=more))


@api.get("/rounds/<int:round_number>/replay", responses=answers())
def get_replay(path: RoundPath) -> Response:
    """Solve a stored round again and verify it with code of its own."""
    return json_answer(replay(the_market(), path.round_number).as_json())


@api.get("/rounds/<int:round_number>/snapshot", responses=answers())
def get_snapshot(path: RoundPath) -> Response:
    """Return a round's snapshot as it was taken, while it is retained; its bids are the tenants' own affair."""
    return _stored_document(path.round_number, "snapshot_digest")


@api.get("/rounds/<int:round_number>/clearing", responses=answers())
def get_clearing(path: RoundPath) -> Response:
    """Return a round's clearing as it was committed, while it is retained."""
    return _stored_document(path.round_number, "clearing_digest")


@api.get("/rounds/<int:round_number>/sites", responses=answers())
def get_round_sites(path: RoundPath) -> Response:
    """Show each site in a round: its rent, and what it and its customers have with the others and alone."""
    row = the_market().database.read(lambda session: find_certificate(session, path.round_number))
    return json_answer({"economics": row.economics, "items": json.loads(row.sites)})


def _stored_document(round_number: int, which: str) -> Response:
    market = the_market()
    row = market.database.read(lambda session: find_round(session, round_number))
    return Response(market.artifacts.get_bytes(getattr(row, which)), content_type="application/json")


@api.get("/ledger", responses=answers())
def get_ledger(query: PageQuery) -> Response:
    """Show a page of balances, the sum of all, which is nought, and the newest transfers."""
    market = the_market()
    after = "" if query.cursor is None else str(decode_cursor(market, "balances", query.cursor)[0])
    wanted = select(Transfer).order_by(Transfer.created_ms.desc(), Transfer.transfer_id.desc()).limit(query.limit)

    def work(session: Session) -> dict[str, object]:
        balances = ledger.balances(session, after=after, limit=query.limit)
        shown = dict(list(balances.items())[: query.limit])
        last = encode_cursor(market, "balances", [list(shown)[-1]]) if len(balances) > len(shown) else None
        transfers = [
            {
                "transfer_id": row.transfer_id,
                "kind": row.kind,
                "debit_account": row.debit_account,
                "credit_account": row.credit_account,
                "amount_micros": row.amount_micros,
                "job_id": row.job_id,
                "created_ms": row.created_ms,
            }
            for row in session.scalars(wanted)
        ]
        return {
            "balances_micros": shown,
            "sum_micros": ledger.sum_micros(session),
            "transfers": transfers,
            "next_cursor": last,
        }

    return json_answer(market.database.read(work))


def _site_document(site: SiteRow) -> dict[str, object]:
    return {
        "site_id": site.row.site_id,
        "state": site.row.state,
        "agent_version": site.row.agent_version,
        "joined_ms": site.row.joined_ms,
        "heard_ms": site.row.heard_ms,
        "leases_live": site.leases,
        "pools": [
            {
                "pool_id": f"{site.row.site_id}/{pool.gpu_type}",
                "gpu_type": pool.gpu_type,
                "gpus": len(pool.gpu_ids),
                "ask_micros_per_gpu_hour": pool.ask_micros_per_gpu_hour,
            }
            for pool in site.offer.pools
        ],
    }
