"""A round that follows another: its prices stand, leases stay, and only what changed is placed anew.

    last prices ─ every job's best column there: the bound ─ leases stay ─ the others respond ─ two sweeps

No LP is solved. Where one job in a hundred has changed, the dual function at the last prices is a hundredth of
a per cent above the LP's, and the leases, of which a round from nothing moves one in thirty for no gain, are
nearly all in a good place already. The bound is computed at these very prices, so the gap stated is as true as that of any
round; where it is wider than `GAP_MAX`, the market has drifted too far, and the caller solves it from nothing.

What comes out is a function of the instance and the prices to follow: nothing is kept between rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from broker.allocation import oracle, rounding
from broker.allocation.instance import Instance, Int
from broker.allocation.posted import post
from broker.allocation.rounding import Limits
from broker.allocation.solver import Outcome

# A lease stays that regrets at most this share of its value. At .02, the share of a round from nothing, one lease in forty
# moves and the whole gains nothing: by how much prices are off is of that order.
KEEP_REGRET: Final = 0.1
SWEEPS: Final = 2
# Three times what rounds from nothing leave at 10,000 jobs.
GAP_MAX: Final = 0.01


def follow(
    instance: Instance,
    last_prices: Int,
    *,
    equity_micros: int = 0,
    gap_max: float = GAP_MAX,
    tick: Callable[[], float] = lambda: 0.0,
) -> Outcome | None:
    """Return the round at the last round's prices [rows], None where its gap is wider than `gap_max`.

    `equity_micros` and `tick` are as for `solve`.
    """
    marks = [tick()]
    layout = oracle.prepare(instance)
    prices = post(instance, last_prices.astype(np.float64))
    marks.append(tick())
    best = oracle.best(instance, prices, layout=layout)
    bound = oracle.dual_exact(instance, prices, best)
    marks.append(tick())
    limits = Limits(keep_regret=KEEP_REGRET, sweeps=SWEEPS, crossing_nodes=0, neighbourhoods=0, finish_jobs=0)
    placed = rounding.whole(instance, prices, best=best, layout=layout, limits=limits, tick=tick)
    funded = rounding.drop_uplift(instance, prices, placed, equity_micros)
    marks.append(tick())
    if bound - funded.welfare > gap_max * abs(bound):
        return None
    phases = ("prepare", "pricing", "rounding")
    return Outcome(
        prices=prices,
        choice=funded.choice,
        welfare=funded.welfare,
        bound=bound,
        # The best point of the LP that this round knows.
        lp_objective=float(funded.welfare),
        status="followed",
        columns=0,
        lp_rounds=0,
        repair_columns=0,
        repair_nodes=0,
        prices_settled=False,
        seconds={phase: after - before for phase, before, after in zip(phases, marks, marks[1:], strict=False)},
    )
