"""What the demo takes for a good end, and what it says that plain training would have sent."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from broker.demo.board import Board, JobRow, PoolRow
from broker.demo.display import LiveDisplay, PlainDisplay, display_for
from broker.demo.report import JobResult, Report, plain_ddp_bytes, print_report

JOB = JobResult(
    name="cog",
    tenant_id="fugger",
    state="finished",
    where="lubeck 2 + visby 2",
    price_micros_per_slot_hour=4_600_000,
    loss_first=5.7,
    loss_last=2.5,
    samples_per_s_measured=470.0,
    samples_per_s_predicted=500.0,
    bytes_between_sites=80_000,
    bytes_plain=160_000_000,
    charge_micros=212_630,
    amends_micros=0,
)
GOOD = Report(
    jobs=(JOB,),
    payouts_micros={"lubeck": 108_298, "visby": 104_332, "bergen": 0},
    ledger_sum_micros=0,
    transfers=9,
    sound=True,
    findings=(),
    replayed_round=1,
    replay_identical=True,
)


def test_good_run_has_no_failures() -> None:
    assert GOOD.failures() == []


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (replace(GOOD, jobs=(replace(JOB, state="failed"),)), "cog has failed"),
        (replace(GOOD, jobs=(replace(JOB, loss_last=5.8),)), "learned nothing"),
        (replace(GOOD, jobs=(replace(JOB, loss_last=None),)), "learned nothing"),
        (replace(GOOD, jobs=(replace(JOB, bytes_between_sites=0),)), "no job has sent a byte"),
        (replace(GOOD, ledger_sum_micros=1), "the ledger's sum is 1"),
        (replace(GOOD, payouts_micros={}), "0 paid out"),
        (replace(GOOD, findings=("invariant 4: gpu",)), "invariant 4"),
        (replace(GOOD, replay_identical=False), "does not replay"),
    ],
)
def test_every_bad_end_is_named(report: Report, said: str) -> None:
    assert said in "; ".join(report.failures())


def test_plain_training_exchanges_gradients_at_every_step() -> None:
    spec = {"market": {"workload": {"batch_per_gpu": 16, "parameters": 1000}}}
    # 640 samples on 4 slots of 16 are 10 steps; two sites each send 4 kB to the other.
    assert plain_ddp_bytes(spec, sites=2, slots=4, samples_done=640) == 10 * 2 * 4000
    assert plain_ddp_bytes(spec, sites=1, slots=4, samples_done=640) == 0


def test_table_has_job_price_loss_bytes_charge_payouts_and_the_ledgers_sum() -> None:
    out = StringIO()
    print_report(Console(file=out, width=170), GOOD)
    for part in ("lubeck 2 + visby 2", "4.6", "5.700 → 2.500", "78.1 KiB", "152.6 MiB", "0.21263", "0.108298"):
        assert part in out.getvalue()
    assert "the ledger's sum is 0" in out.getvalue()
    assert "CPU slots stood in for GPUs" in out.getvalue()


def test_refund_stands_beside_the_charge_and_in_the_sum() -> None:
    out = StringIO()
    print_report(Console(file=out, width=190), replace(GOOD, jobs=(replace(JOB, amends_micros=12_630),)))
    assert "0.21263 (refunded 0.01263)" in out.getvalue()
    assert "charged 0.21263, refunded 0.01263, paid out 0.21263 credits" in out.getvalue()


BOARD = Board(
    round_number=1,
    solve_ms=12.0,
    gap_micros_per_hour=5,
    pools=(PoolRow("lubeck/cpu-slot", 2, 2, 900_000, 4_600_000),),
    jobs=(JobRow("cog", "queued", "", "outbid", 0, 100),),
)


def test_pipe_gets_each_change_once() -> None:
    out = StringIO()
    display = PlainDisplay(Console(file=out, width=200))
    for _ in range(3):
        display.stage("training")
        display.show(BOARD)
    assert out.getvalue().count("round 1: lubeck/cpu-slot 4.6 (ask 0.9, 2 of 2 leased)") == 1
    assert out.getvalue().count("job cog is queued: outbid") == 1
    assert out.getvalue().count("training") == 1


def test_terminal_gets_one_picture_with_price_and_reason() -> None:
    out = StringIO()
    with LiveDisplay(Console(file=out, width=120, height=40, force_terminal=True, _environ={})) as display:
        display.stage("training")
        display.show(BOARD)
    assert "4.6" in out.getvalue()
    assert "outbid" in out.getvalue()


def test_display_follows_what_it_is_shown_on() -> None:
    assert isinstance(display_for(Console(file=StringIO())), PlainDisplay)
    assert isinstance(display_for(Console(file=StringIO(), force_terminal=True, _environ={})), LiveDisplay)
