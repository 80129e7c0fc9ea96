"""Whether the broker is well (`/healthz`), and its figures for Prometheus (`/metrics`)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from http import HTTPStatus
from typing import Final

import structlog
from flask import Blueprint, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from sqlalchemy import func, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from broker.allocation.clearing import Certificate
from broker.api.context import the_market
from broker.api.problems import json_answer
from broker.database.tables import Account, Job, Lease, MarketState, Round, Site
from broker.market import Market
from pricing.money import MICROS_PER_CREDIT

# prometheus_client's own name for the folder that worker processes share.
MULTIPROCESS_FOLDER: Final = "PROMETHEUS_MULTIPROC_DIR"

blueprint = Blueprint("health", __name__)
# With several worker processes prometheus_client keeps these in files that all of them read (`PROMETHEUS_MULTIPROC_DIR`,
# which `hansa broker serve` sets): the figures are then of the whole API, whichever worker is asked.
_OWN: Final = CollectorRegistry()
REQUESTS: Final = Counter("hansa_requests", "Requests answered", ["route", "method", "status"], registry=_OWN)
LATENCY: Final = Histogram(
    "hansa_request_seconds",
    "Time to answer a request",
    ["route"],
    buckets=(0.005, 0.02, 0.1, 0.5, 2, 10),
    registry=_OWN,
)
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
    state = _MarketFigures(market.database.read(lambda session: _market_figures(session, market)))
    registry = CollectorRegistry()
    registry.register(state)
    requests = _OWN
    if MULTIPROCESS_FOLDER in os.environ:
        requests = CollectorRegistry()
        MultiProcessCollector(requests)  # type: ignore[no-untyped-call]  # prometheus_client leaves it out
    text = generate_latest(requests) + generate_latest(registry)
    return Response(text, content_type=CONTENT_TYPE_LATEST)


class _MarketFigures(Collector):
    """What the database says at this scrape: the same from every worker, so kept by none."""

    def __init__(self, families: list[GaugeMetricFamily]) -> None:
        self._families = families

    def collect(self) -> Iterable[GaugeMetricFamily]:
        return self._families


def _market_figures(session: Session, market: Market) -> list[GaugeMetricFamily]:
    families = []
    tables: tuple[tuple[str, type[Job | Site | Lease]], ...] = (("jobs", Job), ("sites", Site), ("leases", Lease))
    for name, table in tables:
        family = GaugeMetricFamily(f"hansa_{name}", f"{name.capitalize()} by state", labels=["state"])
        for state, count in session.execute(select(table.state, func.count()).group_by(table.state)):
            family.add_metric([state], count)
        families.append(family)
    newest, waiting = _round_and_backlog(session)
    age_s = -1 if newest is None else max(0, market.clock.now_ms() - newest.committed_ms) / 1000
    families.append(GaugeMetricFamily("hansa_round_age_seconds", "Age of the last committed round", value=age_s))
    families.append(GaugeMetricFamily("hansa_changes_uncleared", "Changes that no round has seen yet", value=waiting))
    kept = session.get(MarketState, 1)
    frozen = kept is not None and kept.frozen_ms is not None
    families.append(GaugeMetricFamily("hansa_frozen", "1 while an admin holds all rounds", value=int(frozen)))
    return families + _round_figures(newest) + _money_figures(session)


def _round_figures(newest: Round | None) -> list[GaugeMetricFamily]:
    if newest is None:
        return []
    proved = Certificate.model_validate_json(newest.certificate)
    rows = (
        ("number", "Number of the last round", newest.round_number),
        ("solve_seconds", "Time to clear the last round", newest.solve_s),
        ("placements", "Placements of the last round", newest.placements_made),
        ("welfare_credits_per_hour", "Worth of the last round", proved.welfare_micros_per_hour / MICROS_PER_CREDIT),
        ("gap_credits_per_hour", "Bound less worth of the last round", proved.gap_micros_per_hour / MICROS_PER_CREDIT),
        ("uplift_credits_per_hour", "Uplift of the last round", proved.uplift_micros_per_hour / MICROS_PER_CREDIT),
    )
    return [GaugeMetricFamily(f"hansa_round_{name}", text, value=value) for name, text, value in rows]


def _money_figures(session: Session) -> list[GaugeMetricFamily]:
    family = GaugeMetricFamily("hansa_ledger_credits", "Balances by kind of account; together nought", labels=["kind"])
    for kind, micros in session.execute(select(Account.kind, func.sum(Account.balance_micros)).group_by(Account.kind)):
        family.add_metric([kind], int(micros) / MICROS_PER_CREDIT)
    return [family]


def _round_and_backlog(session: Session) -> tuple[Round | None, int]:
    session.execute(text("SELECT 1"))
    state = session.get(MarketState, 1)
    newest = session.scalar(select(Round).order_by(Round.round_number.desc()).limit(1))
    return newest, 0 if state is None else state.changes - state.changes_cleared
