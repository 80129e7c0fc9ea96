"""`hansa market`: a round cleared and checked from its documents, without a broker."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from broker.allocation.snapshot import JobState, PoolState, SiteState, Snapshot
from tests.broker.cli.calling import Hansa
from training.spec import GpuRequest, Workload


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    path = tmp_path / "snapshot.json"
    pool = PoolState(
        pool_id="lubeck/H100", site_id="lubeck", gpu_type="H100", capacity_gpus=8, ask_micros_per_gpu_hour=2_000_000
    )
    job = JobState(
        job_id="job_a",
        version=1,
        submitted_ms=0,
        accelerators=(GpuRequest(gpu_type="H100", count_min=4, count_max=4),),
        workload=Workload(samples=10**9, batch_per_gpu=8, parameters=10**9, flops_per_sample=1e12),
        bid_micros_per_million_samples=10**9,
        hold_left_micros=10**12,
    )
    taken = Snapshot(
        round_number=1,
        taken_at_ms=0,
        term_s=3600,
        pools=(pool,),
        sites=(SiteState(site_id="lubeck", listens=False),),
        jobs=(job,),
    )
    path.write_bytes(taken.to_json())
    return path


def test_solving_twice_gives_the_same_bytes_and_they_verify(hansa: Hansa, snapshot: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    assert "1 placed" in hansa("market", "solve", str(snapshot), "-o", str(first)).out
    hansa("market", "solve", str(snapshot), "-o", str(second))
    assert first.read_bytes() == second.read_bytes()
    outcome = hansa("market", "verify", str(snapshot), str(first))
    assert outcome.code == 0, outcome.out
    assert outcome.out.startswith("sound")


def test_clearing_with_another_price_does_not_verify(hansa: Hansa, snapshot: Path, tmp_path: Path) -> None:
    cleared = tmp_path / "clearing.json"
    hansa("market", "solve", str(snapshot), "-o", str(cleared))
    document = json.loads(cleared.read_text())
    document["placements"][0]["pools"][0]["price_micros_per_gpu_hour"] -= 1
    cleared.write_text(json.dumps(document))
    outcome = hansa("market", "verify", str(snapshot), str(cleared), "--json")
    assert outcome.code == 1
    assert json.loads(outcome.out)["findings"]


def test_file_that_is_no_snapshot_is_wrong_usage(hansa: Hansa, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("{}")
    assert hansa("market", "solve", str(path), "-o", str(tmp_path / "y")).code == 2
