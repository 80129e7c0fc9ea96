"""Clear a round: a pure function from a snapshot to a clearing, the same to the bit on every run.

    snapshot ─ tables ─ compile ─ solve ─ write ─ clearing

Nothing reads a clock, a file or a random number. Last round's prices are in the snapshot: for quotes, and
for a round that the snapshot tells to *follow* them (`following`). No other round begins its search for prices there, and
nothing is kept from one round to the next: a clearing is a function of its snapshot alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from broker.allocation.clearing import Clearing
from broker.allocation.compile import compile_market
from broker.allocation.engines import HIGHS, engine_maker, engine_version
from broker.allocation.following import follow
from broker.allocation.instance import Int
from broker.allocation.snapshot import Snapshot
from broker.allocation.solver import Outcome, solve
from broker.allocation.table_rows import from_snapshot
from broker.allocation.tables import Tables
from broker.allocation.won import Market
from broker.allocation.writing import written

ALGORITHM: Final = "configuration-lp/3"


def clear(
    snapshot: Snapshot,
    *,
    engine: str = HIGHS,
    tick: Callable[[], float] = lambda: 0.0,
    watch: Callable[[Outcome], object] = id,
) -> Clearing:
    """Return the clearing of a snapshot; `watch` sees the outcome with its times by phase, counted by `tick`.

    `engine` is the LP solver by name (`engines`). Another one may find other prices on the same optimal face.
    Raises broker.allocation.errors.AllocationError where the market is too large to state, or the engine is not there.
    """
    return clear_tables(from_snapshot(snapshot), engine=engine, tick=tick, watch=watch)


def clear_tables(
    tables: Tables,
    *,
    engine: str = HIGHS,
    tick: Callable[[], float] = lambda: 0.0,
    watch: Callable[[Outcome], object] = id,
) -> Clearing:
    """Return the clearing of a snapshot in columns; `watch` sees the outcome with its times by phase."""
    started, make_engine = tick(), engine_maker(engine)
    compiled = compile_market(tables)
    market = Market(tables, compiled)
    compiled_s = tick() - started
    equity_micros = int(tables.market("market_equity_micros"))
    last, outcome = _prices_to_follow(market), None
    if last is not None:
        outcome = follow(compiled.instance, last, equity_micros=equity_micros, tick=tick)
    if outcome is None:
        outcome = solve(compiled.instance, equity_micros=equity_micros, engine=make_engine, tick=tick)
    started = tick()
    clearing = written(
        market,
        outcome,
        round_number=int(tables.market("round_number")),
        snapshot_digest=tables.digest(),
        solver=solver_version(engine),
    )
    outcome.seconds["compile"], outcome.seconds["write"] = compiled_s, tick() - started
    watch(outcome)
    return clearing


def _prices_to_follow(market: Market) -> Int | None:
    """Return the last price of every row where the snapshot says to follow them and knows them all, else None.

    What a later slot, a budget or a floor cost is not in a snapshot, so rounds with those are solved from nothing.
    """
    tables, instance = market.tables, market.instance
    pools, links = instance.pool_count, len(instance.links.from_site)
    if not tables.market("follow_last_prices") or instance.row_count != pools + links or not pools:
        return None
    prices = np.zeros(instance.row_count, np.int64)
    prices[: instance.links.first_row] = -1
    for pool_id, price in zip(
        tables.names("last_prices.pool_id"), tables["last_prices.price_micros_per_gpu_hour"].tolist(), strict=True
    ):
        if pool_id in market.pool_index:
            prices[market.pool_index[pool_id]] = price
    if np.any(prices < 0):
        return None
    sites = market.names.sites
    for start, end, price in zip(
        *(tables[f"links.{part}"].tolist() for part in ("from_site", "to_site", "last_price_micros_per_share_hour")),
        strict=True,
    ):
        if (sites[start], sites[end]) in market.link_index:
            prices[instance.links.first_row + market.link_index[sites[start], sites[end]]] = price
    return prices


def solver_version(engine: str = HIGHS) -> str:
    """Return the name under which a clearing can be replayed to the bit."""
    return f"{ALGORITHM} {engine_version(engine)} numpy/{np.__version__}"
