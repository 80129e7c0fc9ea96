"""Figures, curves, logs and form fields, without a browser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.database.tables import Lease
from broker.portal import figures
from broker.portal.curves import PIECE_BYTES, PIECES, POINTS_MAX, Measurement, curves_of, read_curves
from broker.portal.forms import NO_WORKDIR, example_values, spec_of
from broker.portal.job_text import spec_of_text
from broker.portal.log_tail import TAIL_BYTES, plain, read_tail
from broker.streams import StreamStore


def _streams(folder: Path) -> StreamStore:
    return StreamStore(folder, bytes_max=32_000_000)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (figures.span(0), "0 s"),
        (figures.span(90), "1 min 30 s"),
        (figures.span(90_061), "1 d 1 h"),
        (figures.size(999), "999 B"),
        (figures.size(80_000_000), "80.0 MB"),
        (figures.number(2_000_000), "2\u202f000\u202f000"),
        (figures.number(2.2248), "2.22"),
        (figures.share(1, 3), "33 %"),
        (figures.share(1, 10**9), "below 0.01 %"),
        (figures.share(1, 0), "\u2013"),
        (figures.credits_of(49_688), "0.049688"),
        (figures.places("ada/H100:8+bob/A100:4"), "8 H100 at ada + 4 A100 at bob"),
    ],
)
def test_figures_read_as_people_write_them(shown: str, expected: str) -> None:
    assert shown == expected


def test_curves_join_the_sites_of_a_job() -> None:
    rows = [
        Measurement("ada", 1000, 100, {"loss": 4.0}),
        Measurement("bob", 1100, 100, {"loss": 2.0}),
        Measurement("ada", 3000, 300, {"loss": 1.0, "held_out_loss": 1.5}),
    ]
    curves = curves_of(rows, predicted=90.0)
    assert curves.samples_done == [100, 300]
    assert curves.loss == [3.0, 1.0]
    assert curves.held_out_loss == [None, 1.5]
    assert curves.rate == [None, 100.0]
    assert curves.as_json()["samples_per_s_predicted"] == [90.0, 90.0]


def test_a_long_run_costs_no_more_than_some_pieces_and_keeps_both_ends(tmp_path: Path) -> None:
    streams = _streams(tmp_path)
    rows = (json.dumps({"time_ms": step * 1000, "samples_done": step, "loss": 1 / step}) for step in range(1, 100_001))
    streams.append("lease_1", "metrics", 0, "".join(f"{row}\n" for row in rows).encode())
    assert streams.state("lease_1", "metrics").held_bytes > PIECES * PIECE_BYTES
    curves = read_curves(streams, [Lease(lease_id="lease_1", site_id="ada")], None)
    assert len(curves.samples_done) <= POINTS_MAX + 1
    assert curves.samples_done[0] < 300
    assert curves.samples_done[-1] > 99_700


@given(st.lists(st.binary(max_size=200), max_size=20))
def test_whatever_a_site_sends_as_measurements_makes_a_page(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    streams = _streams(tmp_path_factory.mktemp("streams"))
    good = b'{"time_ms": 1, "samples_done": 5, "loss": 2}'
    hostile = [
        b'{"time_ms": 1e999, "samples_done": NaN, "loss": 1}',
        b'{"samples_done": ' + b"9" * 400 + b', "time_ms": 1}',
        b"[" * 5000,
    ]
    streams.append("lease_1", "metrics", 0, b"\n".join([*lines, *hostile, good]) + b"\n")
    curves = read_curves(streams, [Lease(lease_id="lease_1", site_id="ada")], None)
    assert 5 in curves.samples_done
    json.dumps(curves.as_json(), allow_nan=False)


def test_a_log_loses_what_would_act_and_keeps_what_was_said(tmp_path: Path) -> None:
    assert plain(b"\x1b[31mred\x1b[0m \x1b]8;;http://x\x07link\x07 \x00nul \xff <b>") == "red link nul \ufffd <b>"
    assert plain("pay \u202efdp.exe".encode()) == "pay fdp.exe"
    streams = _streams(tmp_path)
    streams.append("lease_1", "log", 0, b"".join(b"line %d\n" % number for number in range(5000)))
    tail = read_tail(streams, "lease_1")
    assert tail.cut
    assert tail.text.endswith("line 4999")
    assert len(tail.text) <= TAIL_BYTES
    assert all(line.startswith("line ") for line in tail.text.splitlines())


def test_the_form_begins_as_a_job_that_can_be_submitted() -> None:
    filled = spec_of(example_values(), NO_WORKDIR)
    assert filled.faults == {}
    assert filled.spec is not None
    assert filled.spec.market.budget_micros == 2_000_000


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("name", "no spaces here", "match pattern"),
        ("run", "rm -rf /", "must name a Python file"),
        ("budget", "1,50", "not an amount of credits"),
        ("budget", "-1", "greater than or equal to 1"),
        ("bid", "0.0000001", "not an amount of credits"),
        ("gpu_type_1", "H900", "unknown GPU type"),
        ("gpu_min_1", "0", "greater than or equal to 1"),
        ("sites_max", "nine", "valid integer"),
        ("samples", "", "Field required"),
        ("flops_per_sample", "nan", "finite number"),
        ("deadline", "tomorrow", "UTC time"),
        ("sites_allowed", "Not_A_Site", "match pattern"),
        ("period_steps", "0", "greater than or equal to 1"),
    ],
)
def test_a_mistake_is_said_at_its_field(field: str, value: str, said: str) -> None:
    filled = spec_of({**example_values(), field: value}, NO_WORKDIR)
    assert filled.spec is None
    assert said in filled.faults[field]


def test_a_job_files_fault_has_its_line() -> None:
    filled = spec_of_text("name: x\nrun: python train.py\nbudget: 3\n", NO_WORKDIR)
    assert filled.spec is None
    assert any(place.startswith("line 3") for place in filled.faults)
