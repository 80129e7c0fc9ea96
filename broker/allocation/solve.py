"""Clear a round: a pure function from a snapshot to a clearing, the same to the bit on every run.

    snapshot ─ tables ─ compile ─ solve ─ write ─ clearing

Nothing reads a clock, a file or a random number. Last round's prices are in the snapshot for quotes;
the search for prices does not begin there, so that a clearing cannot depend on the round before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import highspy
import numpy as np

from broker.allocation.clearing import Clearing
from broker.allocation.compile import compile_market
from broker.allocation.snapshot import Snapshot
from broker.allocation.solver import Outcome, solve
from broker.allocation.table_rows import from_snapshot
from broker.allocation.tables import Tables
from broker.allocation.won import Market
from broker.allocation.writing import written

ALGORITHM: Final = "configuration-lp/2"


def clear(
    snapshot: Snapshot,
    *,
    tick: Callable[[], float] = lambda: 0.0,
    watch: Callable[[Outcome], object] = id,
) -> Clearing:
    """Return the clearing of a snapshot; `watch` sees the outcome with its times by phase, counted by `tick`.

    Raises broker.allocation.errors.AllocationError where the market is too large to state, or the
    solver gives nothing that stands up to our own check; then the round should be recorded as
    failed and the snapshot kept.
    """
    return clear_tables(from_snapshot(snapshot), tick=tick, watch=watch)


def clear_tables(
    tables: Tables,
    *,
    tick: Callable[[], float] = lambda: 0.0,
    watch: Callable[[Outcome], object] = id,
) -> Clearing:
    """Return the clearing of a snapshot in columns; `watch` sees the outcome with its times by phase."""
    started = tick()
    compiled = compile_market(tables)
    market = Market(tables, compiled)
    compiled_s = tick() - started
    outcome = solve(
        compiled.instance,
        equity_micros=int(tables.market("market_equity_micros")),
        tick=tick,
    )
    started = tick()
    clearing = written(
        market,
        outcome,
        round_number=int(tables.market("round_number")),
        snapshot_digest=tables.digest(),
        solver=solver_version(),
    )
    outcome.seconds["compile"], outcome.seconds["write"] = compiled_s, tick() - started
    watch(outcome)
    return clearing


def solver_version() -> str:
    """Return the name under which a clearing can be replayed to the bit."""
    highs = highspy.Highs()  # type: ignore[no-untyped-call]  # highspy's own signature lacks types
    return f"{ALGORITHM} highs/{highs.version()} numpy/{np.__version__}"
