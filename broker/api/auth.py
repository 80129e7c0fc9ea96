"""Who may call what: one table, one row for each route. A route without a row is closed.

Work with it: a new route needs its row here, and a test says so. The rows also cap how large a
body the route takes, before any of it is read.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from flask import Flask, current_app, g, request

from broker.api.context import the_market
from broker.api.errors import TooLargeError
from broker.api.rate_limits import the_rate_limits
from broker.errors import ScopeError
from broker.identity.errors import MalformedCredentialError, MissingCredentialError, WrongKindError
from broker.identity.site_requests import verify_request
from broker.identity.tokens import Principal, Scope, TokenKind, verify_token
from sites.protocol import ARTIFACT_CHUNK_BYTES_MAX, HEARTBEAT_BYTES_MAX, STREAM_CHUNK_BYTES_MAX

BEARER: Final = "Bearer "
TOKEN_LENGTH_MAX: Final = 200
SMALL_BODY_BYTES_MAX: Final = 16 * 1024
# JSON may write each byte of a value with six.
SECRET_BODY_BYTES_MAX: Final = 64 * 1024
SPEC_BYTES_MAX: Final = 256 * 1024
OPEN_BLUEPRINTS: Final = frozenset({"openapi", "swagger"})
UNLIMITED: Final = frozenset({"/healthz", "/metrics"})  # what watches the market must not be shut out with the rest
GUARDED_EXTENSION: Final = "hansa.guarded_blueprints"


class Who(enum.StrEnum):
    """Whose credential a route asks for."""

    ANYONE = "anyone"  # none; one that is given must hold all the same
    TENANT = "tenant"
    ADMIN = "admin"
    SITE = "site"  # a signed request


@dataclass(frozen=True, slots=True)
class Access:
    """One row: who, with which scope, with how large a body."""

    who: Who
    scope: Scope | None = None
    body_bytes_max: int = 0


_READ: Final = Access(Who.TENANT, Scope.JOBS_READ)
_LEDGER: Final = Access(Who.TENANT, Scope.LEDGER_READ)
_ADMIN_READ: Final = Access(Who.ADMIN, Scope.ADMIN)
_ADMIN: Final = Access(Who.ADMIN, Scope.ADMIN, SMALL_BODY_BYTES_MAX)
_SITES: Final = Access(Who.ADMIN, Scope.SITES_ADMIN, SMALL_BODY_BYTES_MAX)

TABLE: Final[dict[tuple[str, str], Access]] = {
    ("GET", "/healthz"): Access(Who.ANYONE),
    ("GET", "/metrics"): Access(Who.ANYONE),
    # The market's public face: prices, and the certificate that anyone may check.
    ("GET", "/v1/prices"): Access(Who.ANYONE),
    ("GET", "/v1/rounds"): Access(Who.ANYONE),
    ("GET", "/v1/rounds/<int:round_number>"): Access(Who.ANYONE),
    ("GET", "/v1/rounds/<int:round_number>/certificate"): Access(Who.ANYONE),
    # Tenants.
    ("GET", "/v1/account"): _LEDGER,
    ("POST", "/v1/quote"): Access(Who.TENANT, Scope.JOBS_READ, SPEC_BYTES_MAX),
    ("GET", "/v1/workdirs/<string:digest>"): Access(Who.TENANT, Scope.JOBS_WRITE),
    ("PUT", "/v1/workdirs/<string:digest>"): Access(Who.TENANT, Scope.JOBS_WRITE, ARTIFACT_CHUNK_BYTES_MAX),
    ("POST", "/v1/jobs"): Access(Who.TENANT, Scope.JOBS_WRITE, SPEC_BYTES_MAX),
    ("GET", "/v1/jobs"): _READ,
    ("GET", "/v1/jobs/<string:job_id>"): _READ,
    ("POST", "/v1/jobs/<string:job_id>/cancel"): Access(Who.TENANT, Scope.JOBS_WRITE, SMALL_BODY_BYTES_MAX),
    ("GET", "/v1/jobs/<string:job_id>/events"): _READ,
    ("GET", "/v1/jobs/<string:job_id>/explanation"): _READ,
    ("GET", "/v1/jobs/<string:job_id>/log"): _READ,
    ("GET", "/v1/jobs/<string:job_id>/metrics"): _READ,
    ("GET", "/v1/jobs/<string:job_id>/artifacts"): _READ,
    ("GET", "/v1/jobs/<string:job_id>/artifacts/<path:name>"): _READ,
    ("GET", "/v1/jobs/<string:job_id>/invoice"): _LEDGER,
    ("GET", "/v1/tokens"): _READ,
    ("POST", "/v1/tokens"): Access(Who.TENANT, Scope.TOKENS_WRITE, SMALL_BODY_BYTES_MAX),
    ("POST", "/v1/tokens/<string:token_id>/revoke"): Access(Who.TENANT, Scope.TOKENS_WRITE, SMALL_BODY_BYTES_MAX),
    ("GET", "/v1/secrets"): _READ,
    ("PUT", "/v1/secrets/<string:name>"): Access(Who.TENANT, Scope.JOBS_WRITE, SECRET_BODY_BYTES_MAX),
    ("DELETE", "/v1/secrets/<string:name>"): Access(Who.TENANT, Scope.JOBS_WRITE),
    ("PUT", "/v1/account/budget"): Access(Who.TENANT, Scope.JOBS_WRITE, SMALL_BODY_BYTES_MAX),
    # Admins.
    ("POST", "/v1/admin/tenants"): _ADMIN,
    ("GET", "/v1/admin/tenants"): _ADMIN_READ,
    ("POST", "/v1/admin/tenants/<string:tenant_id>/deposit"): _ADMIN,
    ("PUT", "/v1/admin/tenants/<string:tenant_id>/limits"): _ADMIN,
    ("POST", "/v1/admin/equity"): _ADMIN,
    ("POST", "/v1/admin/tenants/<string:tenant_id>/tokens"): _ADMIN,
    ("GET", "/v1/admin/tenants/<string:tenant_id>/tokens"): _ADMIN_READ,
    ("POST", "/v1/admin/tokens/<string:token_id>/revoke"): _ADMIN,
    ("POST", "/v1/admin/users"): _ADMIN,
    ("GET", "/v1/admin/users"): _ADMIN_READ,
    ("POST", "/v1/admin/users/<string:login>/password"): _ADMIN,
    ("POST", "/v1/admin/users/<string:login>/close"): _ADMIN,
    ("POST", "/v1/admin/sites/invite"): _SITES,
    ("GET", "/v1/admin/sites"): Access(Who.ADMIN, Scope.SITES_ADMIN),
    ("GET", "/v1/admin/sites/<string:site_id>/statement"): Access(Who.ADMIN, Scope.LEDGER_READ),
    ("POST", "/v1/admin/sites/<string:site_id>/remove"): _SITES,
    ("GET", "/v1/admin/links"): Access(Who.ADMIN, Scope.SITES_ADMIN),
    ("POST", "/v1/admin/freeze"): _ADMIN,
    ("POST", "/v1/admin/thaw"): _ADMIN,
    ("GET", "/v1/admin/payment-rule"): _ADMIN_READ,
    ("POST", "/v1/admin/payment-rule"): _ADMIN,
    ("GET", "/v1/admin/audit"): _ADMIN_READ,
    ("GET", "/v1/admin/events"): _ADMIN_READ,
    ("GET", "/v1/admin/rounds/<int:round_number>/replay"): _ADMIN_READ,
    ("GET", "/v1/admin/rounds/<int:round_number>/snapshot"): _ADMIN_READ,
    ("GET", "/v1/admin/rounds/<int:round_number>/clearing"): _ADMIN_READ,
    ("GET", "/v1/admin/rounds/<int:round_number>/sites"): _ADMIN_READ,
    ("GET", "/v1/admin/ledger"): Access(Who.ADMIN, Scope.LEDGER_READ),
    # Sites; enrolment carries its own one-time token.
    ("POST", "/site/v1/enrol"): Access(Who.ANYONE, body_bytes_max=SMALL_BODY_BYTES_MAX),
    ("POST", "/site/v1/heartbeat"): Access(Who.SITE, body_bytes_max=HEARTBEAT_BYTES_MAX),
    ("GET", "/site/v1/statement"): Access(Who.SITE),
    ("GET", "/site/v1/artifacts/<digest>"): Access(Who.SITE),
    ("PUT", "/site/v1/artifacts/<digest>"): Access(Who.SITE, body_bytes_max=ARTIFACT_CHUNK_BYTES_MAX),
    ("POST", "/site/v1/leases/<lease_id>/<int:epoch>/streams/<name>"): Access(
        Who.SITE, body_bytes_max=STREAM_CHUNK_BYTES_MAX
    ),
    ("POST", "/site/v1/leases/<lease_id>/<int:epoch>/secrets"): Access(Who.SITE, body_bytes_max=SMALL_BODY_BYTES_MAX),
}


def register(app: Flask) -> None:
    """Check every request of `app` against the table, before its route runs."""
    app.before_request(_admit)


def _admit() -> None:
    rule = request.url_rule
    if rule is None or request.blueprint in OPEN_BLUEPRINTS:
        return  # no such route: answered as such
    if request.blueprint in current_app.extensions.get(GUARDED_EXTENSION, ()):
        return  # pages with sign-ins and forms of their own
    method = "GET" if request.method == "HEAD" else request.method
    access = TABLE.get((method, rule.rule))
    if access is None:
        raise ScopeError("this route is closed to everyone; tell the market's admin")
    _cap_body(access.body_bytes_max)
    if access.who is Who.SITE:
        # A GET behind gunicorn has an open-ended empty body, and reading that under a limit of 0 is refused as too large.
        body = request.get_data() if access.body_bytes_max else b""
        g.site_request = verify_request(the_market(), dict(request.headers), request.method, _path_with_query(), body)
        the_rate_limits().charge_site(g.site_request.site_id)
        return
    g.principal = _principal(access)
    if g.principal is not None:
        the_rate_limits().charge("token", g.principal.token_id)
    elif rule.rule not in UNLIMITED:
        the_rate_limits().charge("address", request.remote_addr or "")


def _cap_body(bytes_max: int) -> None:
    """Refuse a body that is too large: by its stated length, else after reading one byte too many."""
    # Werkzeug cuts a body without a length at its limit and says nothing; the byte beyond tells.
    request.max_content_length = bytes_max + 1
    stated = request.content_length
    if stated is None and "Transfer-Encoding" in request.headers:
        stated = len(request.get_data())
    if (stated or 0) > bytes_max:
        raise TooLargeError(f"the body is larger than the {bytes_max} bytes that this route takes")


def _principal(access: Access) -> Principal | None:
    header = request.headers.get("Authorization")
    if header is None:
        if access.who is Who.ANYONE:
            return None
        raise MissingCredentialError("this route needs a token; send Authorization: Bearer hansa_…")
    if not header.startswith(BEARER) or len(header) > TOKEN_LENGTH_MAX:
        raise MalformedCredentialError("the header Authorization must be: Bearer, a space, and a token of this market")
    principal = verify_token(the_market(), header.removeprefix(BEARER))
    if access.who is Who.ANYONE:
        return principal
    if principal.kind is not (TokenKind.TENANT if access.who is Who.TENANT else TokenKind.ADMIN):
        raise WrongKindError(f"this route needs a token of kind {access.who}; this one is of kind {principal.kind}")
    assert access.scope is not None, "a row for tokens names a scope"
    if not principal.may(access.scope):
        raise ScopeError(f"this token lacks the scope {access.scope}; ask for one that has it")
    return principal


def _path_with_query() -> str:
    query = request.query_string.decode("ascii", "replace")
    return f"{request.path}?{query}" if query else request.path
