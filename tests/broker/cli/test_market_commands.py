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


def test_the_three_forms_of_a_market_are_one_market(hansa: Hansa, tmp_path: Path) -> None:
    digests, clearings = set(), []
    for suffix in ("json", "json.gz", "npz"):
        path, cleared = tmp_path / f"market.{suffix}", tmp_path / f"{suffix}.clearing.json"
        drawn = hansa("market", "generate", "-o", str(path), "--jobs", "8", "--sites", "2", "--seed", "4", "--json")
        digests.add(json.loads(drawn.out)["digest"])
        digests.add(json.loads(hansa("market", "show", str(path), "--json").out)["digest"])
        hansa("market", "solve", str(path), "-o", str(cleared))
        clearings.append(cleared.read_bytes())
    assert len(digests) == 1
    assert clearings[0] == clearings[1] == clearings[2]


def test_a_clearing_in_gzip_verifies_and_explains_each_job(hansa: Hansa, snapshot: Path, tmp_path: Path) -> None:
    cleared = tmp_path / "clearing.json.gz"
    solved = json.loads(hansa("market", "solve", str(snapshot), "-o", str(cleared), "--json").out)
    assert solved["placed"] == 1
    assert {"read", "solve: compile", "solve: lp", "solve: rounding", "solve", "write"} <= set(solved["phases_s"])
    assert hansa("market", "verify", str(snapshot), str(cleared)).code == 0
    told = hansa("market", "explain", "job_a", str(cleared))
    assert "job_a is placed (start)" in told.out
    assert "lubeck/H100" in told.out
    assert json.loads(hansa("market", "explain", "job_a", str(cleared), "--json").out)["placed"] is True
    missing = hansa("market", "explain", "job_b", str(cleared))
    assert missing.code == 4
    assert "job_a" in missing.err


def test_schema_states_units_for_every_number_of_a_snapshot(hansa: Hansa) -> None:
    schema = json.loads(hansa("market", "schema").out)
    units = ("_s", "_ms", "_gpus", "gpus", "_max", "_min", "_done", "version", "epoch", "seed", "number")
    for name, definition in {**schema["$defs"], "Snapshot": schema}.items():
        for field, content in definition.get("properties", {}).items():
            kinds = {content.get("type"), *(option.get("type") for option in content.get("anyOf", ()))}
            if kinds & {"number", "integer"} and name in OWN_ROWS:
                assert content.get("description") or field.endswith(units), f"{name}.{field}"
    tables = json.loads(hansa("market", "schema", "tables").out)
    assert tables["groups"]["pools"]["columns"]["site"]["refers_to"] == "sites"


OWN_ROWS = {
    "AskStep", "BidStep", "DataEgress", "DataState", "Incumbent", "JobSpeed", "JobState", "LinkState", "PoolState",
    "Reservation", "SiteState", "Snapshot", "TenantState",
}  # fmt: skip


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "snapshot"),
        (b"{", "snapshot"),
        (b"[]", "snapshot"),
        (b'{"version":1}', "version 1"),
        (b"\x1f\x8b\x08\x00damaged", "gzip"),
        (b"PK\x03\x04 no archive", ".npz"),
        (b'{"round_number":1,"taken_at_ms":0,"term_s":0}', "term_s"),
        (b'{"round_number":1,"taken_at_ms":0,"term_s":60,"fee":1}', "fee"),
        (b"\xff\xfe\x00", "snapshot"),
    ],
)
def test_unreadable_markets_are_wrong_usage_and_no_traceback(
    hansa: Hansa, tmp_path: Path, content: bytes, words: str
) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    for command in (("solve", str(path), "-o", str(tmp_path / "y.json")), ("show", str(path))):
        outcome = hansa("market", *command)
        assert outcome.code == 2, outcome
        assert words in outcome.err
        assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    "options",
    [
        ("--family", "C"),
        ("--jobs", "0"),
        ("--sites", "-1"),
        ("--feature", "magic"),
        ("--seed", "-1"),
    ],
)
def test_markets_that_cannot_be_drawn_are_wrong_usage(hansa: Hansa, tmp_path: Path, options: tuple[str, str]) -> None:
    outcome = hansa("market", "generate", "-o", str(tmp_path / "m.npz"), *options)
    assert outcome.code == 2
    assert "choose" in outcome.err


def test_an_output_that_names_no_form_is_refused_before_work(hansa: Hansa, tmp_path: Path) -> None:
    assert hansa("market", "generate", "-o", str(tmp_path / "m.csv")).code == 2
    assert hansa("market", "generate", "-o", str(tmp_path / "no" / "m.npz")).code == 2
