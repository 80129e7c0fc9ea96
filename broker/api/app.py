"""The application: every route, behind the table of who may call it and the one error shape.

`create_app(market)` is what gunicorn serves (`broker.api.wsgi`), what the portal's pages are hung
into, and what tests call. Documentation is served offline at /openapi.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Final

import flask
from flask import Blueprint, Response, g, request
from flask_openapi3.models.info import Info
from flask_openapi3.models.security_scheme import SecurityScheme
from flask_openapi3.openapi import OpenAPI

from broker.api import (
    admin_routes,
    auth,
    health,
    job_routes,
    link_routes,
    market_routes,
    problems,
    rate_limits,
    secret_routes,
    site_routes,
    token_routes,
)
from broker.api.context import EXTENSION
from broker.api.documentation import DocumentedApi
from broker.market import Market
from sites.protocol import HEARTBEAT_BYTES_MAX

REQUEST_ID_HEADER: Final = "X-Request-Id"
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9_-]{8,64}")
_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Request(problems.StrictJson, flask.Request):
    """Flask's request with strict JSON."""


def create_app(market: Market, pages: Sequence[Blueprint] = ()) -> OpenAPI:
    """Return the application for one market.

    `pages` are blueprints with sign-ins of their own (the portal): the table does not guard them.
    """
    app = DocumentedApi(
        "hansa",
        info=Info(title="Hansa", version=_version(), description="A federated market for GPU datacenters."),
        security_schemes={"token": SecurityScheme(type="http", scheme="bearer")},
        validation_error_model=problems.Problem,
        validation_error_callback=problems.answer_invalid,
        static_folder=None,
    )
    app.request_class = Request
    # Routes take what the table says; this is only the limit of everything.
    app.config["MAX_CONTENT_LENGTH"] = HEARTBEAT_BYTES_MAX
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
    app.extensions[EXTENSION] = market
    app.extensions[rate_limits.EXTENSION] = rate_limits.RateLimits(market.settings, market.clock)
    app.extensions[auth.GUARDED_EXTENSION] = frozenset(page.name for page in pages)
    app.before_request(_begin)
    auth.register(app)
    problems.register(app)
    app.after_request(_finish)
    for api in (
        job_routes.api,
        market_routes.api,
        token_routes.api,
        secret_routes.api,
        admin_routes.api,
        link_routes.api,
    ):
        app.register_api(api)
    for blueprint in (site_routes.blueprint, health.blueprint, *pages):
        app.register_blueprint(blueprint)
    return app


def _begin() -> None:
    given = request.headers.get(REQUEST_ID_HEADER, "")
    g.request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
    g.begun_s = time.perf_counter()


def _finish(response: Response) -> Response:
    response.headers[REQUEST_ID_HEADER] = g.get("request_id", "")
    for name, value in _HEADERS.items():
        response.headers.setdefault(name, value)
    route = request.url_rule.rule if request.url_rule is not None else "none"
    health.REQUESTS.labels(route=route, method=request.method, status=str(response.status_code)).inc()
    if "begun_s" in g:
        health.LATENCY.labels(route=route).observe(time.perf_counter() - g.begun_s)
    return response


def _version() -> str:
    try:
        return version("hansa")
    except PackageNotFoundError:
        return "0"
