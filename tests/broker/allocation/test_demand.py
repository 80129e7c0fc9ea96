"""The verifier's own oracle and the solver's: other code, other data, the same whole numbers."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from broker.allocation.compile import compile_market
from broker.allocation.demand import Demand
from broker.allocation.instance import NONE
from broker.allocation.oracle import best, dual_exact
from broker.allocation.rents import rents
from broker.allocation.rules import Row, Rules
from broker.allocation.snapshot import Snapshot
from broker.allocation.table_rows import from_snapshot
from broker.allocation.won import Market
from tests.broker.allocation.feature_markets import feature_market
from tests.broker.allocation.instances import random_market


def priced(market: Market, seed: int) -> tuple[np.ndarray, dict[Row, int]]:
    """Return random prices as the solver's vector and as the verifier's names."""
    draw = random.Random(seed)  # noqa: S311  a seeded test
    instance = market.instance
    prices = np.zeros(instance.row_count, np.int64)
    named: dict[Row, int] = {}
    for row, name in enumerate(market.row_names()):
        if name[0] == "pool":
            first = instance.rows.step_start[row]
            ask = int(instance.rows.step_cost[first]) if first < instance.rows.step_start[row + 1] else 0
            prices[row] = round(ask * draw.uniform(1.0, 2.5))
        elif draw.random() < 0.5:
            prices[row] = draw.randint(0, 2_000)
        named[name] = int(prices[row])
    return prices, named


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("seed", range(25))
def test_every_jobs_best_surplus_is_the_same_found_twice(seed: int, slots: int) -> None:
    check(feature_market(seed, jobs=8, sites=4, slots=slots), seed)


@pytest.mark.parametrize("seed", range(8))
def test_without_features_too_on_more_sites(seed: int) -> None:
    check(random_market(seed, jobs=15, sites=6, types=3), seed)


def check(snapshot: Snapshot, seed: int) -> None:
    tables = from_snapshot(snapshot)
    market = Market(tables, compile_market(tables))
    prices, named = priced(market, seed)
    rules = Rules(snapshot)
    demand = Demand(rules, named)
    found = best(market.instance, prices)
    ours = {market.names.jobs[job]: int(found.surplus[job]) for job in range(market.instance.job_count)}
    theirs = {job.job_id: demand.best(job) for job in snapshot.jobs}
    told = {}
    for job in np.flatnonzero(found.form != NONE).tolist():
        column = market.told(job, int(found.form[job]), int(found.item[job]), int(found.place[job]))
        told[market.names.jobs[job]] = (column.action, column.configuration.key, column.first_slot)
    assert ours == theirs, [(job, ours[job], theirs[job], told.get(job)) for job in ours if ours[job] != theirs[job]]
    supplies = rules.supplies()
    rent = rents(market.instance, prices)
    for row, name in enumerate(market.row_names()):
        base, steps = supplies[name]
        price = named[name]
        assert rent[row] == base * price + sum(max(0, price - cost) * units for units, cost in steps), name
    assert dual_exact(market.instance, prices) == sum(theirs.values()) + int(rent.sum())


@pytest.mark.parametrize("slots", [1, 3])
def test_what_the_bound_leaves_out_is_never_the_best(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshots = [feature_market(seed, jobs=10, sites=6, slots=slots) for seed in range(4)]
    snapshots.append(random_market(5, jobs=20, sites=7, types=3))
    looked: list[int] = []
    for seed, snapshot in enumerate(snapshots):
        tables = from_snapshot(snapshot)
        _, named = priced(Market(tables, compile_market(tables)), seed)
        counted = Demand(Rules(snapshot), named)
        rows = counted._best_row
        monkeypatch.setattr(
            counted, "_best_row", lambda *given, rows=rows: looked.append(len(given[2])) or rows(*given)
        )
        bounded = [counted.best(job) for job in snapshot.jobs]
        few, looked[:] = sum(looked), []
        endless = Demand(Rules(snapshot), named)
        most = endless._most
        monkeypatch.setattr(endless, "_most", lambda *given, most=most: replace(most(*given), worth=2**61))
        rows = endless._best_row
        monkeypatch.setattr(
            endless, "_best_row", lambda *given, rows=rows: looked.append(len(given[2])) or rows(*given)
        )
        assert [endless.best(job) for job in snapshot.jobs] == bounded
        assert few < sum(looked)
        looked.clear()
