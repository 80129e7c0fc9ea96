"""Usage is taken once, for the lease's own epoch, within what it can have run, and charged to the micro."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from broker import ledger
from broker.audit import audit
from broker.database.tables import Hold, Lease, Link, Placement, UsageReport
from broker.errors import BrokerError, StaleEpochError
from broker.invoices import invoice, statement
from broker.leases import end_lease
from broker.market import Market
from broker.metering import (
    EGRESS_HEADROOM,
    EgressImpossibleError,
    UsageConflictError,
    UsageRefusedError,
    UsageTooEarlyError,
    accept_usage,
    charges_of,
)
from broker.transitions import EndCause, LeaseState
from pricing.settlement import Delivery, LinkTerms, PoolTerms, Terms
from sites.agent import FINAL_REFUSALS
from sites.protocol import Usage
from tests.broker.sold import BANDWIDTH, BUDGET, CREDIT, EQUITY, HOUR_MS, sold_market
from tests.broker.speaking import Scene


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/market.sqlite3"


@pytest.fixture
def market(sqlite_url: str, tmp_path: Path) -> Iterator[Market]:
    market = sold_market(sqlite_url, tmp_path / "home")
    yield market
    market.database.close()


def test_half_an_hour_costs_half_of_what_the_job_is_worth_an_hour(database_url: str, tmp_path: Path) -> None:
    market = sold_market(database_url, tmp_path / "home")
    market.clock.advance_s(1800)
    assert _report(market, "ada", 1, gpu_ms=4 * HOUR_MS // 2, egress={"bob": 2_500_000_000}) == 1
    assert _report(market, "bob", 1, gpu_ms=8 * HOUR_MS // 2, egress={"ada": 2_500_000_000}) == 1
    # The bid values an hour at 15 credits, for which the sites ask 16.2; 2.5 GB cost 0.125 each way.
    paper = market.database.read(lambda session: invoice(session, "job"))
    assert paper.total_micros == paper.posted_micros == 7_500_000 + 2 * 125_000
    assert [line.discount_micros for line in paper.lines] == [300_000, 300_000]
    earned = market.database.read(lambda session: statement(session, "ada"))
    assert earned.earned_micros == earned.balance_micros == 4_000_000 + 50_000 + 125_000
    balances = market.database.read(ledger.balances)
    assert balances["equity"] == EQUITY - 600_000
    assert balances["fees"] == 0
    assert market.database.read(audit) == []
    market.database.close()


def test_an_invoice_adds_up_line_by_line_and_is_final_once_its_hold_is_closed(market: Market) -> None:
    market.clock.advance_s(100)
    _report(market, "ada", 1, gpu_ms=123_457)
    _report(market, "ada", 2, gpu_ms=7_001, egress={"bob": 999})
    paper = market.database.read(lambda session: invoice(session, "job"))
    assert len(paper.lines) == 1
    line = paper.lines[0]
    assert line.gpu_milliseconds == 130_458
    explained = line.gpu_micros + line.rent_micros + line.egress_micros - line.discount_micros - line.cut_micros
    assert explained == line.charge_micros == paper.total_micros == paper.posted_micros
    assert not paper.final
    assert paper.as_json()["hold_micros"] == BUDGET
    market.database.write("probe", lambda session: ledger.close_hold(session, "job", 1))
    final = market.database.read(lambda session: invoice(session, "job"))
    assert final.final
    assert final.posted_micros + final.voided_micros == BUDGET


def test_a_report_sent_again_is_acknowledged_and_not_paid_again(market: Market) -> None:
    market.clock.advance_s(60)
    assert _report(market, "ada", 1, gpu_ms=1000, egress={"bob": 7}) == 1
    before = market.database.read(ledger.balances)
    assert _report(market, "ada", 1, gpu_ms=1000, egress={"bob": 7}) == 1
    assert market.database.read(ledger.balances) == before
    with pytest.raises(UsageConflictError, match="taken already with 1000"):
        _report(market, "ada", 1, gpu_ms=1001, egress={"bob": 7})
    with pytest.raises(UsageConflictError):
        _report(market, "ada", 1, gpu_ms=1000, egress={"bob": 8})
    assert market.database.read(ledger.balances) == before


def test_a_gap_is_not_acknowledged(market: Market) -> None:
    market.clock.advance_s(60)
    assert _report(market, "ada", 2, gpu_ms=1000) == 0
    assert _report(market, "ada", 1, gpu_ms=500) == 1
    assert _report(market, "ada", 3, gpu_ms=500) == 1
    assert _report(market, "ada", 2, gpu_ms=1000) == 2
    assert market.database.read(audit) == []


def test_an_old_epoch_cannot_post_usage(market: Market) -> None:
    market.clock.advance_s(60)
    for epoch in (2, 3):
        with pytest.raises(StaleEpochError, match="stop what runs"):
            _report(market, "ada", 1, gpu_ms=1000, epoch=epoch)
    assert _reports(market) == 0


def test_expired_lease_cannot_post_usage(market: Market) -> None:
    market.clock.advance_s(60)
    _report(market, "ada", 1, gpu_ms=1000)
    _end(market, "ada", EndCause.EXPIRED)
    with pytest.raises(UsageRefusedError, match="expired before this report came"):
        _report(market, "ada", 2, gpu_ms=1000)
    assert _report(market, "ada", 1, gpu_ms=1000) == 1  # what was taken stays acknowledged
    assert _reports(market) == 1


def test_a_report_taken_before_expiry_counts_as_such_though_utc_was_stepped_back_between(market: Market) -> None:
    market.clock.advance_s(60)
    _report(market, "ada", 1, gpu_ms=1000)
    market.clock.step_utc_s(-300)
    _end(market, "ada", EndCause.EXPIRED)
    assert [finding for finding in market.database.read(audit) if finding.invariant == 6] == []
    with pytest.raises(UsageRefusedError, match="expired before this report came"):
        _report(market, "ada", 2, gpu_ms=1000)


def test_the_final_report_of_an_ended_lease_is_taken_for_a_while(market: Market) -> None:
    market.clock.advance_s(60)
    _end(market, "ada", EndCause.CANCELLED)
    market.clock.advance_s(market.settings.settle_s)
    assert _report(market, "ada", 1, gpu_ms=4 * 60_000) == 1
    market.clock.advance_s(0.001)
    with pytest.raises(UsageRefusedError, match="ended more than"):
        _report(market, "ada", 2, gpu_ms=1)


def test_a_closed_hold_takes_no_more_usage(market: Market) -> None:
    market.clock.advance_s(60)
    _end(market, "ada", EndCause.DONE)
    market.database.write("probe", lambda session: ledger.close_hold(session, "job", 1))
    with pytest.raises(UsageRefusedError, match="invoice final"):
        _report(market, "ada", 1, gpu_ms=1)


def test_no_more_gpu_time_is_taken_than_the_lease_can_have_run(market: Market) -> None:
    market.clock.advance_s(60)
    most = 4 * round((60 + market.settings.liveness_s) * 1000)
    with pytest.raises(UsageTooEarlyError, match="more than lease lease_ada can have run"):
        _report(market, "ada", 1, gpu_ms=most + 1)
    assert _report(market, "ada", 1, gpu_ms=most) == 1
    _end(market, "ada", EndCause.DONE)
    market.clock.advance_s(30)  # time after the end grants nothing
    with pytest.raises(UsageTooEarlyError, match="can have run"):
        _report(market, "ada", 2, gpu_ms=1)


def test_usage_of_an_honest_site_is_taken_though_utc_was_stepped_back(scene: Scene) -> None:
    job_id = scene.submit(2)
    (site,) = scene.start(job_id)
    order = site.order()
    scene.pass_s(60, site.site_id)
    scene.clock.step_utc_s(-300)
    site.meter(order, 2 * 60_000)
    assert site.beat().refusals == ()
    assert scene.lease(job_id, site.site_id).delivered_gpu_milliseconds == 2 * 60_000


def test_usage_that_comes_too_early_is_not_refused_for_good(scene: Scene) -> None:
    job_id = scene.submit(2)
    (site,) = scene.start(job_id)
    order = site.order()
    scene.pass_s(20, site.site_id)
    # After a reboot readings of before it say nothing: what is left is UTC, which was stepped back.
    scene.clock.reboot()
    scene.clock.step_utc_s(-300)
    site.meter(order, 2 * 20_000)
    (refusal,) = site.beat().refusals
    assert refusal.code == "usage.too_early"
    assert refusal.code not in FINAL_REFUSALS
    scene.clock.step_utc_s(300)
    assert site.beat().refusals == ()
    assert scene.lease(job_id, site.site_id).delivered_gpu_milliseconds == 2 * 20_000


def test_egress_to_a_stranger_is_not_charged(market: Market) -> None:
    market.clock.advance_s(60)
    for stranger in ("eve", "ada"):
        with pytest.raises(UsageRefusedError, match=f"egress to {stranger}"):
            _report(market, "ada", 1, gpu_ms=1000, egress={stranger: 10**12})
    assert _reports(market) == 0


def test_no_more_egress_is_taken_than_its_link_can_have_carried_since_the_lease_began(market: Market) -> None:
    market.clock.advance_s(60)
    seconds = 60 + market.settings.liveness_s
    most = round(BANDWIDTH / 8 * EGRESS_HEADROOM * seconds)
    with pytest.raises(EgressImpossibleError, match="more than the link can have carried by now"):
        _report(market, "ada", 1, gpu_ms=1000, egress={"bob": most + 1})
    assert _reports(market) == 0
    assert _report(market, "ada", 1, gpu_ms=1000, egress={"bob": most - 1000}) == 1
    with pytest.raises(EgressImpossibleError):  # it counts over all reports
        _report(market, "ada", 2, gpu_ms=1000, egress={"bob": 1001})
    market.clock.advance_s(1)  # an honest one that was only quick is taken later
    assert _report(market, "ada", 2, gpu_ms=1000, egress={"bob": 1001}) == 2
    assert market.database.read(audit) == []


def test_egress_over_a_link_that_is_no_longer_offered_costs_nothing(market: Market) -> None:
    market.clock.advance_s(60)
    market.database.write("probe", lambda session: session.delete(session.get_one(Link, ("ada", "bob"))))
    assert _report(market, "ada", 1, gpu_ms=0, egress={"bob": 10**12}) == 1
    assert market.database.read(lambda session: invoice(session, "job")).total_micros == 0


def test_a_lease_that_never_was_active_has_no_usage(market: Market) -> None:
    def unstart(session: Session) -> None:
        lease = session.get_one(Lease, "lease_ada")
        lease.active_ms, lease.state = None, LeaseState.CONFIRMED

    market.database.write("probe", unstart)
    with pytest.raises(UsageRefusedError, match="never was active"):
        _report(market, "ada", 1, gpu_ms=1)


def test_charges_stop_at_the_reservation(sqlite_url: str, tmp_path: Path) -> None:
    market = sold_market(sqlite_url, tmp_path / "home", reserved_micros=3 * CREDIT)
    market.clock.advance_s(1800)
    _report(market, "ada", 1, gpu_ms=4 * HOUR_MS // 4)
    _report(market, "ada", 2, gpu_ms=4 * HOUR_MS // 4)
    _report(market, "ada", 3, gpu_ms=1000)
    placement = market.database.read(lambda session: session.get_one(Placement, "placement"))
    assert placement.charged_micros == placement.reserved_micros == 3 * CREDIT
    paper = market.database.read(lambda session: invoice(session, "job"))
    assert paper.total_micros == 3 * CREDIT
    assert paper.lines[0].cut_micros > 0
    assert market.database.read(audit) == []
    market.database.close()


def test_a_late_report_leaves_the_next_placement_its_reservation(sqlite_url: str, tmp_path: Path) -> None:
    market = sold_market(sqlite_url, tmp_path / "home")
    market.clock.advance_s(1800)

    def move_on(session: Session) -> None:
        old = session.get_one(Placement, "placement")
        columns = {column.key: getattr(old, column.key) for column in Placement.__table__.columns}
        old.state = "ended"
        session.flush()
        session.add(Placement(**{**columns, "placement_id": "next", "epoch": 2, "reserved_micros": BUDGET - 1000}))

    market.database.write("probe", move_on)
    _end(market, "ada", EndCause.MOVED)
    assert _report(market, "ada", 1, gpu_ms=4 * HOUR_MS // 2) == 1
    assert market.database.read(lambda session: session.get_one(Hold, "job").posted_micros) == 1000
    market.database.close()


def test_sites_share_what_equity_lacks_and_an_event_and_the_audit_say_so(sqlite_url: str, tmp_path: Path) -> None:
    market = sold_market(sqlite_url, tmp_path / "home", equity_micros=1000)
    market.clock.advance_s(1800)
    _report(market, "ada", 1, gpu_ms=4 * HOUR_MS // 2)
    balances = market.database.read(ledger.balances)
    assert balances["equity"] in {0, 1}
    assert balances["site/ada"] < 4_050_000
    assert {finding.invariant for finding in market.database.read(audit)} == {11}
    market.database.close()


@given(
    price=st.integers(0, 10**9),
    fee=st.integers(0, 1000),
    gpu_ms=st.integers(0, 10**12),
    rent=st.integers(0, 10**8),
    egress_price=st.integers(0, 10**7),
    sent=st.integers(0, 10**13),
    uplift=st.integers(0, 10**9),
    left=st.integers(0, 10**13),
    equity=st.integers(0, 10**12),
)
def test_every_charge_is_explained_and_balances(  # noqa: PLR0917  hypothesis hands over one by one
    price: int, fee: int, gpu_ms: int, rent: int, egress_price: int, sent: int, uplift: int, left: int, equity: int
) -> None:
    gross = price * 3 + rent
    terms = Terms(
        pools=(PoolTerms("a/H100", "a", 3, price, price * (10_000 - fee) // 10_000),),
        links=(LinkTerms("a", "b", rent, egress_price, 0),),
        uplift_micros_per_hour=min(uplift, gross),
    )
    delivery = Delivery(gpu_ms={"a/H100": gpu_ms}, egress_bytes={("a", "b"): sent}, rented_ms={("a", "b"): gpu_ms // 3})
    charges = charges_of(terms, delivery, "a/H100", reservation_left_micros=left, equity_left_micros=equity)
    explained = charges.gpu_micros + charges.rent_micros + charges.egress_micros
    assert explained - charges.discount_micros - charges.cut_micros == charges.charge_micros <= left
    taken = charges.payout_micros + charges.link_revenue_micros + charges.fee_micros
    assert charges.charge_micros + charges.uplift_micros == taken
    assert charges.uplift_micros <= equity
    assert charges.fee_micros <= charges.charge_micros
    assert min(getattr(charges, name) for name in charges.__slots__) >= 0


def _report(
    market: Market, site: str, sequence: int, *, gpu_ms: int, egress: dict[str, int] | None = None, epoch: int = 1
) -> int:
    usage = Usage(
        lease_id=f"lease_{site}",
        epoch=epoch,
        sequence=sequence,
        gpu_milliseconds=gpu_ms,
        samples=10,
        egress_bytes=egress or {},
    )
    return market.database.write(
        "probe", lambda session: accept_usage(session, market, session.get_one(Lease, usage.lease_id), usage)
    )


def _end(market: Market, site: str, cause: EndCause) -> None:
    def work(session: Session) -> None:
        end_lease(session, market, session.get_one(Lease, f"lease_{site}"), cause)

    market.database.write("probe", work)


def _reports(market: Market) -> int | None:
    return market.database.read(lambda session: session.scalar(select(func.count()).select_from(UsageReport)))


def test_what_metering_refuses_does_not_fail_a_whole_heartbeat() -> None:
    assert issubclass(UsageConflictError, BrokerError)
    assert issubclass(UsageRefusedError, BrokerError)
