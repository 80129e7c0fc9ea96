"""Whole placements out of prices: the repair that turns the LP's market into one that can be run.

    incumbents   stay while the prices give them no good reason to move        (occupancy)
    crossing     jobs across sites compete for links in a small MIP            (crossing)
    responses    the others choose in turn, the surest and largest first       (responses)
    sweeps       pools choose anew who sits there, by knapsacks                (knapsack)
    finish       small rounds are solved to the optimum by a MIP               (finish)

What comes out depends on the instance, the whole prices, `start` and limits that are counts; on
nothing else, and so not on how the LP was solved.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np

from broker.allocation import oracle
from broker.allocation.columns import Columns, scale, window
from broker.allocation.crossing import choose_crossing
from broker.allocation.finish import PROVED_GAP, finish
from broker.allocation.instance import BUNDLE, NONE, SINGLE, SPAN, Choice, Instance, Int, Real
from broker.allocation.knapsack import cells_of, new_desk, seated_by_cell, suitors_by_cell, sweep
from broker.allocation.listing import near
from broker.allocation.nodes import market_nodes
from broker.allocation.occupancy import (
    Occupancy,
    choice_of,
    copy_into,
    empty_occupancy,
    new_scratch,
    seat,
    welfare_of,
)
from broker.allocation.responses import (
    Shortlist,
    best_singles,
    improve,
    marginal_prices,
    priced_offers,
    respond,
)
from broker.allocation.uplift import drop_unfunded

# An incumbent stays while its regret is at most this share of its value: a move has costs that no
# bid states, and prices move by more than this from round to round.
KEEP_REGRET: Final = 0.02
# Jobs whose surplus is at least this share of their value choose first: the LP serves all of them.
_SURE: Final = 0.1
# How much a sweep counts what is left unused, from leaning on others to welfare itself.
_WEIGHTS: Final = (0.5, 0.7, 0.9, 1.0, 1.0, 1.0)
# Suitors regret at least this share of their best surplus's mean, so that no effort goes into crumbs.
_CRUMB: Final = 1e-7
_SPAN_WIDTH: Final = 0.05
# The finish looks at columns that regret up to these shares of a mean value, then at all it must.
_FINISH_SHARES: Final = (0.05, np.inf)


class Limits(NamedTuple):
    """Bounds of the effort, all counts."""

    sweeps: int = 6
    crossing_nodes: int = 200
    finish_jobs: int = 500
    finish_nodes: int = 4000
    finish_columns: int = 60_000


class Effort(NamedTuple):
    """What the repair did, in counts."""

    kept: int
    crossing_columns: int
    crossing_nodes: int
    placed: int
    moved: int
    cells_changed: int
    finish_columns: int
    finish_nodes: int


class Rounded(NamedTuple):
    """Whole placements, their welfare in micro-credits per hour, and whether they are proved optimal to 1e-4.

    `seconds`, as the caller's `tick` counts them: keep, cross, respond, sweep, finish.
    """

    choice: Choice
    welfare: int
    effort: Effort
    optimal: bool
    seconds: tuple[float, ...] = ()


def whole(
    instance: Instance,
    prices: Int,
    *,
    start: Choice | None = None,
    best: oracle.Best | None = None,
    limits: Limits | None = None,
    tick: Callable[[], float] = lambda: 0.0,
) -> Rounded:
    """Place every job whole at published `prices` [rows], micro-credits per hour.

    `start` is a choice to begin with (what does not fit is left out); incumbents inside their term
    begin in their own place in any case. `best` are the oracle's columns at the same whole prices, where
    the caller has them already.
    """
    limits = limits or Limits()
    search = _Search(instance, prices, best)
    marks = [tick()]
    kept = search.keep(start)
    marks.append(tick())
    crossing_columns, crossing_nodes = search.cross(limits.crossing_nodes)
    marks.append(tick())
    placed = search.respond()
    marks.append(tick())
    moved, cells = search.sweep(limits.sweeps)
    marks.append(tick())
    optimal, finish_columns, finish_nodes = search.finish(limits)
    marks.append(tick())
    seconds = tuple(after - before for before, after in itertools.pairwise(marks))
    effort = Effort(kept, crossing_columns, crossing_nodes, placed, moved, cells, finish_columns, finish_nodes)
    return Rounded(choice_of(search.state), welfare_of(instance, search.state), effort, optimal, seconds)


def drop_uplift(instance: Instance, prices: Int, rounded: Rounded, equity_micros: int) -> Rounded:
    """Drop and refill placements until market equity covers the uplift of all that remain.

    Optimality is no longer claimed once something was dropped.
    """
    state = empty_occupancy(instance, prices)
    scratch = new_scratch(instance)
    seat(instance, state, _only_own(instance, rounded.choice), scratch)
    seat(instance, state, rounded.choice, scratch)
    if not drop_unfunded(instance, prices, state, equity_micros):
        return rounded
    return rounded._replace(choice=choice_of(state), welfare=welfare_of(instance, state), optimal=False)


def _only_own(instance: Instance, choice: Choice) -> Choice:
    """Return the part of a choice that is incumbents inside their term in their own place."""
    own = instance.jobs.must & (choice.form == BUNDLE) & (choice.item == instance.jobs.own)
    return choice._replace(form=np.where(own, BUNDLE, NONE).astype(np.int8))


class _Search:
    """The state of one repair."""

    def __init__(self, instance: Instance, prices: Int, best: oracle.Best | None) -> None:
        self.instance = instance
        self.prices = prices
        self.state = empty_occupancy(instance, prices)
        self.scratch = new_scratch(instance)
        self.offers = priced_offers(instance, self.state.price)
        layout = oracle.prepare(instance)
        self.wish = oracle.best(instance, prices, layout=layout) if best is None else best
        self.best = self.wish.surplus.astype(np.float64)
        self.dual = oracle.dual_exact(instance, prices, self.wish)
        self.shortlist = _shortlist(instance, self.state, layout, self.wish)

    def keep(self, start: Choice | None) -> int:
        instance = self.instance
        own = instance.jobs.own
        inside = Choice(np.where(instance.jobs.must, BUNDLE, NONE).astype(np.int8), own, np.zeros(len(own), np.int32))
        kept = seat(instance, self.state, inside, self.scratch)
        if np.any(instance.jobs.must):
            order = np.flatnonzero(instance.jobs.must & (self.regret() > KEEP_REGRET * self.state.value))
            kept -= self._improve(order, 1.0)
        if start is not None:
            kept += seat(instance, self.state, start, self.scratch)
        else:
            past = (own >= 0) & ~instance.jobs.must
            if np.any(past):
                worth = _bundle_surplus(instance, self.state.price)[np.maximum(own, 0)]
                near_best = (
                    past
                    & (worth >= 0)
                    & (self.best - worth <= KEEP_REGRET * instance.bundles.value[np.maximum(own, 0)])
                )
                kept += seat(
                    instance,
                    self.state,
                    Choice(np.where(near_best, BUNDLE, NONE).astype(np.int8), own, np.zeros(len(own), np.int32)),
                    self.scratch,
                )
        return kept

    def regret(self) -> Real:
        return self.best - self.state.surplus

    def cross(self, nodes: int) -> tuple[int, int]:
        columns = self.shortlist[1]
        if not len(columns.job):
            return 0, 0
        single = np.zeros(self.instance.job_count)
        crossing = np.unique(columns.job).astype(np.int64)
        surplus = np.zeros(len(crossing))
        best_singles(self.instance, self.state, self.offers, self.state.price, crossing, surplus)
        single[crossing] = surplus
        found = choose_crossing(self.instance, self.state, columns, single, nodes_max=nodes)
        seat(self.instance, self.state, found.choice, self.scratch)
        return found.columns, found.nodes

    def order(self) -> Int:
        instance, wish = self.instance, self.wish
        gpus = np.zeros(instance.job_count, np.int64)
        single, span = wish.form == SINGLE, wish.form == SPAN
        gpus[single] = instance.singles.gpus[wish.item[single]]
        gpus[span] = instance.spans.gpus[wish.item[span]]
        value = np.zeros(instance.job_count)
        value[single] = instance.singles.value[wish.item[single]]
        sure = self.best > _SURE * value
        return np.lexsort((np.arange(len(gpus)), -self.best / np.maximum(gpus, 1), -gpus, ~sure))

    def respond(self) -> int:
        return respond(
            self.instance, self.state, self.order(), self.offers, self.shortlist[0], self.state.price, 1.0, self.scratch
        )

    def _improve(self, order: Int, weight: float) -> int:
        prices = marginal_prices(self.instance, self.state, weight)
        return improve(
            self.instance,
            self.state,
            order,
            priced_offers(self.instance, prices),
            self.shortlist[0],
            prices,
            weight,
            np.zeros(self.instance.job_count),
            self.scratch,
        )

    def sweep(self, sweeps: int) -> tuple[int, int]:
        instance, state = self.instance, self.state
        cells = cells_of(instance, state.price)
        moved = changed = 0
        desk = new_desk()
        crumb = _CRUMB * float(self.best.mean()) if len(self.best) else 0.0
        top = empty_occupancy(instance, self.prices)
        copy_into(top, state)
        top_welfare = welfare_of(instance, state)
        for number in range(sweeps):
            weight = _WEIGHTS[min(number, len(_WEIGHTS) - 1)]
            seated = seated_by_cell(instance, state, cells)
            suitors = suitors_by_cell(instance, state, cells, self.offers, self.regret(), crumb)
            order = np.flatnonzero(np.diff(suitors.start) + np.diff(seated.start))
            cells_changed = sweep(
                instance,
                state,
                cells,
                seated,
                suitors,
                order,
                self.offers,
                self.shortlist[0],
                weight,
                self.scratch,
                desk,
            )
            changed += cells_changed
            regretful = np.flatnonzero(self.regret() > crumb)
            regretful = regretful[np.lexsort((regretful, -self.regret()[regretful]))]
            moved += self._improve(regretful, weight)
            welfare = welfare_of(instance, state)
            if welfare > top_welfare:
                top_welfare = welfare
                copy_into(top, state)
            elif weight == 1.0:
                break
        copy_into(state, top)
        return moved, changed

    def finish(self, limits: Limits) -> tuple[bool, int, int]:
        """Solve to the optimum where the round is small; return whether it is proved, columns and nodes."""
        instance = self.instance
        looked = nodes = 0
        if not 0 < instance.job_count <= limits.finish_jobs:
            return instance.job_count == 0, 0, 0
        for share in _FINISH_SHARES:
            welfare = welfare_of(instance, self.state)
            allowed = PROVED_GAP * abs(welfare)
            gap = self.dual - welfare
            if gap <= allowed:
                return True, looked, nodes
            # A choice with a column that regrets more than this is within `allowed` of ours, or worse.
            width = min(gap - allowed, share * float(self.state.value.mean())) + 1.0
            columns = near(instance, self.state.price, self.best, np.maximum(width, self.regret() + 1.0))
            if len(columns.job) > limits.finish_columns:
                break
            found = finish(instance, self.state, columns, self.dual, width, nodes_max=limits.finish_nodes)
            looked, nodes = looked + found.columns, nodes + found.nodes
            if found.choice is not None:
                self._adopt(found.choice)
            welfare = welfare_of(instance, self.state)
            if found.bound - welfare <= PROVED_GAP * abs(welfare):
                return True, looked, nodes
        return False, looked, nodes

    def _adopt(self, choice: Choice) -> None:
        """Take a whole choice over if it can be carried out and is worth more."""
        fresh = empty_occupancy(self.instance, self.prices)
        seated = seat(self.instance, fresh, choice, self.scratch)
        if seated == int(np.count_nonzero(choice.form != NONE)) and welfare_of(self.instance, fresh) > welfare_of(
            self.instance, self.state
        ):
            copy_into(self.state, fresh)


def _bundle_surplus(instance: Instance, price: Real) -> Real:
    bundles = instance.bundles
    owner = np.repeat(np.arange(len(bundles.value)), np.diff(bundles.entry_start))
    paid = np.bincount(owner, price[bundles.entry_row] * bundles.entry_use, minlength=len(bundles.value))
    return np.asarray(bundles.value - paid, np.float64)


def _shortlist(
    instance: Instance, state: Occupancy, layout: oracle.Layout, wish: oracle.Best
) -> tuple[Shortlist, Columns]:
    """Return spans and bundles near their job's best, as a list to try and as columns."""
    found = oracle.Best(wish.form.copy(), wish.item.copy(), wish.place.copy(), wish.surplus.astype(np.float64))
    nodes = market_nodes(instance, layout)
    # Only who is best off across sites competes for links; the others have a place to go.
    crossing = (wish.form == SPAN) | (wish.form == BUNDLE)
    width = np.where(crossing, _SPAN_WIDTH * scale(instance), 0.0)
    columns = window(instance, layout, nodes, state.price, width, found=found, hint=found)
    columns = columns.take(np.flatnonzero((columns.form == SPAN) | (columns.form == BUNDLE)).astype(np.int32))
    span = columns.form == SPAN
    start = np.concatenate([[0], np.cumsum(np.bincount(columns.job[span], minlength=instance.job_count))])
    return Shortlist(start, columns.item[span].astype(np.int32), columns.place[span].astype(np.int32)), columns
