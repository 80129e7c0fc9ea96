"""What nobody needs is forgotten, and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from broker import retention
from broker.artifacts import ArtifactMissingError
from broker.bootstrap import open_market
from broker.database.engine import Database
from broker.database.idempotency import IdempotencyKey
from broker.database.tables import (
    Artifact,
    Job,
    JobArtifact,
    Lease,
    MarketState,
    Placement,
    Pool,
    Round,
    Site,
)
from broker.market import Market
from broker.retention import DAY_MS, IDEMPOTENCY_LIFE_MS, JOB_FILES_LIFE_MS, SWEPT_AT_ONCE_MAX, sweep
from broker.settings import Settings
from broker.streams import streams_of
from broker.tenants import create_tenant
from broker.uploads import UNUSED_LIFE_MS, take_chunk, workdir_upload
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
    assert take_chunk(market, workdir_upload(market, "acme", digest, size_bytes=len(content)), content).complete
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

    market.database.write("rounds", _rounds([(old, shared), (new, shared), (new, new)]))
    assert sweep(market).documents == 1
    assert (market.artifacts.get_bytes(shared), market.artifacts.get_bytes(new)) == (b"shared", b"new")


def test_documents_of_rounds_long_past_are_swept_though_no_sweep_came_for_long(market: Market) -> None:
    rounds = 2 * SWEPT_AT_ONCE_MAX + 10
    first, late = market.artifacts.put_bytes(b"first"), market.artifacts.put_bytes(b"late")
    none = "0" * 64
    market.database.write("rounds", _rounds([(first, none), *[(none, none)] * (rounds - 4), (late, none)]))
    sweep(market)
    assert _is_held(market, late)
    assert not _is_held(market, first)
    # It goes on from there: what is swept is not looked for again.
    assert market.database.read(lambda session: session.get_one(MarketState, 1).documents_swept_to) == rounds - 4
    market.database.write("rounds", _rounds([(none, none), (none, none)], after=rounds - 2))
    sweep(market)
    assert not _is_held(market, late)


def test_streams_of_jobs_long_past_are_swept_though_no_sweep_came_for_long(
    market: Market, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "SWEPT_AT_ONCE_MAX", 2)
    market.database.write("jobs", _ended_jobs(5, clock.now_ms()))
    streams = streams_of(market)
    for number in range(5):
        streams.append(f"lease_{number}", "log", 0, b"line")
    clock.advance_s(JOB_FILES_LIFE_MS / 1000 - 1)
    assert sweep(market).streams == 0
    clock.advance_s(2)
    assert sweep(market).streams == 5
    assert streams.read("lease_0", "log", 0) == b""
    assert sweep(market).streams == 0


def test_a_file_that_is_brought_again_while_the_sweep_forgets_it_stays(market: Market, clock: ManualClock) -> None:
    content = b"brought again"
    digest = _keep(market, content)
    clock.advance_s(UNUSED_LIFE_MS / 1000)
    brought: list[str] = []

    def bring_again(point: str) -> None:
        if point == "after:retire artifacts" and not brought:
            brought.append(_keep(market, content))

    raced = replace(market, database=Database(market.database.url, at_commit=bring_again))
    assert sweep(raced).artifacts == 1
    raced.database.close()
    assert brought == [digest]
    assert _held(market, digest) == (True, True)


def test_no_row_promises_a_file_that_a_sweep_removed_under_its_last_byte(market: Market) -> None:
    content = b"gone again"
    digest = hashlib.sha256(content).hexdigest()
    upload = workdir_upload(market, "acme", digest, size_bytes=len(content))
    progress = take_chunk(market, upload, content, lambda market, digest: market.artifacts.discard(digest))
    assert (progress.held_bytes, progress.complete) == (0, False)
    assert _held(market, digest) == (False, False)
    assert take_chunk(market, upload, content).complete


def _ended_jobs(jobs: int, ended_ms: int) -> Callable[[Session], None]:
    """Return what writes jobs that ended one after another, each with one lease."""

    def work(session: Session) -> None:
        _rounds([("0" * 64, "0" * 64)])(session)
        session.add(Site(site_id="ada", state="live", offer="{}", joined_ms=0))
        session.flush()
        session.add(Pool(pool_id="ada/H100", site_id="ada", gpu_type="H100", ask_micros_per_gpu_hour=1))
        session.flush()
        for number in range(jobs):
            job_id, placement_id = f"job_{number}", f"placement_{number}"
            session.add(
                Job(
                    job_id=job_id,
                    tenant_id="acme",
                    name="j",
                    state="finished",
                    spec="{}",
                    submitted_ms=0,
                    ended_ms=ended_ms + number,
                )
            )
            session.flush()
            session.add(
                Placement(
                    placement_id=placement_id,
                    job_id=job_id,
                    epoch=1,
                    round_number=1,
                    state="ended",
                    configuration="{}",
                    configuration_key="",
                    award="{}",
                    why="",
                    samples_per_s_predicted=1,
                    value_micros_per_hour=1,
                    charge_micros_per_hour=1,
                    uplift_micros_per_hour=0,
                    term_s=1,
                    reserved_micros=1,
                    proposed_ms=0,
                    proposal_ends_ms=0,
                )
            )
            session.flush()
            session.add(
                Lease(
                    lease_id=f"lease_{number}",
                    placement_id=placement_id,
                    job_id=job_id,
                    epoch=1,
                    site_id="ada",
                    pool_id="ada/H100",
                    gpu_type="H100",
                    gpus=1,
                    price_micros_per_gpu_hour=1,
                    state="ended",
                )
            )

    return work


def _rounds(documents: list[tuple[str, str]], *, after: int = 0) -> Callable[[Session], None]:
    """Return what writes rounds of these snapshots and clearings."""

    def work(session: Session) -> None:
        session.add_all(
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
            for number, (snapshot, clearing) in enumerate(documents, after + 1)
        )

    return work


def _is_held(market: Market, digest: str) -> bool:
    try:
        market.artifacts.get_bytes(digest)
    except ArtifactMissingError:
        return False
    return True


def test_idempotency_keys_are_kept_for_a_week(market: Market, clock: ManualClock) -> None:
    row = IdempotencyKey(owner="o", key="k", request_digest="d", status=200, body="", created_ms=clock.now_ms())
    market.database.write("key", lambda session: session.merge(row))
    clock.advance_s((IDEMPOTENCY_LIFE_MS - 1) / 1000)
    assert sweep(market).rows == 0
    clock.advance_s(DAY_MS / 1000)
    assert sweep(market).rows == 1
