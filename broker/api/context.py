"""What a request carries while it is served: the market, its id, and who sent it."""

from __future__ import annotations

from typing import cast

from flask import current_app, g

from broker.identity.site_requests import SiteRequest
from broker.identity.tokens import Principal
from broker.market import Market

EXTENSION = "hansa.market"


def the_market() -> Market:
    """Return the market that this app serves."""
    return cast("Market", current_app.extensions[EXTENSION])


def the_principal() -> Principal | None:
    """Return the bearer of the request's token, None where the route needs none and none was given."""
    return cast("Principal | None", g.get("principal"))


def the_actor() -> str | None:
    """Return by whom the request is made, for the record: the token's id, never its secret."""
    principal = the_principal()
    return None if principal is None else f"token {principal.token_id}"


def the_tenant_id() -> str:
    """Return the tenant on whose behalf the request is made; the access table has checked that there is one."""
    principal = the_principal()
    assert principal is not None, "the access table lets nobody but tenants in here"
    assert principal.tenant_id is not None, "the access table lets nobody but tenants in here"
    return principal.tenant_id


def the_site_request() -> SiteRequest:
    """Return the verified site request; its sequence number is not spent yet."""
    return cast("SiteRequest", g.site_request)


def the_request_id() -> str:
    """Return the id of this request, as answered in X-Request-Id."""
    return cast("str", g.get("request_id", ""))
