"""The simulator: jobs arrive, start, move, finish or withdraw at sites through months of simulated time.

It knows nothing of schedulers: a `Policy` is told of what happened at an instant and starts, moves and stops
jobs through `Simulation`, which checks capacity, keeps the clock of every job's progress and accounts for value,
cost and money. No randomness and no wall clock: the same workload and policy give the same run.
"""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, NamedTuple

import numpy as np

from broker.backtest.sites import Federation
from broker.backtest.workload import SAME, Int, Real, Workload

SECONDS_PER_HOUR: Final = 3600.0
# A lane between two instants closer than this is one instant: floats of months in seconds resolve far less.
INSTANT_S: Final = 1e-6
NOWHERE: Final = -1


class State(IntEnum):
    """What a job is doing."""

    AHEAD = 0
    WAITING = 1
    RUNNING = 2
    FINISHED = 3
    WITHDRAWN = 4


class Kind(IntEnum):
    """Events of the simulator, in the order in which those of one instant are handled."""

    FINISH = 0
    WITHDRAW = 1
    WAKE = 2


@dataclass(frozen=True, slots=True)
class Costs:
    """What starting costs in time; the GPUs are held and paid meanwhile.

    restart_s   writing and reading a checkpoint when a job that has run goes on elsewhere, in another
                size or after a pause (Sia measured 25 to 250 s)
    staging_s   bringing data and environment to a site that is not the job's home, each time it starts there
    """

    restart_s: float = 120.0
    staging_s: float = 60.0


class Policy(ABC):
    """Who decides. Hooks are called with the simulation's clock at the event; `decide` after all of an instant."""

    name: str = ""
    sentence: str = ""

    def open(self, simulation: Simulation) -> None:
        """Start a run."""
        self.simulation = simulation

    @abstractmethod
    def arrived(self, job: int) -> None:
        """Learn of an arrival."""

    @abstractmethod
    def ended(self, job: int, pool: int) -> None:
        """Learn that a job finished or withdrew; `pool` is where it ran, -1 if it waited."""

    @abstractmethod
    def decide(self, now_s: float) -> None:
        """Start, move and stop jobs."""

    def wake_s(self) -> float:
        """Return when to decide next if nothing happens before; inf: when something happens."""
        return math.inf


@dataclass(slots=True)
class Totals:
    """Sums of a run in float micro-credits and GPU-seconds, by job and by site."""

    value: list[float]
    cost: list[float]
    charge: list[float]
    first_start_s: list[float]
    end_s: list[float]
    busy_s: list[float]
    away_gpu_s: float = 0.0
    restart_gpu_s: float = 0.0
    revenue: list[float] = field(default_factory=list)
    site_cost: list[float] = field(default_factory=list)
    site_gpu_s: list[float] = field(default_factory=list)
    uplift: float = 0.0
    arrivals: int = 0
    starts: int = 0
    moves: int = 0
    preemptions: int = 0
    finishes: int = 0
    withdrawals: int = 0

    @property
    def events(self) -> int:
        """Job events: arrivals, starts, moves, preemptions, finishes and withdrawals."""
        return self.arrivals + self.starts + self.moves + self.preemptions + self.finishes + self.withdrawals


class Place(NamedTuple):
    """Where a job shall run: pool, option, and what a GPU-hour costs it (the ask unless given)."""

    pool: int
    option: int
    price_micros: float | None = None


Progress = Callable[[float, int], None]


