"""The product's market in a replay: rounds cleared by the allocation's solver, standing prices between them.

A round takes those who wait and those whose term has ended; leases inside their term keep place and price.
Between rounds the last prices stand: an arrival takes the place that leaves it most at them where there is
room, and GPUs that come free go to the waiting job that they leave most per GPU. So a short job need not wait
for a round, and nobody is placed at a price that no round has published.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from broker.allocation.instance import BUNDLE, SINGLE, Choice
from broker.backtest.allocate import Allocator, plain
from broker.backtest.book import Book, Singled, instance_of
from broker.backtest.engine import NOWHERE, Place, Simulation, State
from broker.backtest.policies.rounds import RoundPolicy
from broker.backtest.workload import HALF, SAME, TWICE

Int = NDArray[np.int64]

# A price is locked for an hour.
TERM_S: Final = 3600.0
ROUND_S: Final = 600.0


class Market(RoundPolicy):
    """The product's own clearing: LP with prices, whole placements, terms, restarts in the objective."""

    name = "market"
    sentence = "the product's market: LP prices, whole placements, one-hour terms, elastic sizes"
    home_only = False
    elastic = True

    def __init__(self, allocator: Allocator | None = None, *, interval_s: float = ROUND_S) -> None:
        """Clear with `allocator`, at most every `interval_s`."""
        self._allocate = allocator or plain
        self.interval_s = interval_s
        self.price_series: list[tuple[float, list[int]]] = []
        self.books: list[tuple[float, Book]] = []
        # The first round at or after each of these moments is kept, for who studies single rounds.
        self.keep_at_s: list[float] = []
        self.welfare_sum = 0.0
        self.bound_sum = 0.0

    def open(self, simulation: Simulation) -> None:
        """Start at the asks."""
        super().open(simulation)
        workload, sites = simulation.workload, simulation.sites
        if not self.elastic:
            self.open_to[:, [HALF, TWICE]] = False
        self.prices: Int = sites.ask_micros.astype(np.int64)
        self._prices: list[int] = self.prices.tolist()
        self._last: Int | None = None
        self._term_end_s = [math.inf] * len(workload)
        self._next_end_s = math.inf
        self._waiting: dict[int, None] = {}
        self._fresh: list[int] = []
        self._freed: set[int] = set()

    def arrived(self, job: int) -> None:
        """Note who waits."""
        super().arrived(job)
        if job in self.alive:
            self._waiting[job] = None
            self._fresh.append(job)

    def ended(self, job: int, pool: int) -> None:
        """Note what came free."""
        super().ended(job, pool)
        self._waiting.pop(job, None)
        if pool != NOWHERE:
            self._freed.add(pool)

    def restless(self) -> bool:
        """Return whether some term has ended: its lease bids again."""
        return self._next_end_s <= self.simulation.now_s + 1e-6

    def wake_s(self) -> float:
        """Return when the next round is due: after a change or at the next end of a term."""
        if not self.alive:
            return math.inf
        return self._due_s if self._changed else max(self._due_s, self._next_end_s)

    def decide(self, now_s: float) -> None:
        """Hold a round if one is due, else serve at the standing prices."""
        before = self.rounds
        super().decide(now_s)
        if self.rounds == before:
            for job in self._fresh:
                if job in self._waiting:
                    self._serve(job)
            if self._waiting:
                for pool in sorted(self._freed):
                    self._refill(pool)
        self._fresh, self._freed = [], set()

    def round(self, now_s: float) -> None:
        """Clear the market of those who wait and those whose term has ended."""
        simulation = self.simulation
        book = self._book(now_s)
        if not len(book.job):
            return
        if self.keep_at_s and now_s >= self.keep_at_s[0]:
            self.keep_at_s = [moment for moment in self.keep_at_s if moment > now_s]
            self.books.append((now_s, self.whole_book()))
        singled = instance_of(
            book,
            simulation.workload,
            simulation.sites,
            self.open_to,
            simulation.costs,
            term_s=TERM_S,
            home_only=simulation.home_only,
        )
        cleared = self._allocate(singled.instance, self._last)
        self._last = cleared.prices
        self.welfare_sum += cleared.welfare
        self.bound_sum += cleared.bound
        self.prices = cleared.prices[: len(simulation.sites)]
        self._prices = self.prices.tolist()
        self.price_series.append((now_s, self._prices))
        self._apply(book, singled, cleared.choice)

    def _book(self, now_s: float) -> Book:
        """Return who takes part, and what is free for them."""
        simulation = self.simulation
        free = simulation.free.copy()
        jobs = []
        self._next_end_s = math.inf
        for job in self.alive:
            if simulation.state[job] == State.RUNNING:
                if self._term_end_s[job] > now_s + 1e-6:
                    self._next_end_s = min(self._next_end_s, self._term_end_s[job])
                    continue
                free[simulation.pool[job]] += simulation.gpus(job, simulation.option[job])
            jobs.append(job)
        return self._listed(sorted(jobs), free)

    def whole_book(self) -> Book:
        """Return everyone who is there as if all had to be placed anew: what a round of the whole market is."""
        simulation = self.simulation
        jobs = sorted(self.alive)
        return Book(
            job=np.array(jobs, dtype=np.int64),
            pool=np.full(len(jobs), NOWHERE, dtype=np.int32),
            option=np.full(len(jobs), NOWHERE, dtype=np.int32),
            left_s=np.array([simulation.progress_left_s(job) for job in jobs]),
            paused=np.zeros(len(jobs), dtype=bool),
            free=simulation.sites.capacity.copy(),
        )

    def _listed(self, jobs: list[int], free: list[int]) -> Book:
        simulation = self.simulation
        running = [simulation.state[job] == State.RUNNING for job in jobs]
        return Book(
            job=np.array(jobs, dtype=np.int64),
            pool=np.array([simulation.pool[job] for job in jobs], dtype=np.int32),
            option=np.array(
                [simulation.option[job] if on else NOWHERE for job, on in zip(jobs, running, strict=True)],
                dtype=np.int32,
            ),
            left_s=np.array([simulation.progress_left_s(job) for job in jobs]),
            paused=np.array(
                [
                    not on and not math.isnan(simulation.totals.first_start_s[job])
                    for job, on in zip(jobs, running, strict=True)
                ],
                dtype=bool,
            ),
            free=np.array(free, dtype=np.int64),
        )

    def _apply(self, book: Book, singled: Singled, choice: Choice) -> None:
        simulation, prices = self.simulation, self._prices
        form, item, place = choice
        places: dict[int, Place | None] = {}
        for at, job in enumerate(book.job.tolist()):
            if form[at] == BUNDLE:
                pool = simulation.pool[job]
                places[job] = Place(pool, simulation.option[job], float(prices[pool]))
            elif form[at] == SINGLE:
                pool = int(place[at])
                places[job] = Place(pool, int(singled.option[item[at]]), float(prices[pool]))
            else:
                places[job] = None
        simulation.rearrange(places)
        for job, where in places.items():
            if where is None:
                self._waiting[job] = None
            else:
                self._lease(job)

    def _lease(self, job: int) -> None:
        self._waiting.pop(job, None)
        self._term_end_s[job] = self.simulation.now_s + TERM_S
        self._next_end_s = min(self._next_end_s, self._term_end_s[job])

    def _serve(self, job: int) -> None:
        """Give an arrival the place that leaves it most at the standing prices, if any has room."""
        simulation, prices = self.simulation, self._prices
        free, kind, home = simulation.free, simulation.kind, simulation.home[job]
        best: tuple[float, int, int] | None = None
        for option in (SAME, HALF, TWICE) if self.elastic else (SAME,):
            gpus = simulation.gpus(job, option)
            if gpus == 0:
                continue
            for pool in (home,) if simulation.home_only else range(len(kind)):
                if free[pool] < gpus:
                    continue
                rate = simulation.rate(job, option, pool)
                if rate <= 0:
                    continue
                run_s = min(TERM_S, simulation.left_s[job] / rate)
                useful = run_s / (run_s + simulation.overhead_s(job, pool))
                surplus = simulation.value(job, option, pool) * useful - prices[pool] * gpus
                if surplus >= 0 and (best is None or surplus > best[0]):
                    best = (surplus, pool, option)
        if best is not None:
            simulation.start(job, best[1], best[2], float(prices[best[1]]))
            self._lease(job)

    def _refill(self, pool: int) -> None:
        """Give GPUs that came free to who gains most per GPU in its best size at the standing price."""
        simulation, price = self.simulation, self._prices[pool]
        free = simulation.free[pool]
        if free <= 0:
            return
        workload, kind = simulation.workload, simulation.kind[pool]
        jobs = np.fromiter(self._waiting, dtype=np.int64)
        counts = workload.counts[jobs]
        surplus = workload.value[jobs, :, kind] - price * counts
        possible = self.open_to[jobs, :, pool] & (surplus >= 0) & (counts <= free)
        surplus = np.where(possible, surplus, -1)
        option = surplus.argmax(axis=1)
        everyone = np.arange(len(jobs))
        per_gpu = surplus[everyone, option] / np.maximum(1, counts[everyone, option])
        for place in np.lexsort((jobs, -per_gpu)).tolist():
            if per_gpu[place] < 0 or simulation.free[pool] <= 0:
                return
            job, chosen = int(jobs[place]), int(option[place])
            if counts[place, chosen] <= simulation.free[pool]:
                simulation.start(job, pool, chosen, float(price))
                self._lease(job)


class MarketRigid(Market):
    """The same with jobs of fixed size: what prices alone bring."""

    name = "market-rigid"
    sentence = "the product's market with jobs of fixed size"
    elastic = False


class MarketAlone(Market):
    """The same at each site by itself: what the market brings without a federation."""

    name = "market-alone"
    sentence = "the product's market at each site by itself, nobody leaves home"
    home_only = True
