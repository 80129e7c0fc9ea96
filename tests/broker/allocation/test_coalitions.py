"""What sites could do alone, against what the federation's prices give them."""

from __future__ import annotations

import numpy as np
import pytest

from broker.allocation.coalitions import coalitions_of, published, standing
from broker.allocation.compile import compile_market
from broker.allocation.generate import generate
from broker.allocation.oracle import dual_exact
from broker.allocation.solve import clear_tables
from broker.allocation.won import Market


@pytest.mark.parametrize("seed", range(3))
def test_no_coalition_of_sites_does_better_alone_than_the_prices_give_it(seed: int) -> None:
    tables = generate("A", 14, 4, seed)
    clearing = clear_tables(tables)
    market = Market(tables, compile_market(tables))
    found = standing(market, clearing)
    assert found.complete
    assert len(found.gains) == 2**4 - 2
    # Owen 1975 holds for the LP: up to the proved gap of a part in a million.
    slack = 2e-6 * clearing.certificate.bound_micros_per_hour + 10
    assert found.core_slack_micros_per_hour >= -slack
    assert any(gain.slack_micros_per_hour > 0 for gain in found.alone)
    assert found.shapley is not None
    alone = [gain.alone_micros_per_hour for gain in found.alone]
    assert all(value >= worth - slack for value, worth in zip(found.shapley, alone, strict=True))


def test_a_clearings_prices_read_back_as_rows() -> None:
    tables = generate("B", 14, 4, 1)
    clearing = clear_tables(tables)
    market = Market(tables, compile_market(tables))
    prices = published(market, clearing)
    assert dual_exact(market.instance, prices) == clearing.certificate.bound_micros_per_hour


def test_beyond_twelve_sites_every_site_and_a_sample_are_tried() -> None:
    found = coalitions_of(20, sampled=30)
    assert found == coalitions_of(20, sampled=30)
    assert {(site,) for site in range(20)} <= set(found)
    assert len(found) == 70
    assert len({len(members) for members in found}) > 8
    assert all(np.array_equal(members, sorted(set(members))) for members in found)
