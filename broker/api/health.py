"""Whether the broker is well (`/healthz`), and its figures for Prometheus (`/metrics`)."""

from __future__ import annotations

from http import HTTPStatus

import structlog
from flask import Blueprint, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from sqlalchemy import func, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from broker.api.context import the_market
from broker.api.problems import json_answer
from broker.database.tables import Job, Lease, MarketState, Round, Site

blueprint = Blueprint("health", __name__)
registry = CollectorRegistry()
REQUESTS = Counter("hansa_requests", "Requests answered", ["route", "method", "status"], registry=registry)
LATENCY = Histogram(
    "hansa_request_seconds",
    "Time to answer a request",
    ["route"],
    buckets=(0.005, 0.02, 0.1, 0.5, 2, 10),
    registry=registry,
)
JOBS = Gauge("hansa_jobs", "Jobs by state", ["state"], registry=registry)
SITES = Gauge("hansa_sites", "Sites by state", ["state"], registry=registry)
LEASES = Gauge("hansa_leases", "Leases by state", ["state"], registry=registry)
ROUND_AGE = Gauge("hansa_round_age_seconds", "Age of the last committed round", registry=registry)
BACKLOG = Gauge("hansa_changes_uncleared", "Changes that no round has seen yet", registry=registry)
_log = structlog.get_logger(__name__)


@blueprint.get("/healthz")
def get_health() -> Response:
    """Say whether the database answers, and how old the last round is."""
    market = the_market()
    try:
        newest, waiting = market.database.read(_round_and_backlog)
    except SQLAlchemyError as error:
        _log.error("health.database", error=str(error))
        return json_answer({"status": "down", "database": "unreachable"}, HTTPStatus.SERVICE_UNAVAILABLE)
    age_s = None if newest is None else max(0, market.clock.now_ms() - newest.committed_ms) / 1000
    return json_answer(
        {
            "status": "up",
            "database": "up",
            "round_number": None if newest is None else newest.round_number,
            "round_age_s": age_s,
            "changes_uncleared": waiting,
        }
    )


@blueprint.get("/metrics")
def get_figures() -> Response:
    """Send the figures in Prometheus' text format."""
    market = the_market()

    def work(session: Session) -> None:
        for gauge, table in ((JOBS, Job), (SITES, Site), (LEASES, Lease)):
            gauge.clear()
            for state, count in session.execute(select(table.state, func.count()).group_by(table.state)):
                gauge.labels(state=state).set(count)
        newest, waiting = _round_and_backlog(session)
        ROUND_AGE.set(-1 if newest is None else max(0, market.clock.now_ms() - newest.committed_ms) / 1000)
        BACKLOG.set(waiting)

    market.database.read(work)
    return Response(generate_latest(registry), content_type=CONTENT_TYPE_LATEST)


def _round_and_backlog(session: Session) -> tuple[Round | None, int]:
    session.execute(text("SELECT 1"))
    state = session.get(MarketState, 1)
    newest = session.scalar(select(Round).order_by(Round.round_number.desc()).limit(1))
    return newest, 0 if state is None else state.changes - state.changes_cleared
