"""Every settlement balances, stays inside its reservation, and pays sites what they were promised."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pricing.errors import QuantityError, SettlementError
from pricing.fairness import LostOpportunity, Resource, owen_transfers
from pricing.money import Micros
from pricing.settlement import Delivery, LinkTerms, PoolTerms, Settlement, Terms, reservation_micros, settle

HOUR_MS = 3_600_000
MICROS = st.integers(0, 10**9)


@st.composite
def terms(draw: st.DrawFn) -> Terms:
    pools = []
    for site in draw(st.lists(st.sampled_from(["ada", "bob", "cyd"]), min_size=1, unique=True)):
        payout = draw(MICROS)
        pools.append(PoolTerms(f"{site}/A100", site, draw(st.integers(1, 64)), payout + draw(MICROS), payout))
    links = [
        LinkTerms(pair[0], pair[1], draw(MICROS), draw(MICROS), draw(st.integers(0, 10**8)))
        for pair in draw(st.lists(st.sampled_from([("ada", "bob"), ("bob", "ada"), ("ada", "cyd")]), unique=True))
    ]
    plain = Terms(pools, links)
    return Terms(pools, links, draw(st.integers(0, plain.gross_micros_per_hour)), draw(st.one_of(st.just(0), MICROS)))


@st.composite
def deliveries(draw: st.DrawFn, sold: Terms, most_ms: int = 10 * HOUR_MS) -> Delivery:
    elapsed_ms = draw(st.integers(0, most_ms))
    return Delivery(
        gpu_ms={row.pool_id: draw(st.integers(0, row.gpus * elapsed_ms)) for row in sold.pools},
        elapsed_ms=elapsed_ms,
        egress_bytes={
            (row.from_site, row.to_site): draw(st.integers(0, row.egress_bytes_per_s * elapsed_ms // 1000))
            for row in sold.links
        },
    )


@given(st.data(), st.integers(0, 10**13), st.integers(0, 10**13))
def test_what_is_given_is_what_is_taken(data: st.DataObject, reservation_left: int, equity_left: int) -> None:
    sold = data.draw(terms())
    done = settle(
        sold, data.draw(deliveries(sold)), reservation_left_micros=reservation_left, equity_left_micros=equity_left
    )
    taken = sum(done.payouts.values()) + sum(done.link_revenue.values()) + done.fee_micros
    assert done.charge_micros + done.equity_drawn_micros == taken
    assert 0 <= done.charge_micros <= reservation_left
    assert 0 <= done.equity_drawn_micros <= equity_left
    assert done.fee_micros >= 0


@given(st.data(), st.integers(1, 86_400))
def test_a_term_never_costs_more_than_its_reservation(data: st.DataObject, term_s: int) -> None:
    sold = data.draw(terms())
    delivery = data.draw(deliveries(sold, term_s * 1000))
    done = settle(sold, delivery, reservation_left_micros=10**30, equity_left_micros=10**30)
    assert done.charge_micros <= reservation_micros(sold, term_s)


@given(st.data())
def test_inside_the_reservation_sites_get_price_times_delivery_rounded_down(data: st.DataObject) -> None:
    sold = data.draw(terms())
    delivery = data.draw(deliveries(sold))
    done = settle(sold, delivery, reservation_left_micros=10**30, equity_left_micros=10**30)
    for row in sold.pools:
        assert done.payouts[row.site_id] == row.payout_micros_per_gpu_hour * delivery.gpu_ms[row.pool_id] // HOUR_MS
    assert done.shortfall_micros == 0


def test_a_plain_hour_by_hand() -> None:
    sold = Terms(
        [PoolTerms("ada/A100", "ada", 2, 3_000_000, 2_700_000), PoolTerms("bob/A100", "bob", 1, 2_000_000, 2_000_000)],
        [LinkTerms("ada", "bob", 100, 50_000, 1_000_000)],
    )
    done = settle(
        sold,
        Delivery({"ada/A100": 2 * HOUR_MS, "bob/A100": HOUR_MS}, HOUR_MS, {("ada", "bob"): 3_600_000_000}),
        reservation_left_micros=10**9,
        equity_left_micros=0,
    )
    assert done.payouts == {"ada": 5_400_000, "bob": 2_000_000}
    assert done.link_revenue == {"ada": 100 + 180_000}
    assert done.fee_micros == 600_000
    assert done.charge_micros == 8_000_000 + 100 + 180_000
    assert reservation_micros(sold, 3600) == done.charge_micros


def test_uplift_lowers_the_charge_and_equity_makes_it_up() -> None:
    sold = Terms([PoolTerms("ada/A100", "ada", 3, 9_000_000, 9_000_000)], uplift_micros_per_hour=12_000_000)
    done = settle(sold, Delivery({"ada/A100": 3 * HOUR_MS}), reservation_left_micros=10**9, equity_left_micros=10**9)
    assert (done.charge_micros, done.equity_drawn_micros) == (15_000_000, 12_000_000)
    assert done.payouts == {"ada": 27_000_000}
    half = settle(
        sold, Delivery({"ada/A100": 3 * HOUR_MS}), reservation_left_micros=10**9, equity_left_micros=6_000_000
    )
    assert (half.charge_micros, half.equity_drawn_micros, half.shortfall_micros) == (15_000_000, 6_000_000, 6_000_000)
    assert half.payouts == {"ada": 21_000_000}


def test_a_delivery_beyond_the_reservation_is_cut_for_everyone() -> None:
    sold = Terms([PoolTerms("ada/A100", "ada", 1, 2_000_000, 1_000_000)])
    done = settle(
        sold, Delivery({"ada/A100": 2 * HOUR_MS}), reservation_left_micros=1_000_000, equity_left_micros=10**9
    )
    assert (done.charge_micros, done.payouts, done.fee_micros) == (1_000_000, {"ada": 500_000}, 500_000)
    nothing = settle(sold, Delivery({"ada/A100": HOUR_MS}), reservation_left_micros=0, equity_left_micros=10**9)
    assert (nothing.charge_micros, nothing.payouts, nothing.equity_drawn_micros) == (0, {"ada": 0}, 0)


def test_a_delivery_that_the_terms_do_not_price_is_refused() -> None:
    sold = Terms([PoolTerms("ada/A100", "ada", 1, 2, 1)])
    with pytest.raises(QuantityError, match="bob/A100"):
        settle(sold, Delivery({"bob/A100": 1}), reservation_left_micros=1, equity_left_micros=0)
    with pytest.raises(QuantityError, match="ada"):
        settle(sold, Delivery({}, 0, {("ada", "bob"): 1}), reservation_left_micros=1, equity_left_micros=0)


def test_a_settlement_out_of_balance_cannot_exist() -> None:
    with pytest.raises(SettlementError, match="defect"):
        Settlement(Micros(5), Micros(0), {"ada": 4}, {}, Micros(0), Micros(0))


def test_the_owen_transfer_is_the_rent_of_what_a_site_brings() -> None:
    resources = [Resource("bob", 5, 2, 10), Resource("ada", 7, 7, 100), Resource("bob", 3, 0, 4)]
    assert owen_transfers(resources) == {"ada": 0, "bob": 42}


def test_the_identity_is_exact() -> None:
    assert LostOpportunity(100, 90, 4, 6).identity_holds
    assert not LostOpportunity(100, 90, 4, 7).identity_holds
    assert LostOpportunity(100, 90, 4, 6).gap_micros_per_hour == 10
