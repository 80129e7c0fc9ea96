"""The columnar form: the same content as the snapshot, one digest, and files that cannot do harm."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from broker.allocation import table_file
from broker.allocation.errors import DocumentError
from broker.allocation.generate import GenerateError, generate
from broker.allocation.generate_features import FEATURES
from broker.allocation.snapshot import JobState, Snapshot
from broker.allocation.table_checks import checked
from broker.allocation.table_rows import from_snapshot, to_snapshot
from broker.allocation.tables import SCHEMA, Tables, column_names
from tests.broker.allocation.drawn import snapshots
from tests.broker.allocation.instances import random_market


def canonical(snapshot: Snapshot) -> Snapshot:
    return snapshot.model_copy(
        update={
            "sites": tuple(sorted(snapshot.sites, key=lambda row: row.site_id)),
            "pools": tuple(sorted(snapshot.pools, key=lambda row: (row.site_id, row.gpu_type))),
            "links": tuple(sorted(snapshot.links, key=lambda row: (row.from_site, row.to_site))),
            "tenants": tuple(sorted(snapshot.tenants, key=lambda row: row.tenant_id)),
            "jobs": tuple(sorted(snapshot.jobs, key=lambda row: (row.submitted_ms, row.job_id))),
        }
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(snapshots())
def test_columns_hold_everything_that_a_snapshot_says(snapshot: Snapshot) -> None:
    tables = from_snapshot(snapshot)
    again = to_snapshot(tables)
    assert again == canonical(snapshot)
    stored = table_file.from_bytes(table_file.to_bytes(tables))
    assert stored.digest() == tables.digest() == from_snapshot(Snapshot.from_json(again.to_json())).digest()


@pytest.mark.parametrize("change", ["bid_micros_per_million_samples", "version", "samples_done"])
def test_any_change_changes_the_digest(change: str) -> None:
    snapshot = random_market(1, jobs=5, sites=2)
    job = snapshot.jobs[3]
    other = job.model_copy(update={change: getattr(job, change) + 1})
    changed = snapshot.model_copy(update={"jobs": (*snapshot.jobs[:3], other, snapshot.jobs[4])})
    assert from_snapshot(snapshot).digest() != from_snapshot(changed).digest()


def test_numpy_reads_the_same_file() -> None:
    tables = generate("A", 20, 3, seed=1, features=FEATURES)
    with np.load(io.BytesIO(table_file.to_bytes(tables)), allow_pickle=False) as arrays:
        assert sorted(arrays) == sorted(column_names())
        assert all(
            np.array_equal(arrays[name], tables[name], equal_nan=tables[name].dtype.kind == "f") for name in arrays
        )


def _changed(name: str, change: Callable[[np.ndarray], object]) -> dict[str, Any]:
    tables = generate("A", 20, 3, seed=1, features=FEATURES)
    arrays = {column: tables[column].copy() for column in column_names()}
    outcome = change(arrays[name])
    if isinstance(outcome, np.ndarray):
        arrays[name] = outcome
    return arrays


def _set(row: int, value: object) -> Callable[[np.ndarray], None]:
    def change(array: np.ndarray) -> None:
        array[row] = value

    return change


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("pools.ask_micros_per_gpu_hour", _set(0, 2**45 + 1)),
        ("pools.capacity_gpus", _set(0, -1)),
        ("pools.site", _set(0, 3)),
        ("pools.site", _set(0, 2)),
        ("pools.flops_per_s", _set(0, np.inf)),
        ("links.bandwidth_bits_per_s", _set(0, np.nan)),
        ("links.loss", _set(0, 1.0)),
        ("links.delay_s", _set(0, -0.1)),
        ("jobs.flops_per_sample", _set(0, 0.0)),
        ("jobs.job_id", _set(0, b"job00001")),
        ("jobs.job_id", _set(0, b"a b")),
        ("jobs.job_id", lambda array: array.astype("S101")),
        ("jobs.version", lambda array: array.astype(np.float64)),
        ("jobs.version", lambda array: array[:-1]),
        ("jobs.version", lambda array: array[:, None]),
        ("jobs.submitted_ms", lambda array: array[::-1].copy()),
        ("jobs.data_home", _set(0, 99)),
        ("accelerators.gpu_type", _set(0, 5)),
        ("accelerators.count_min", _set(0, 4096)),
        ("ask_steps.ask_micros_per_gpu_hour", _set(1, 0)),
        ("bid_steps.bid_micros_per_million_samples", _set(0, 2**62)),
        ("reserved.to_ms", _set(0, 0)),
        ("market.version", _set(0, 1)),
        ("market.slots", _set(0, 9)),
        ("market.waiting_discount", _set(0, 1.0)),
        ("names.text", _set(0, b"zz")),
        ("incumbents.samples_per_s", _set(0, 0.0)),
    ],
)
def test_wrong_columns_are_refused_by_name(name: str, change: Callable[[np.ndarray], object]) -> None:
    with pytest.raises(DocumentError) as refused:
        checked(_changed(name, change))
    words = str(refused.value)
    group, _, column = name.partition(".")
    assert group in words or column.split("_")[0] in words or "version 1" in words
    assert ";" in words  # what to do about it


def _archive(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def _members() -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(table_file.to_bytes(generate("A", 20, 3, seed=1)))) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def _header(descr: str, shape: str) -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def test_damaged_files_are_refused() -> None:
    whole = table_file.to_bytes(generate("A", 20, 3, seed=1))
    draw = np.random.Generator(np.random.PCG64(7))
    for cut in draw.integers(0, len(whole), 40):
        with pytest.raises(DocumentError):
            table_file.from_bytes(whole[:cut])
    clean = table_file.from_bytes(whole).digest()
    for place in draw.integers(0, len(whole), 200):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(draw.integers(8))
        try:  # a flip in a timestamp or a comment changes nothing; anything else must be seen
            assert table_file.from_bytes(bytes(flipped)).digest() == clean
        except DocumentError:
            continue


@pytest.mark.parametrize(
    "member",
    [
        _header("'|O'", "(20,)") + b"cos\nsystem\n(S'true'\ntR.",
        _header("'<i8'", "(1099511627776,)"),
        _header("'<i8'", "(20, 1)") + bytes(160),
        _header("'<i8'", "(-20,)") + bytes(160),
        _header("'<i8'", "(21,)") + bytes(160),
        _header("'<i8'", "(19,)") + bytes(160),
        _header("[('a', '<i8')]", "(20,)") + bytes(160),
        _header("__import__('os')", "(20,)") + bytes(160),
        b"\x93NUMPY\x01\x00\xff\xff" + b" " * 65535,
        b"",
    ],
)
def test_hostile_members_are_refused_before_anything_is_allocated(member: bytes) -> None:
    with pytest.raises(DocumentError):
        table_file.from_bytes(_archive(_members() | {"jobs.version.npy": member}))


def test_unknown_members_and_bombs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DocumentError, match=r"etc/passwd"):
        table_file.from_bytes(_archive(_members() | {"../etc/passwd.npy": b"x"}))
    monkeypatch.setattr(table_file, "CONTENT_BYTES_MAX", 50_000)
    with pytest.raises(DocumentError, match="unpacks to more"):
        table_file.from_bytes(_archive(_members() | {"jobs.version.npy": bytes(50_000)}))


def test_another_version_names_both_and_the_remedy() -> None:
    members = _members() | {"market.version.npy": _header("'<i8'", "(1,)") + (3).to_bytes(8, "little")}
    with pytest.raises(DocumentError, match=r"version 3.*version 2.*new snapshot"):
        table_file.from_bytes(_archive(members | {"market.new.npy": b"x"}))
    with pytest.raises(DocumentError, match=r"version 1.*version 2.*new snapshot"):
        Snapshot.from_json(random_market(1, 2, 2).to_json().replace(b'"version":2,"waiting', b'"version":1,"waiting'))


@pytest.mark.parametrize(
    ("row", "field", "value"),
    [
        ("pools", "ask_micros_per_gpu_hour", 2**45 + 1),
        ("pools", "flops_per_s", 1e19),
        ("pools", "site_id", "nowhere"),
        ("jobs", "job_id", "job\n1"),
        ("jobs", "hold_left_micros", 10**15 + 1),
        ("jobs", "data", {"home_site": "nowhere", "bytes_per_sample": 1.0}),
        ("jobs", "bid_steps", [{"above_samples_per_s": 1.0, "bid_micros_per_million_samples": 2**60}]),
        ("jobs", "speeds", [{"gpu_type": "A101", "flops_per_s": 1e12}]),
        ("links", "bandwidth_bits_per_s", 0.5),
        ("links", "to_site", "nowhere"),
    ],
)
def test_absurd_rows_are_refused_with_the_field_named(row: str, field: str, value: object) -> None:
    document = random_market(1, 3, 3).model_dump(mode="json")
    document[row][0][field] = value
    if field == "site_id":
        document[row][0]["pool_id"] = f"nowhere/{document[row][0]['gpu_type']}"
    with pytest.raises(ValueError, match=rf"{row}.*{field}|{row}|{field}"):
        Snapshot.model_validate(document)


def test_the_same_seed_draws_the_same_market_and_another_does_not() -> None:
    one = generate("B", 300, 10, seed=5, features=FEATURES)
    assert one.digest() == generate("B", 300, 10, seed=5, features=FEATURES).digest()
    assert one.digest() != generate("B", 300, 10, seed=6, features=FEATURES).digest()
    assert from_snapshot(to_snapshot(one)).digest() == one.digest()


def test_a_feature_leaves_the_rest_of_a_market_as_it_was() -> None:
    plain, curved = generate("A", 200, 10, seed=5), generate("A", 200, 10, seed=5, features=["ask_curves"])
    different = [
        name
        for name in column_names()
        if not np.array_equal(plain[name], curved[name], equal_nan=plain[name].dtype.kind == "f")
    ]
    assert {name.partition(".")[0] for name in different} == {"ask_steps"}


def test_family_b_is_a_with_quotas_and_thin_links() -> None:
    loose, tight = generate("A", 200, 10, seed=5), generate("B", 200, 10, seed=5)
    assert (tight["pools.job_gpus_max"] <= np.maximum(1, loose["pools.capacity_gpus"] / 4)).all()
    assert np.allclose(tight["links.bandwidth_bits_per_s"], 0.3 * loose["links.bandwidth_bits_per_s"])
    demand = tight["accelerators.count_max"][np.unique(tight["accelerators.job"], return_index=True)[1]].sum() / 2
    assert demand / tight["pools.capacity_gpus"].sum() == pytest.approx(1.3, rel=0.02)


@pytest.mark.parametrize("wrong", [{"jobs": 0}, {"sites": 0}, {"seed": -1}, {"family": "C"}, {"features": ["x"]}])
def test_markets_that_cannot_be_drawn_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(GenerateError, match="choose"):
        generate(**{"family": "A", "jobs": 5, "sites": 2, "seed": 1} | wrong)


def test_tables_cannot_be_changed() -> None:
    tables = generate("A", 5, 2, seed=1)
    assert isinstance(tables, Tables)
    with pytest.raises(ValueError, match="read-only"):
        tables["jobs.version"][0] = 5
    assert set(SCHEMA["jobs"]) >= set(JobState.model_fields) - {
        "accelerators",
        "sites_allowed",
        "workload",
        "sync",
        "barred",
        "incumbent",
        "data",
        "bid_steps",
        "speeds",
    }
