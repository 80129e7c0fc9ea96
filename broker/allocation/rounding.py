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
from broker.allocation.columns import Columns, joined, scale, window
from broker.allocation.crossing import choose_crossing
from broker.allocation.finish import PROVED_GAP, finish
from broker.allocation.instance import BUNDLE, NONE, SINGLE, SPAN, Choice, Flag, Instance, Int, Real
from broker.allocation.knapsack import cells_of, new_desk, seated_by_cell, suitors_by_cell, sweep
from broker.allocation.listing import Names, described, near
from broker.allocation.neighbourhoods import NARROW, WIDE, Whole, around, choose_anew
from broker.allocation.nodes import market_nodes
from broker.allocation.occupancy import (
    Occupancy,
    Others,
    choice_of,
    copy_into,
    empty_occupancy,
    held_as,
    new_scratch,
    no_others,
    placing,
    seat,
    vacate,
    welfare_of,
    written_out,
)
from broker.allocation.responses import best_singles, improve, marginal_prices, priced_offers
from broker.allocation.uplift import drop_unfunded

# An incumbent stays while its regret is at most this share of its value: a move has costs that no
# bid states, and prices move by more than this from round to round.
KEEP_REGRET: Final = 0.02
# Jobs whose surplus is at least this share of their value choose first: the LP serves all of them.
_SURE: Final = 0.1
# How much a sweep counts what is left unused, from leaning on others to welfare itself. Each chain of
# sweeps begins where the responses ended: which of them gets furthest differs from market to market.
_CHAINS: Final = ((0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.0, 1.0), (0.5, 0.7, 0.9, 1.0, 1.0, 1.0))
# After neighbourhoods were placed anew.
_CHAIN_AGAIN = (_CHAINS[1],)
# Suitors regret at least this share of their best surplus's mean, so that no effort goes into crumbs.
_CRUMB: Final = 1e-7
# Neighbourhoods are sought around jobs that regret more than this share of the mean best surplus.
_REGRETFUL: Final = 1e-3
# Spans are looked for that regret at most this share of their job's largest value.
_SPAN_WIDTH: Final = 0.01
# The finish looks at columns that regret up to these shares of a mean value, then at all it must.
_FINISH_SHARES: Final = (0.002, 0.05, np.inf)


class Limits(NamedTuple):
    """Bounds of the effort, all counts, and `keep_regret`: an incumbent stays that regrets no more than this share.

    Without `crossing_nodes` no span is looked for beyond each job's best one.
    """

    keep_regret: float = KEEP_REGRET
    sweeps: int = 14
    crossing_nodes: int = 200
    neighbourhoods: int = 7
    neighbourhood_nodes: int = 1
    finish_jobs: int = 500
    finish_nodes: int = 4000
    finish_columns: int = 10_000
    # A node costs about as much as there are columns.
    finish_work: int = 50_000


class Effort(NamedTuple):
    """What the repair did, in counts."""

    kept: int
    crossing_columns: int
    crossing_nodes: int
    placed: int
    moved: int
    cells_changed: int
    exchanged: int
    exchange_columns: int
    exchange_nodes: int
    finish_columns: int
    finish_nodes: int

    @property
    def columns(self) -> int:
        """Columns of all mixed-integer programmes."""
        return self.crossing_columns + self.exchange_columns + self.finish_columns

    @property
    def nodes(self) -> int:
        """Nodes of all mixed-integer programmes."""
        return self.crossing_nodes + self.exchange_nodes + self.finish_nodes


