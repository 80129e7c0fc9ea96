"""Signing in and out, the way to the first page, and the icon."""

from __future__ import annotations

from http import HTTPStatus
from typing import Final

from flask import current_app, g, redirect, request, send_from_directory, url_for
from werkzeug.wrappers import Response

from broker.api.context import the_market
from broker.identity.errors import LoginError
from broker.identity.passwords import SESSION_LIFE_S, Role, close_session, open_session, verify_login
from broker.portal.blueprint import (
    SESSION_COOKIE,
    Access,
    page,
    portal,
    remember_visitor,
    set_cookie,
    show,
    the_person,
)
from broker.portal.throttle import SignInThrottle

LOGIN_LENGTH_MAX: Final = 200
_EXTENSION: Final = "hansa.sign_in_throttle"


@page("/", Access.PERSON)
def home() -> Response:
    """Lead to the page that this person most likely wants."""
    endpoints = {Role.TENANT: "portal.jobs", Role.OPERATOR: "portal.own_site", Role.ADMIN: "portal.sites"}
    return redirect(url_for(endpoints.get(Role(the_person().role), "portal.market")))


@page("/sign-in", Access.PUBLIC)
def sign_in() -> Response:
    """Show the sign-in form."""
    if g.person is not None:
        return redirect(url_for("portal.home"))
    response = show("sign_in.html", next=_own_path(request.args.get("next", "")))
    remember_visitor(response)
    return response


@page("/sign-in", Access.PUBLIC, method="POST")
def take_sign_in() -> Response:
    """Open a session for a name and password that belong together."""
    market = the_market()
    login = request.form.get("login", "")[:LOGIN_LENGTH_MAX]
    target = _own_path(request.form.get("next", ""))
    try:
        with _throttle().attempt(market.clock, f"login/{login}", f"address/{request.remote_addr}"):
            person = verify_login(market, login, request.form.get("password", ""))
    except LoginError as error:
        return show("sign_in.html", HTTPStatus.UNAUTHORIZED, next=target, login=login, refused=str(error))
    cookie = open_session(market, person)
    response = redirect(target or url_for("portal.home"), HTTPStatus.SEE_OTHER)
    set_cookie(response, SESSION_COOKIE, cookie, max_age_s=SESSION_LIFE_S)
    return response


@page("/sign-out", Access.PUBLIC, method="POST")
def sign_out() -> Response:
    """Close the session."""
    cookie = request.cookies.get(SESSION_COOKIE, "")
    if cookie:
        close_session(the_market(), cookie)
    response = redirect(url_for("portal.sign_in"), HTTPStatus.SEE_OTHER)
    response.delete_cookie(SESSION_COOKIE, path="/")
    return response


@page("/favicon.ico", Access.PUBLIC)
def favicon() -> Response:
    """Serve the icon where browsers look for it unasked."""
    assert portal.static_folder is not None, "the portal has static files"
    return send_from_directory(portal.static_folder, "icon.svg", mimetype="image/svg+xml", max_age=86_400)


def _own_path(path: str) -> str:
    """Return `path` if it leads to a page of ours, else nothing: no sign-in sends people elsewhere."""
    plain = path.startswith("/") and not path.startswith("//") and "\\" not in path and path.isprintable()
    return path[:500] if plain else ""


def _throttle() -> SignInThrottle:
    throttle = current_app.extensions.setdefault(_EXTENSION, SignInThrottle())
    assert isinstance(throttle, SignInThrottle), "the extension's name is ours"
    return throttle
