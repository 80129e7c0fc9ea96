"""The portal's blueprint: what happens around every page, and the one way to add a page.

A page is added with `page(rule, access)`, so none exists without a rule of who may see it. Before it
runs, its visitor is read from the session cookie, the rule is checked, and a form must carry its
token; after it, the headers are set that keep other websites and injected markup out.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import secrets
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, TypeVar, cast
from urllib.parse import urlsplit

import structlog
from flask import Blueprint, Response, g, make_response, redirect, render_template, request, url_for
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response as WerkzeugResponse

from broker.api.context import the_market, the_request_id
from broker.api.errors import TooManyRequestsError
from broker.api.rate_limits import the_rate_limits
from broker.database.tables import User
from broker.errors import BrokerError, CredentialError
from broker.identity.passwords import Role, form_token, read_session
from broker.portal.errors import ForgedFormError, SignInThrottledError, WrongRoleError
from broker.portal.figures import FILTERS

SESSION_COOKIE: Final = "hansa_session"
# Of a visitor who is not signed in: ties the sign-in form to the browser that fetched it.
VISIT_COOKIE: Final = "hansa_visit"
FORM_TOKEN_FIELD: Final = "form_token"  # noqa: S105  a field's name
ACTOR_LENGTH_MAX: Final = 120  # as an event holds it
SMALL_FORM_BYTES_MAX: Final = 300_000
_log = structlog.get_logger(__name__)
_STATIC: Final = Path(__file__).parent / "static"

portal = Blueprint("portal", __name__, template_folder="templates", static_folder="static", static_url_path="/static")


class Access(enum.StrEnum):
    """Who may see a page."""

    PUBLIC = "public"
    PERSON = "person"  # anyone who is signed in
    TENANT = "tenant"
    OPERATOR = "operator"  # of a site, for that site alone
    READER = "reader"  # a tenant for its own jobs, an admin for all
    ADMIN = "admin"


_ROLES: Final[dict[Access, frozenset[str]]] = {
    Access.PERSON: frozenset(Role),
    Access.TENANT: frozenset({Role.TENANT}),
    Access.OPERATOR: frozenset({Role.OPERATOR}),
    Access.READER: frozenset({Role.TENANT, Role.ADMIN}),
    Access.ADMIN: frozenset({Role.ADMIN}),
}
ACCESS: Final[dict[str, Access]] = {"portal.static": Access.PUBLIC}
_BODY_BYTES_MAX: Final[dict[str, int]] = {}
F = TypeVar("F", bound=Callable[..., Any])


def page(
    rule: str, access: Access, *, method: str = "GET", body_bytes_max: int = SMALL_FORM_BYTES_MAX
) -> Callable[[F], F]:
    """Add a page at `rule` for those whom `access` names; a body beyond the limit is refused unread."""

    def add(view: F) -> F:
        endpoint = f"portal.{view.__name__}"
        assert endpoint not in ACCESS, f"two pages are called {view.__name__}"
        ACCESS[endpoint] = access
        _BODY_BYTES_MAX[endpoint] = body_bytes_max
        portal.add_url_rule(rule, view_func=view, methods=[method])
        return view

    return add


def the_person() -> User:
    """Return who is signed in; the page's rule has checked that somebody is."""
    person = g.person
    assert person is not None, "a page for nobody in particular has no person"
    return cast("User", person)


def the_actor() -> str:
    """Return who is signed in, as the record names people."""
    return f"person {the_person().login}"[:ACTOR_LENGTH_MAX]


def own_tenant_id() -> str | None:
    """Return the tenant whose rows this person may see; None for an admin, who may see all."""
    person = the_person()
    assert person.tenant_id is not None or person.role == Role.ADMIN, "a tenant's person belongs to a tenant"
    return person.tenant_id


def own_site_id() -> str:
    """Return the site that this person runs."""
    site_id = the_person().site_id
    assert site_id is not None, "an operator's account belongs to a site"
    return site_id


def set_cookie(response: WerkzeugResponse, name: str, value: str, max_age_s: int) -> None:
    """Set a cookie that no script reads and no other website sends along."""
    public = urlsplit(the_market().settings.public_url)
    # Behind a proxy the request looks plain; the market's public address tells.
    secure = request.is_secure or (public.scheme == "https" and public.netloc == request.host)
    response.set_cookie(name, value, max_age=max_age_s, httponly=True, samesite="Lax", secure=secure, path="/")


def remember_visitor(response: WerkzeugResponse) -> None:
    """Keep the cookie that ties the sign-in form to this browser."""
    if not request.cookies.get(VISIT_COOKIE):
        set_cookie(response, VISIT_COOKIE, g.visit, max_age_s=3600)


def is_fragment() -> bool:
    """Say whether htmx asks for a part of a page."""
    return request.headers.get("HX-Request") == "true"