class Simulation:
    """State of a run. Lists rather than arrays: single elements are read and written millions of times."""

    def __init__(
        self,
        workload: Workload,
        sites: Federation,
        policy: Policy,
        costs: Costs | None = None,
        *,
        home_only: bool = False,
    ) -> None:
        """Set the scene; `home_only` keeps every job at its own site, whatever the policy."""
        count = len(workload)
        self.workload, self.sites, self.policy = workload, sites, policy
        self.costs = costs or Costs()
        self.home_only = home_only
        self.now_s = 0.0
        self.capacity: list[int] = sites.capacity.tolist()
        self.free: list[int] = sites.capacity.tolist()
        self.ask: list[int] = sites.ask_micros.tolist()
        self.kind: list[int] = sites.kind.tolist()
        self.home: list[int] = workload.home.tolist()
        self.arrival_s: list[float] = workload.arrival_s.tolist()
        self.deadline_s: list[float] = workload.deadline_s.tolist()
        self.state: list[int] = [State.AHEAD] * count
        self.pool: list[int] = [NOWHERE] * count
        self.option: list[int] = [SAME] * count
        self.price: list[float] = [0.0] * count
        self.left_s: list[float] = workload.work_s.tolist()
        self.finish_s: list[float] = [math.inf] * count
        self.running: list[dict[int, None]] = [{} for _ in range(len(sites))]
        self.totals = Totals(
            [0.0] * count,
            [0.0] * count,
            [0.0] * count,
            [math.nan] * count,
            [math.nan] * count,
            [0.0] * count,
            revenue=[0.0] * len(sites),
            site_cost=[0.0] * len(sites),
            site_gpu_s=[0.0] * len(sites),
        )
        self._counts: list[list[int]] = workload.counts.tolist()
        self._rate: list[list[list[float]]] = workload.rate.tolist()
        self._value: list[list[list[int]]] = workload.value.tolist()
        self._since_s: list[float] = [0.0] * count
        self._begins_s: list[float] = [0.0] * count
        self._start_of: list[int] = [0] * count
        self._ran: list[bool] = [False] * count
        self._events: list[tuple[float, int, int, int]] = []
        self._wake_s = math.inf
        # GPU-seconds by site up to the last arrival.
        self.used_while_arriving: list[float] | None = None

    # What policies read

    def gpus(self, job: int, option: int = SAME) -> int:
        """Return the GPUs of a job's option, 0 where it has none."""
        return self._counts[job][option]

    def rate(self, job: int, option: int, pool: int) -> float:
        """Return reference seconds of work per second; 0 where the job may not or cannot run."""
        if self.home_only and pool != self.home[job]:
            return 0.0
        return self._rate[job][option][self.kind[pool]]

    def value(self, job: int, option: int, pool: int) -> int:
        """Return micro-credits per hour of progress."""
        return self._value[job][option][self.kind[pool]]

    def worth_its_ask(self, job: int, option: int, pool: int) -> bool:
        """Return whether a job may run there and its value covers the site's ask."""
        gpus = self._counts[job][option]
        return (
            0 < gpus <= self.capacity[pool]
            and self.rate(job, option, pool) > 0
            and self.value(job, option, pool) >= self.ask[pool] * gpus
        )

    def overhead_s(self, job: int, pool: int) -> float:
        """Return the seconds before a job progresses if it were put there now."""
        staging = self.costs.staging_s if pool != self.home[job] else 0.0
        return staging + (self.costs.restart_s if self._ran[job] else 0.0)

    def progress_left_s(self, job: int) -> float:
        """Return a job's reference seconds of work left now."""
        if self.state[job] != State.RUNNING:
            return self.left_s[job]
        done = max(0.0, self.now_s - max(self._begins_s[job], self._since_s[job]))
        return max(0.0, self.left_s[job] - done * self.rate(job, self.option[job], self.pool[job]))

    # What policies do

    def start(self, job: int, pool: int, option: int = SAME, price_micros: float | None = None) -> None:
        """Start or resume a waiting job; the price per GPU-hour is the site's ask unless given."""
        assert self.state[job] == State.WAITING
        self.totals.starts += 1
        self._place(job, pool, option, price_micros)

    def rearrange(self, places: Mapping[int, Place | None]) -> None:
        """Put jobs where a round wants them, all at one instant: start, move, resize, or (None) pause.

        Capacity may come from what other jobs of the same rearrangement leave. A running job that is
        named with the place that it has stays as it is; its price may change.
        """
        staying = set()
        leaving = []
        for job, place in places.items():
            if self.state[job] != State.RUNNING:
                continue
            if place is not None and (place.pool, place.option) == (self.pool[job], self.option[job]):
                staying.add(job)
                if place.price_micros is not None:
                    self.reprice(job, place.price_micros)
            else:
                leaving.append(job)
        for job in leaving:
            self._settle(job)
            self._leave(job)
        for job, place in places.items():
            if job in staying:
                continue
            moved = self.state[job] == State.RUNNING
            if place is not None:
                self.totals.moves += moved
                self.totals.starts += not moved
                self._place(job, place.pool, place.option, place.price_micros)
            elif moved:
                self.state[job] = State.WAITING
                self.totals.preemptions += 1

    def reprice(self, job: int, price_micros: float) -> None:
        """Let a running job pay another price from now on."""
        if price_micros != self.price[job]:
            self._settle(job)
            self.price[job] = price_micros

    # The clock

    def run(self, progress: Progress | None = None, *, every: int = 2000) -> Totals:
        """Run until every job has finished or withdrawn, or nothing more can happen; return the sums.

        `progress` is called with the clock and the job events so far, about each `every` events.
        """
        workload, events = self.workload, self._events
        arrivals = workload.arrival_s.tolist()
        following, count, told = 0, len(workload), 0
        self.policy.open(self)
        while following < count or events:
            at = min(arrivals[following] if following < count else math.inf, events[0][0] if events else math.inf)
            self.now_s = at
            until = at + INSTANT_S
            while events and events[0][0] <= until:
                _, kind, job, number = heapq.heappop(events)
                self._happened(kind, job, number)
            while following < count and arrivals[following] <= until:
                self._arrive(following)
                following += 1
            self.policy.decide(at)
            self._sleep()
            if following == count and self.used_while_arriving is None:
                self.used_while_arriving = self._used()
            if progress is not None and self.totals.events - told >= every:
                told = self.totals.events
                progress(self.now_s, told)
        if progress is not None:
            progress(self.now_s, self.totals.events)
        return self.totals

    def _used(self) -> list[float]:
        used = self.totals.site_gpu_s.copy()
        for pool, jobs in enumerate(self.running):
            for job in jobs:
                used[pool] += self._counts[job][self.option[job]] * (self.now_s - self._since_s[job])
        return used

    def _sleep(self) -> None:
        wake = self.policy.wake_s()
        if wake < self._wake_s:
            self._wake_s = max(wake, self.now_s + INSTANT_S * 2)
            heapq.heappush(self._events, (self._wake_s, Kind.WAKE, 0, 0))

    def _happened(self, kind: int, job: int, number: int) -> None:
        if kind == Kind.WAKE:
            self._wake_s = math.inf
        elif kind == Kind.FINISH:
            # A job that moved since has a later start; that event is void.
            if self.state[job] == State.RUNNING and self._start_of[job] == number:
                self._end(job, State.FINISHED)
        elif self.state[job] in {State.WAITING, State.RUNNING}:
            self._end(job, State.WITHDRAWN)

    def _arrive(self, job: int) -> None:
        self.state[job] = State.WAITING
        self.totals.arrivals += 1
        if math.isfinite(self.deadline_s[job]):
            heapq.heappush(self._events, (self.deadline_s[job], Kind.WITHDRAW, job, 0))
        self.policy.arrived(job)

    def _end(self, job: int, state: State) -> None:
        pool = self.pool[job]
        if pool != NOWHERE:
            self._settle(job)
            self._leave(job)
        self.state[job] = state
        self.totals.end_s[job] = self.now_s
        if state is State.FINISHED:
            self.left_s[job] = 0.0
            self.totals.finishes += 1
        else:
            self.totals.withdrawals += 1
        self.policy.ended(job, pool)

    def _place(self, job: int, pool: int, option: int, price_micros: float | None) -> None:
        gpus = self._counts[job][option]
        rate = self.rate(job, option, pool)
        assert gpus > 0 and rate > 0, "a job was put where it cannot run"  # noqa: PT018  one thought
        assert self.free[pool] >= gpus, "a pool was given more than it has"
        overhead = self.overhead_s(job, pool)
        self.free[pool] -= gpus
        self.running[pool][job] = None
        self.state[job], self.pool[job], self.option[job] = State.RUNNING, pool, option
        self.price[job] = float(self.ask[pool]) if price_micros is None else price_micros
        self._since_s[job] = self.now_s
        self._begins_s[job] = self.now_s + overhead
        self._start_of[job] += 1
        if not self._ran[job]:
            self._ran[job] = True
            self.totals.first_start_s[job] = self.now_s
        self.totals.restart_gpu_s += overhead * gpus
        self.finish_s[job] = self._begins_s[job] + self.left_s[job] / rate
        heapq.heappush(self._events, (self.finish_s[job], Kind.FINISH, job, self._start_of[job]))

    def _leave(self, job: int) -> None:
        pool = self.pool[job]
        self.free[pool] += self._counts[job][self.option[job]]
        del self.running[pool][job]
        self.pool[job], self.finish_s[job] = NOWHERE, math.inf

    def _settle(self, job: int) -> None:
        """Book what a running job did and used since it was last booked."""
        now, since, pool, option = self.now_s, self._since_s[job], self.pool[job], self.option[job]
        if now <= since:
            return
        gpus, totals = self._counts[job][option], self.totals
        rate = self._rate[job][option][self.kind[pool]]
        done = min(self.left_s[job], max(0.0, now - max(self._begins_s[job], since)) * rate)
        hours = (now - since) / SECONDS_PER_HOUR
        value_rate = self._value[job][option][self.kind[pool]]
        self.left_s[job] -= done
        totals.value[job] += done / rate / SECONDS_PER_HOUR * value_rate
        cost = self.ask[pool] * gpus * hours
        revenue = self.price[job] * gpus * hours
        # No buyer pays more than its bid; what the site's price is above it, the market adds.
        charge = min(revenue, value_rate * hours)
        totals.cost[job] += cost
        totals.charge[job] += charge
        totals.uplift += revenue - charge
        totals.revenue[pool] += revenue
        totals.site_cost[pool] += cost
        totals.site_gpu_s[pool] += gpus * (now - since)
        totals.busy_s[job] += now - since
        if pool != self.home[job]:
            totals.away_gpu_s += gpus * (now - since)
        self._since_s[job] = now


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run, by job and by site. Money in credits, rates per hour."""

    policy: str
    welfare: Real
    value: Real
    cost: Real
    charge: Real
    completion_s: Real
    waiting_s: Real
    finished: Int
    site_rent: Real
    site_surplus: Real
    utilisation: Real
    away_share: float
    restart_share: float
    uplift_share: float
    makespan_s: float
    counters: dict[str, int]
    events: int


def summary(simulation: Simulation) -> Run:
    """Return what a finished simulation amounts to."""
    totals, workload, sites = simulation.totals, simulation.workload, simulation.sites
    micros = 1e6
    value, cost, charge = (np.array(row) / micros for row in (totals.value, totals.cost, totals.charge))
    end = np.array(totals.end_s)
    finished = (np.array(simulation.state) == State.FINISHED).astype(np.int64)
    used = np.array(totals.site_gpu_s)
    # Utilisation over the time in which jobs arrive: the tail that drains afterwards says nothing.
    arriving = np.array(simulation.used_while_arriving)
    window = max(1.0, float(workload.arrival_s[-1] - workload.arrival_s[0]))
    revenue = np.array(totals.revenue) / micros
    return Run(
        policy=simulation.policy.name,
        welfare=value - cost,
        value=value,
        cost=cost,
        charge=charge,
        completion_s=np.where(finished == 1, end - workload.arrival_s, np.nan),
        waiting_s=np.where(finished == 1, end - workload.arrival_s - np.array(totals.busy_s), np.nan),
        finished=finished,
        site_rent=revenue - np.array(totals.site_cost) / micros,
        site_surplus=np.bincount(workload.home, weights=value - charge, minlength=len(sites)).astype(np.float64),
        utilisation=arriving / (sites.capacity * window),
        away_share=totals.away_gpu_s / max(1.0, float(used.sum())),
        restart_share=totals.restart_gpu_s / max(1.0, float(used.sum())),
        uplift_share=totals.uplift / max(1.0, float(sum(totals.revenue))),
        makespan_s=float(np.nanmax(end) - workload.arrival_s[0]) if np.isfinite(end).any() else 0.0,
        counters={
            name: getattr(totals, name)
            for name in ("arrivals", "starts", "moves", "preemptions", "finishes", "withdrawals")
        },
        events=totals.events,
    )
