"""Pay as bid: the same placements at the same prices, charged by value; it verifies, and nobody is paid less or more."""

from __future__ import annotations

import io
import zipfile

import pytest

from broker.allocation.clearing import Clearing
from broker.allocation.generate import generate
from broker.allocation.snapshot import Snapshot
from broker.allocation.solve import clear
from broker.allocation.table_file import from_bytes, to_bytes
from broker.allocation.table_rows import from_snapshot, to_snapshot
from broker.allocation.verify import verify


@pytest.fixture(scope="module")
def uniform() -> Snapshot:
    drawn = to_snapshot(generate("B", 14, 4, 5, ("incumbents",)))
    return drawn.model_copy(update={"market_equity_micros": 10**9, "fee_basis_points": 200})


@pytest.fixture(scope="module")
def as_bid(uniform: Snapshot) -> Snapshot:
    return uniform.model_copy(update={"payment_rule": "pay_as_bid"})


@pytest.fixture(scope="module")
def clearings(uniform: Snapshot, as_bid: Snapshot) -> tuple[Clearing, Clearing]:
    return clear(uniform), clear(as_bid)


def test_a_rule_changes_what_buyers_pay_and_nothing_else(clearings: tuple[Clearing, Clearing]) -> None:
    plain, bid = clearings
    assert plain.prices == bid.prices
    assert len(plain.placements) == len(bid.placements) > 5
    more = 0
    for one, other in zip(plain.placements, bid.placements, strict=True):
        assert (one.configuration, one.pools, one.links, one.uplift_micros_per_hour) == (
            other.configuration,
            other.pools,
            other.links,
            other.uplift_micros_per_hour,
        )
        assert other.charge_micros_per_hour == one.charge_micros_per_hour + other.premium_micros_per_hour
        assert other.charge_micros_per_hour <= other.value_micros_per_hour or other.action == "keep"
        more += other.premium_micros_per_hour > 0
    assert more > len(plain.placements) // 2
    assert bid.certificate.turnover_micros_per_hour > plain.certificate.turnover_micros_per_hour
    assert all(bid.certificate.checks.values())


def test_both_rules_verify_and_a_wrong_premium_does_not(
    uniform: Snapshot, as_bid: Snapshot, clearings: tuple[Clearing, Clearing]
) -> None:
    plain, bid = clearings
    assert verify(uniform, plain) == []
    assert verify(as_bid, bid) == []
    swapped = bid.model_copy(update={"snapshot_digest": plain.snapshot_digest})
    assert {"premium"} <= {finding.code for finding in verify(uniform, swapped)}
    rows = list(bid.placements)
    at = next(i for i, row in enumerate(rows) if row.premium_micros_per_hour)
    rows[at] = rows[at].model_copy(update={"premium_micros_per_hour": rows[at].premium_micros_per_hour - 1})
    cheaper = bid.model_copy(update={"placements": tuple(rows)})
    assert "premium" in {finding.code for finding in verify(as_bid, cheaper)}


def test_what_was_taken_before_there_were_rules_keeps_its_name(uniform: Snapshot, as_bid: Snapshot) -> None:
    tables = from_snapshot(uniform)
    assert tables.digest() != from_snapshot(as_bid).digest()
    # A file from before has no such column.
    before = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(to_bytes(tables))) as written, zipfile.ZipFile(before, "w") as kept:
        for name in written.namelist():
            if name != "market.payment_rule.npy":
                kept.writestr(name, written.read(name))
    read = from_bytes(before.getvalue())
    assert read.digest() == tables.digest()
    assert to_snapshot(read).payment_rule == "uniform"
    assert to_snapshot(from_bytes(to_bytes(from_snapshot(as_bid)))).payment_rule == "pay_as_bid"


def test_a_clearing_says_nothing_of_premiums_where_there_are_none(clearings: tuple[Clearing, Clearing]) -> None:
    plain, bid = clearings
    assert b"premium" not in plain.to_json()
    assert Clearing.from_json(bid.to_json()) == bid
