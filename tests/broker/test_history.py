"""What runs with every heartbeat, beat and round costs what stands now, and nothing for what is long over.

Counted in steps of SQLite's machine, which depend on the queries and the rows alone.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, insert, select, update
from sqlalchemy.orm import Session

from broker import speeds
from broker.database.certificates import RoundCertificate
from broker.database.tables import Lease, Placement, Round, Table
from broker.forecasts import keep_forecasts
from broker.queries.jobs import read_job
from broker.queries.market import list_pools, list_types
from broker.quote import quote_job
from broker.rounds.economics import leave_out_old
from broker.rounds.snapshot import take
from broker.settle import settle
from broker.tenants import create_tenant
from sites.protocol import ExitCause
from tests.broker.speaking import Scene, spec
from tests.simulation.founding import TENANT_ID

GRAIN = 20
LONG_MS = 200 * 86_400_000
# What belongs to a job; parents first.
OF_JOB = ("jobs", "holds", "placements", "terms", "leases", "leased_gpus", "usage_reports", "forecasts", "views")


@pytest.fixture
def scene(sqlite_schema: Path, tmp_path: Path) -> Iterator[Scene]:
    """A market on SQLite that is not audited when the test ends: what is copied in it was never paid."""
    path = tmp_path / "market.sqlite3"
    shutil.copy(sqlite_schema, path)
    scene = Scene(f"sqlite:///{path}", tmp_path / "home")
    yield scene
    scene.market.database.close()


def repeat(scene: Scene, job_id: str, numbers: range) -> None:
    """Copy a job that is over, with all that belongs to it, to long ago, and the newest round as often."""

    def work(session: Session) -> None:
        leases = select(Lease.lease_id).where(Lease.job_id == job_id)
        placements = select(Placement.placement_id).where(Placement.job_id == job_id)
        for name in OF_JOB:
            table = Table.metadata.tables[name]
            if "job_id" in table.c:
                owned = table.c.job_id == job_id
            else:
                owned = table.c.lease_id.in_(leases) if "lease_id" in table.c else table.c.placement_id.in_(placements)
            rows = session.execute(select(table).where(owned)).mappings().all()
            session.execute(insert(table), [copied(dict(row), number) for row in rows for number in numbers])
        newest = session.scalars(select(Round).order_by(Round.round_number.desc()).limit(1)).one().round_number
        for kind in (Round, RoundCertificate):
            table = Table.metadata.tables[kind.__tablename__]
            row = session.execute(select(table).where(table.c.round_number == newest)).mappings().one()
            later = range(newest + 1, newest + 1 + len(numbers))
            session.execute(insert(table), [{**row, "round_number": number} for number in later])
        session.execute(update(RoundCertificate).values(economics="left_out"))

    scene.write(work)


def copied(row: dict[str, Any], number: int) -> dict[str, Any]:
    """Return a row of long ago: of another job of another tenant."""
    for name, value in row.items():
        if name in {"job_id", "placement_id", "lease_id"}:
            row[name] = f"{value}-{number}"
        elif name.endswith("_ms") and "monotonic" not in name and value is not None:
            row[name] = value - LONG_MS - number
    return {**row, "tenant_id": "past"} if "tenant_id" in row else row


def steps(scene: Scene, work: Callable[[], object]) -> int:
    """Return how many steps SQLite's machine takes for `work`."""
    counted = 0

    def count() -> None:
        nonlocal counted
        counted += GRAIN

    def connected(connection: sqlite3.Connection, _record: object) -> None:
        connection.set_progress_handler(count, GRAIN)

    engine = scene.market.database.engine
    engine.dispose()
    event.listen(engine, "connect", connected)
    try:
        work()
    finally:
        event.remove(engine, "connect", connected)
        engine.dispose()
    return counted


def test_what_is_long_over_costs_a_beat_nothing(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    # As many leases as a round looks at for measured speeds are there before and after.
    monkeypatch.setattr(speeds, "LEASES_READ_MAX", 20)
    over = scene.submit(2, sites_allowed=["ada"])
    keep_forecasts(scene.market)
    (site,) = scene.start(over)
    scene.pass_s(40, *scene.site_ids)
    site.meter(site.order(), 2 * 30_000)
    site.exit(ExitCause.DONE)
    # Long enough to tell of a speed.
    ran = update(Lease).values(delivered_samples=1000, delivered_gpu_milliseconds=2 * 90_000)
    scene.write(lambda session: session.execute(ran))
    scene.reconcile()
    settle(scene.market)
    keep_forecasts(scene.market)
    assert scene.job(over).state == "finished"
    runs = scene.submit(2, sites_allowed=["bob"])
    scene.start(runs)
    market = scene.market
    create_tenant(market, "past")
    works: dict[str, Callable[[], object]] = {
        "heartbeat": site.beat,
        "reconcile": scene.reconcile,
        "settle": lambda: settle(market),
        "forecasts": lambda: keep_forecasts(market),
        "economics": lambda: leave_out_old(market),
        "snapshot": lambda: market.database.read(lambda session: take(session, market)),
        "job page": lambda: market.database.read(lambda session: read_job(session, runs, None)),
        "market page": lambda: market.database.read(lambda session: (list_types(session), list_pools(session, {}))),
    }
    for work in works.values():
        work()
    repeat(scene, over, range(30))
    before = {name: steps(scene, work) for name, work in works.items()}
    repeat(scene, over, range(30, 230))
    after = {name: steps(scene, work) for name, work in works.items()}
    grown = {name: (before[name], after[name]) for name in works if after[name] > 1.1 * before[name] + 10 * GRAIN}
    assert grown == {}


def test_a_quote_reads_nothing_of_other_jobs(scene: Scene) -> None:
    scene.submit(2)
    statements: list[str] = []

    def executed(*said: object) -> None:
        statements.append(str(said[2]))

    event.listen(scene.market.database.engine, "before_cursor_execute", executed)
    assert quote_job(scene.market, spec(2), TENANT_ID)
    event.remove(scene.market.database.engine, "before_cursor_execute", executed)
    # The measured speeds are of jobs too, and of no more than so many leases.
    assert [said for said in statements if "jobs.spec" in said and "delivered_samples" not in said] == []
