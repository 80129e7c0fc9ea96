"""What nobody needs is forgotten, and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from broker.bootstrap import open_market
from broker.database.tables import Artifact, IdempotencyKey, Job, JobArtifact, Round
from broker.market import Market
from broker.retention import DAY_MS, IDEMPOTENCY_LIFE_MS, JOB_FILES_LIFE_MS, sweep
from broker.settings import Settings
from broker.tenants import create_tenant
from broker.uploads import UNUSED_LIFE_MS, Upload, take_chunk
from training.clock import ManualClock


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def market(tmp_path: Path, clock: ManualClock) -> Iterator[Market]:
    market = open_market(Settings(home=tmp_path, snapshot_retention_rounds=2), clock=clock)
    create_tenant(market, "acme")
    yield market
    market.database.close()


def _keep(market: Market, content: bytes) -> str:
    digest = hashlib.sha256(content).hexdigest()
    assert take_chunk(market, Upload(digest, "tenant-acme", 0, len(content), 100), content).complete
    return digest


def _held(market: Market, digest: str) -> tuple[bool, bool]:
    row = market.database.read(lambda session: session.get(Artifact, digest))
    return row is not None, market.artifacts.progress(digest, "x").complete


def test_files_of_jobs_outlive_the_job_by_thirty_days(market: Market, clock: ManualClock) -> None:
    unused, used = _keep(market, b"unused"), _keep(market, b"used")

    def submit(session: Session) -> None:
        session.add(Job(job_id="job_a", tenant_id="acme", name="a", state="running", spec="{}", submitted_ms=0))
        session.flush()
        session.add(
            JobArtifact(
                job_id="job_a",
                kind="workdir",
                name="w",
                digest=used,
                epoch=0,
                round_number=0,
                samples_done=0,
                created_ms=0,
            )
        )

    market.database.write("job", submit)
    assert sweep(market).artifacts == 0
    clock.advance_s(UNUSED_LIFE_MS / 1000)
    assert sweep(market).artifacts == 1
    assert (_held(market, unused), _held(market, used)) == ((False, False), (True, True))

    def end(session: Session) -> None:
        session.get_one(Job, "job_a").ended_ms = clock.now_ms()

    market.database.write("end", end)
    clock.advance_s(JOB_FILES_LIFE_MS / 1000 - 1)
    assert sweep(market).artifacts == 0
    clock.advance_s(1)
    assert sweep(market).artifacts == 1
    assert _held(market, used) == (False, False)


def test_documents_of_old_rounds_go_unless_a_kept_round_shares_them(market: Market) -> None:
    shared, old, new = (market.artifacts.put_bytes(name) for name in (b"shared", b"old", b"new"))

    def work(session: Session) -> None:
        for number, snapshot, clearing in ((1, old, shared), (2, new, shared), (3, new, new)):
            session.add(
                Round(
                    round_number=number,
                    taken_ms=0,
                    committed_ms=0,
                    snapshot_digest=snapshot,
                    clearing_digest=clearing,
                    status="optimal",
                    solver="s",
                    solve_s=0,
                    prices="{}",
                    certificate="{}",
                    dropped="[]",
                    jobs_considered=0,
                    placements_made=0,
                )
            )

    market.database.write("rounds", work)
    assert sweep(market).documents == 1
    assert (market.artifacts.get_bytes(shared), market.artifacts.get_bytes(new)) == (b"shared", b"new")


def test_idempotency_keys_are_kept_for_a_week(market: Market, clock: ManualClock) -> None:
    row = IdempotencyKey(owner="o", key="k", request_digest="d", status=200, body="", created_ms=clock.now_ms())
    market.database.write("key", lambda session: session.merge(row))
    clock.advance_s((IDEMPOTENCY_LIFE_MS - 1) / 1000)
    assert sweep(market).rows == 0
    clock.advance_s(DAY_MS / 1000)
    assert sweep(market).rows == 1
