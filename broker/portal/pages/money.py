"""The money as an admin sees it: tenants and deposits, the ledger's sum, the audit."""

from __future__ import annotations

import secrets
from http import HTTPStatus

from flask import redirect, request, url_for
from sqlalchemy.orm import Session
from werkzeug.wrappers import Response

from broker.api.context import the_market
from broker.audit import audit
from broker.errors import BrokerError
from broker.portal.blueprint import Access, page, show, the_actor
from broker.queries.money import TENANTS_PER_PAGE, list_tenants, read_ledger
from broker.tenants import create_tenant
from broker.tenants import deposit as give
from pricing.errors import AmountError
from pricing.money import parse_credits


@page("/admin/tenants", Access.ADMIN)
def tenants() -> Response:
    """List tenants with their balances."""
    return show("tenants.html", **_listed())


@page("/admin/tenants/deposit", Access.ADMIN, method="POST")
def deposit() -> Response:
    """Give a tenant credits. The form's own key makes sure that sending it twice gives them once."""
    market = the_market()
    tenant_id = request.form.get("tenant_id", "")[:64]
    amount = request.form.get("amount", "")[:40]
    key = f"portal/{request.form.get('deposit_key', '')[:64]}"

    try:
        micros = parse_credits(amount)
        actor = the_actor()
        market.database.write("deposit", lambda session: give(session, market, tenant_id, micros, key, actor=actor))
    except (BrokerError, AmountError) as error:
        status = error.status if isinstance(error, BrokerError) else HTTPStatus.UNPROCESSABLE_ENTITY
        return show("tenants.html", status, refused=str(error), amount=amount, tenant_id=tenant_id, **_listed())
    return redirect(url_for("portal.tenants"), HTTPStatus.SEE_OTHER)


@page("/admin/tenants/new", Access.ADMIN, method="POST")
def new_tenant() -> Response:
    """Open a tenant with its accounts."""
    tenant_id = request.form.get("new_tenant_id", "").strip()[:64]
    name = request.form.get("name", "").strip()[:200]
    try:
        create_tenant(the_market(), tenant_id, name, actor=the_actor())
    except BrokerError as error:
        return show("tenants.html", error.status, refused=str(error), new_tenant_id=tenant_id, name=name, **_listed())
    return redirect(url_for("portal.tenants"), HTTPStatus.SEE_OTHER)


@page("/admin/ledger", Access.ADMIN)
def ledger_page() -> Response:
    """Show the ledger's sum and its newest transfers; with `?audit=1` also what the audit finds."""
    market = the_market()

    def work(session: Session) -> dict[str, object]:
        wanted = request.args.get("audit") == "1"
        return {"view": read_ledger(session), "findings": audit(session) if wanted else None}

    return show("ledger.html", **market.database.read(work))


def _listed() -> dict[str, object]:
    after = request.args.get("after", "")
    rows = the_market().database.read(lambda session: list_tenants(session, after=after))
    shown = rows[:TENANTS_PER_PAGE]
    return {
        "rows": shown,
        "next": shown[-1].tenant_id if len(rows) > TENANTS_PER_PAGE else None,
        "deposit_key": secrets.token_hex(16),
    }