@portal.before_request
def _admit() -> WerkzeugResponse | None:
    endpoint = request.endpoint or ""
    access = ACCESS[endpoint]
    g.nonce = secrets.token_urlsafe(18)
    g.person = None
    g.visit = request.cookies.get(VISIT_COOKIE) or secrets.token_hex(32)
    if endpoint == "portal.static":
        return None
    request.max_content_length = _BODY_BYTES_MAX[endpoint]
    request.max_form_memory_size = SMALL_FORM_BYTES_MAX
    cookie = request.cookies.get(SESSION_COOKIE, "")
    if cookie:
        try:
            g.person = read_session(the_market(), cookie)
        except CredentialError:
            cookie = ""
    if g.person is not None:
        the_rate_limits().charge("person", g.person.user_id)
    else:
        the_rate_limits().charge("address", request.remote_addr or "")
    g.form_token = form_token(the_market(), cookie if g.person else g.visit)
    if access is not Access.PUBLIC and g.person is None:
        return _to_sign_in()
    if access is not Access.PUBLIC and g.person.role not in _ROLES[access]:
        raise WrongRoleError(f"this page is not for people with the role {g.person.role}")
    if request.method == "POST":
        _refuse_forged_form()
    return None


def _to_sign_in() -> WerkzeugResponse:
    target = url_for("portal.sign_in", next=request.full_path.rstrip("?") if request.method == "GET" else None)
    if is_fragment():
        return Response(status=HTTPStatus.NO_CONTENT, headers={"HX-Redirect": url_for("portal.sign_in")})
    return redirect(target, HTTPStatus.SEE_OTHER)


def _refuse_forged_form() -> None:
    if request.headers.get("Sec-Fetch-Site", "same-origin") not in {"same-origin", "none"}:
        raise ForgedFormError("this form was sent from another website; open the portal and send it from there")
    if not hmac.compare_digest(request.form.get(FORM_TOKEN_FIELD, ""), g.form_token):
        raise ForgedFormError(
            "this form is out of date or not of this session; go back, reload the page, send it again"
        )


@portal.after_request
def _close(response: WerkzeugResponse) -> WerkzeugResponse:
    if request.endpoint == "portal.static":
        if request.args.get("v"):
            response.headers["Cache-Control"] = "public, max-age=31536000, immutable"
    else:
        response.headers["Cache-Control"] = "no-store"
    nonce = g.get("nonce", "")
    wake = the_market().settings.wake_url
    streams = f" {_origin(wake)}" if wake else ""
    response.headers["Content-Security-Policy"] = "; ".join(
        (
            "default-src 'none'",
            f"script-src 'nonce-{nonce}'",
            f"style-src 'nonce-{nonce}'",
            "img-src 'self'",
            f"connect-src 'self'{streams}",
            "form-action 'self'",
            "base-uri 'none'",
            "frame-ancestors 'none'",
        )
    )
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "same-origin"
    response.headers["Cross-Origin-Opener-Policy"] = "same-origin"
    response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
    return response


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def show(template: str, status: int = HTTPStatus.OK, /, **values: object) -> WerkzeugResponse:
    """Return the page that `portal/TEMPLATE` makes of `values`."""
    return make_response(render_template(f"portal/{template}", **values), status)


@portal.app_template_test("final")
def _is_final(state: str) -> bool:
    return state in {"finished", "failed", "cancelled"}


for _name, _filter in FILTERS.items():
    portal.add_app_template_filter(_filter, _name)


@portal.context_processor
def _everywhere() -> dict[str, object]:
    return {
        "person": g.get("person"),
        "nonce": g.get("nonce", ""),
        "form_token": g.get("form_token", ""),
        "market_name": the_market().settings.market_name,
        "now_ms": the_market().clock.now_ms(),
        "static": _static_url,
    }


def _static_url(name: str) -> str:
    return url_for("portal.static", filename=name, v=_DIGESTS[name])


_DIGESTS: Final[dict[str, str]] = {
    path.relative_to(_STATIC).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    for path in _STATIC.rglob("*")
    if path.is_file()
}


@portal.errorhandler(BrokerError)
def _refused(error: BrokerError) -> WerkzeugResponse:
    if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        _log.error("portal.fault", request_id=the_request_id(), path=request.path, exc_info=error)
    response = _error_page(error.status, str(error), error.code)
    if isinstance(error, SignInThrottledError | TooManyRequestsError):
        response.headers["Retry-After"] = str(error.retry_after_s)
    return response


@portal.errorhandler(HTTPException)
def _http(error: HTTPException) -> WerkzeugResponse:
    if error.response is not None or (error.code or 500) < HTTPStatus.BAD_REQUEST:
        return error.get_response(request.environ)
    return _error_page(error.code or 500, error.description or "the request cannot be answered", "request.http")


@portal.errorhandler(Exception)
def _fault(error: Exception) -> WerkzeugResponse:
    _log.error("portal.fault", request_id=the_request_id(), path=request.path, exc_info=error)
    sentence = f"the broker has a fault of its own; tell its admin the request id {the_request_id()}"
    return _error_page(HTTPStatus.INTERNAL_SERVER_ERROR, sentence, "broker.failed")


def _error_page(status: int, sentence: str, code: str) -> WerkzeugResponse:
    return show("error.html", status, title=HTTPStatus(status).phrase, sentence=sentence, code=code)