class Rounded(NamedTuple):
    """Whole placements, their welfare in micro-credits per hour, and whether they are proved optimal to 1e-4.

    `seconds`, as the caller's `tick` counts them: prepare, keep, cross, respond, sweep, exchange, finish.
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
    layout: oracle.Layout | None = None,
    limits: Limits | None = None,
    tick: Callable[[], float] = lambda: 0.0,
) -> Rounded:
    """Place every job whole at published `prices` [rows], micro-credits per hour.

    `start` is a choice to begin with (what does not fit is left out); incumbents inside their term
    begin in their own place in any case. `best` are the oracle's columns at the same whole prices, where
    the caller has them already, as `layout` is.
    """
    limits = limits or Limits()
    marks = [tick()]
    search = _Search(instance, prices, best, start, limits, layout)
    marks.append(tick())
    kept = search.keep(start)
    marks.append(tick())
    crossing_columns, crossing_nodes = search.cross(limits.crossing_nodes)
    marks.append(tick())
    placed = search.respond()
    marks.append(tick())
    moved, cells = search.sweep(limits.sweeps)
    marks.append(tick())
    exchanged, exchange_columns, exchange_nodes = search.exchange(limits)
    if exchanged:
        again, cells_again = search.sweep(limits.sweeps, _CHAIN_AGAIN)
        moved, cells = moved + again, cells + cells_again
    marks.append(tick())
    optimal, finish_columns, finish_nodes = search.finish(limits)
    marks.append(tick())
    seconds = tuple(after - before for before, after in itertools.pairwise(marks))
    effort = Effort(
        kept,
        crossing_columns,
        crossing_nodes,
        placed,
        moved,
        cells,
        exchanged,
        exchange_columns,
        exchange_nodes,
        finish_columns,
        finish_nodes,
    )
    return Rounded(choice_of(search.state, search.others), welfare_of(instance, search.state), effort, optimal, seconds)


def drop_uplift(instance: Instance, prices: Int, rounded: Rounded, equity_micros: int) -> Rounded:
    """Drop and refill placements until market equity covers the uplift of all that remain.

    Optimality is no longer claimed once something was dropped.
    """
    choice = rounded.choice
    others = written_out(instance.job_count, joined(_bundles(instance), _held(instance, choice)))
    state = empty_occupancy(instance, prices)
    _seat(instance, others, state, choice)
    if not drop_unfunded(instance, prices, others, state, equity_micros):
        return rounded
    return rounded._replace(choice=choice_of(state, others), welfare=welfare_of(instance, state), optimal=False)


def _seat(instance: Instance, others: Others, state: Occupancy, choice: Choice) -> int:
    """Seat a choice, incumbents in their own place before all others; return how many sit."""
    own = _own(instance, choice)
    first = choice._replace(form=np.where(own, choice.form, NONE).astype(np.int8))
    scratch, parts = new_scratch(instance, others), placing(instance)
    return sum(
        int(seat(parts, others, state, *held_as(others, part), forced, scratch))
        for part, forced in ((first, own), (choice, np.zeros_like(own)))
    )


def _own(instance: Instance, choice: Choice) -> Flag:
    """Return which jobs are incumbents inside their term in their own place."""
    own: Flag = instance.jobs.must & (choice.form == BUNDLE) & (choice.item == instance.jobs.own)
    return own


def _held(instance: Instance, choice: Choice) -> Columns:
    """Return the columns of a choice that may be held, written out."""
    jobs = np.flatnonzero(choice.form != NONE)
    form, item, place = (part[jobs].astype(np.int32) for part in choice)
    return described(instance, Names(jobs.astype(np.int32), form, item, place)).columns


def _bundles(instance: Instance) -> Columns:
    """Return all bundles, written out."""
    start = instance.bundles.start
    job = np.repeat(np.arange(instance.job_count), np.diff(start)).astype(np.int32)
    item = np.arange(len(job), dtype=np.int32)
    return described(instance, Names(job, np.full_like(job, BUNDLE), item, np.zeros_like(job))).columns


class _Search:
    """The state of one repair."""

    def __init__(  # noqa: PLR0917 - what `whole` was given
        self,
        instance: Instance,
        prices: Int,
        best: oracle.Best | None,
        start: Choice | None,
        limits: Limits,
        layout: oracle.Layout | None,
    ) -> None:
        self.instance, self.keep_regret = instance, limits.keep_regret
        self.parts = placing(instance)
        self.prices = prices
        self.state = empty_occupancy(instance, prices)
        self.offers = priced_offers(instance, self.state.price)
        layout = oracle.prepare(instance) if layout is None else layout
        self.wish = oracle.best(instance, prices, layout=layout) if best is None else best
        self.best = self.wish.surplus.astype(np.float64)
        self.dual = oracle.dual_exact(instance, prices, self.wish)
        spans = (
            _near_spans(instance, self.state, layout, self.wish)
            if limits.crossing_nodes
            else _best_spans(instance, self.wish)
        )
        self.crossing = joined(_bundles(instance), spans)
        known = self.crossing if start is None else joined(self.crossing, _held(instance, start))
        self.others = written_out(instance.job_count, known)
        self.scratch = new_scratch(instance, self.others)

    def keep(self, start: Choice | None) -> int:
        instance = self.instance
        own = instance.jobs.own
        none = np.zeros(len(own), np.int32)
        inside = Choice(np.where(instance.jobs.must, BUNDLE, NONE).astype(np.int8), own, none)
        kept = _seat(instance, self.others, self.state, inside)
        if np.any(instance.jobs.must):
            order = np.flatnonzero(instance.jobs.must & (self.regret() > self.keep_regret * self.state.value))
            kept -= self._improve(order, 1.0)
        if start is not None:
            kept += _seat(instance, self.others, self.state, start)
        else:
            past = (own >= 0) & ~instance.jobs.must
            if np.any(past):
                worth = _bundle_surplus(instance, self.state.price)[np.maximum(own, 0)]
                near_best = (
                    past
                    & (worth >= 0)
                    & (self.best - worth <= self.keep_regret * instance.bundles.value[np.maximum(own, 0)])
                )
                again = Choice(np.where(near_best, BUNDLE, NONE).astype(np.int8), own, none)
                kept += _seat(instance, self.others, self.state, again)
        return kept

    def regret(self) -> Real:
        return self.best - self.state.surplus

    def restless(self) -> Real:
        """Return regrets, 0 for incumbents in their own place that regret no more than `keep_regret`."""
        regret = self.regret()
        own = _own(self.instance, choice_of(self.state, self.others))
        regret[own & (regret <= self.keep_regret * self.state.value)] = 0.0
        return regret

    def cross(self, nodes: int) -> tuple[int, int]:
        columns = self.crossing
        if not len(columns.job) or not nodes:
            return 0, 0
        single = np.zeros(self.instance.job_count)
        crossing = np.unique(columns.job).astype(np.int64)
        surplus = np.zeros(len(crossing))
        best_singles(self.parts, no_others(self.instance.job_count), self.state, self.offers, crossing, surplus)
        single[crossing] = surplus
        found = choose_crossing(self.instance, self.state, columns, single, nodes_max=nodes)
        _seat(self.instance, self.others, self.state, found.choice)
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
        price = self.state.price
        return improve(self.parts, self.others, self.state, self.order(), self.offers, price, 1.0, True, self.scratch)

    def _improve(self, order: Int, weight: float) -> int:
        prices = marginal_prices(self.instance.rows, self.state, weight)
        offers = priced_offers(self.instance, prices)
        return improve(self.parts, self.others, self.state, order, offers, prices, weight, False, self.scratch)

    def sweep(self, sweeps: int, chains: tuple[tuple[float, ...], ...] = _CHAINS) -> tuple[int, int]:
        instance, state = self.instance, self.state
        cells = cells_of(instance, state.price)
        moved = changed = 0
        desk = new_desk()
        crumb = _CRUMB * float(self.best.mean()) if len(self.best) else 0.0
        top = empty_occupancy(instance, self.prices)
        copy_into(top, state)
        top_welfare = welfare_of(instance, state)
        begin = empty_occupancy(instance, self.prices)
        copy_into(begin, state)
        settled = False
        for number, weight in [row for chain in chains for row in enumerate(chain)][:sweeps]:
            if number == 0:
                copy_into(state, begin)
                settled = False
            if settled:
                continue
            seated = seated_by_cell(instance, state, cells)
            suitors = suitors_by_cell(self.parts, state, cells, self.offers, self.restless(), crumb)
            order = np.flatnonzero(np.diff(suitors.start) + np.diff(seated.start))
            cells_changed = sweep(
                self.parts,
                self.others,
                state,
                cells,
                seated,
                suitors,
                order,
                self.offers,
                weight,
                self.scratch,
                desk,
            )
            changed += cells_changed
            regret = self.restless()
            regretful = np.flatnonzero(regret > crumb)
            regretful = regretful[np.lexsort((regretful, -regret[regretful]))]
            moved += self._improve(regretful, weight)
            welfare = welfare_of(instance, state)
            if welfare > top_welfare:
                top_welfare = welfare
                copy_into(top, state)
            elif weight == 1.0:
                # Nothing more to gain in this chain.
                settled = True
        copy_into(state, top)
        return moved, changed

    def exchange(self, limits: Limits) -> tuple[int, int, int]:
        """Place neighbourhoods anew, where most is regretted first; return how many gained, columns and nodes."""
        instance, state = self.instance, self.state
        gained = looked = nodes = 0
        tried = np.zeros(instance.job_count, np.bool_)
        least = _REGRETFUL * float(self.best.mean()) if len(self.best) else 0.0
        for number in range(limits.neighbourhoods):
            regret = np.where(tried, 0.0, self.restless())
            targets = np.flatnonzero(regret > least)
            if not len(targets):
                break
            targets = targets[np.lexsort((targets, -regret[targets]))]
            holds = choice_of(state, self.others)
            everyone = Whole(instance, self.others, state, holds, self.crossing, self.best)
            area = around(everyone, targets, NARROW if number else WIDE)
            if number:
                tried[area.targets] = True
            freed = np.flatnonzero(area.freed)
            held = _held(instance, holds._replace(form=np.where(area.freed, holds.form, NONE).astype(np.int8)))
            chosen, used = choose_anew(everyone, held, area, nodes_max=limits.neighbourhood_nodes)
            looked, nodes = looked + len(area.columns.job), nodes + used
            if chosen is not None:
                gained += self._reseat(freed, holds, chosen)
        return gained, looked, nodes

    def _reseat(self, freed: Int, before: Choice, after: Choice) -> bool:
        """Give freed jobs their new columns; where one does not fit or welfare does not gain, the old ones again."""
        instance, state = self.instance, self.state
        welfare = welfare_of(instance, state)
        none = np.zeros(instance.job_count, np.bool_)
        vacate(self.parts, self.others, state, freed, self.scratch)
        item, pool = held_as(self.others, after)
        seat(self.parts, self.others, state, item, pool, none, self.scratch)
        seated = np.array_equal(state.item, item)
        if seated and welfare_of(instance, state) > welfare:
            return True
        vacate(self.parts, self.others, state, freed, self.scratch)
        item, pool = held_as(self.others, before)
        seat(self.parts, self.others, state, item, pool, ~none, self.scratch)
        return False

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
            most = max(1, min(limits.finish_nodes, limits.finish_work // max(1, len(columns.job))))
            found = finish(instance, self.others, self.state, columns, self.dual, width, nodes_max=most)
            looked, nodes = looked + found.columns, nodes + found.nodes
            if found.choice is not None:
                self._adopt(found.choice)
            welfare = welfare_of(instance, self.state)
            if found.bound - welfare <= PROVED_GAP * abs(welfare):
                return True, looked, nodes
        return False, looked, nodes

    def _adopt(self, choice: Choice) -> None:
        """Take a whole choice over if it can be carried out and is worth more."""
        instance = self.instance
        others = written_out(instance.job_count, joined(self.crossing, _held(instance, choice)))
        fresh = empty_occupancy(instance, self.prices)
        seated = _seat(instance, others, fresh, choice)
        whole_choice = seated == int(np.count_nonzero(choice.form != NONE))
        if whole_choice and welfare_of(instance, fresh) > welfare_of(instance, self.state):
            self.state, self.others, self.scratch = fresh, others, new_scratch(instance, others)


def _bundle_surplus(instance: Instance, price: Real) -> Real:
    bundles = instance.bundles
    owner = np.repeat(np.arange(len(bundles.value)), np.diff(bundles.entry_start))
    paid = np.bincount(owner, price[bundles.entry_row] * bundles.entry_use, minlength=len(bundles.value))
    return np.asarray(bundles.value - paid, np.float64)


def _best_spans(instance: Instance, wish: oracle.Best) -> Columns:
    """Return each job's best column where it is a span, written out."""
    jobs = np.flatnonzero(wish.form == SPAN)
    names = (jobs, wish.form[jobs], wish.item[jobs], wish.place[jobs])
    return described(instance, Names(*(part.astype(np.int32) for part in names))).columns


def _near_spans(instance: Instance, state: Occupancy, layout: oracle.Layout, wish: oracle.Best) -> Columns:
    """Return spans near their job's best, written out."""
    # Only who is best off across sites competes for links; the others have a place to go, and are not searched.
    crossing = (wish.form == SPAN) | (wish.form == BUNDLE)
    owner = np.repeat(np.arange(instance.job_count), np.diff(instance.spans.start))
    kept = np.flatnonzero(crossing[owner])
    start = np.concatenate([[0], np.cumsum(np.bincount(owner[kept], minlength=instance.job_count))])
    spans = instance.spans._replace(
        **{name: getattr(instance.spans, name)[kept] for name in instance.spans._fields[1:]}, start=start
    )
    part = instance._replace(
        spans=spans, singles=instance.singles._replace(start=np.zeros_like(instance.singles.start))
    )
    form = np.where(crossing, wish.form, NONE).astype(np.int8)
    item = wish.item.copy()
    item[form == SPAN] = np.searchsorted(kept, item[form == SPAN])
    found = oracle.Best(form, item, wish.place.copy(), np.where(crossing, wish.surplus, 0.0))
    width = np.where(crossing, _SPAN_WIDTH * scale(instance), 0.0)
    columns = window(part, layout, market_nodes(instance, layout), state.price, width, found=found, hint=found)
    chosen = np.flatnonzero(columns.form == SPAN)
    names = (columns.job[chosen], columns.form[chosen], kept[columns.item[chosen]], columns.place[chosen])
    return described(instance, Names(*(part.astype(np.int32) for part in names))).columns
