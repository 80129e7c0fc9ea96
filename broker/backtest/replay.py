"""One backtest from settings to results: runs the policies one after the other and draws the conclusions."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from broker.backtest.allocate import Allocator, plain, product
from broker.backtest.bids import BidRule, draw_bids
from broker.backtest.book import instance_of
from broker.backtest.coalition import Game, play
from broker.backtest.engine import Costs, Policy, Run, Simulation, summary
from broker.backtest.misreport import Temptation, buyers
from broker.backtest.misreport import sites as sellers
from broker.backtest.policies import POLICIES
from broker.backtest.policies.market import TERM_S, Market
from broker.backtest.sites import Federation
from broker.backtest.throughput import Throughput
from broker.backtest.trace import Trace
from broker.backtest.value import Interval, SiteGain, ratio_interval, site_gains, weekly_welfare
from broker.backtest.workload import Workload, build

Real = NDArray[np.float64]

# A run's own stage, and how much of it is done, from 0 to 1.
Progress = Callable[[str, float], None]
Stopwatch = Callable[[], float]

FEDERATED: Final = "market"
ALONE: Final = ("market-alone", "alone")


class Solver(StrEnum):
    """What clears the market's rounds."""

    PRODUCT = "product"
    REFERENCE = "reference"


@dataclass(frozen=True, slots=True)
class Settings:
    """What a backtest compares and how; the defaults are the command's.

    patience      a job withdraws an hour plus this many of its traced durations after its arrival; None: never
    bid_draws     how many draws of bids the welfare interval is over (seed, seed + 1, ...)
    moments       rounds at which the game between sites is played and misreports are tried
    agents        buyers tried at each moment; sites are tried all
    """

    policies: tuple[str, ...] = ("alone", "fcfs", "cheapest", "race", "gavel", "sia", "market-alone", "market")
    bids: BidRule = BidRule.LOGNORMAL
    seed: int = 0
    bid_draws: int = 1
    patience: float | None = 2.0
    round_s: float = 600.0
    moments: int = 12
    agents: int = 12
    block_weeks: int = 2
    costs: Costs = field(default_factory=Costs)
    solver: Solver = Solver.PRODUCT


@dataclass(frozen=True, slots=True)
class PolicyRun:
    """A policy's run, how long it took, and for a market its rounds and prices."""

    run: Run
    sentence: str
    wall_s: float
    cpu_s: float
    rounds: int
    interval_s: float
    price_series: list[tuple[float, list[int]]]
    bound_gap: float

    @property
    def events_per_minute(self) -> float:
        """Job events per minute of wall time."""
        return self.run.events / max(self.wall_s, 1e-9) * 60


@dataclass(frozen=True, slots=True)
class Results:
    """All that the report shows."""

    trace: Trace
    sites: Federation
    table: str
    settings: Settings
    solver: str
    workload: Workload
    runs: list[PolicyRun]
    ratios: dict[str, Interval]
    weekly: dict[str, Real]
    gains: dict[str, list[SiteGain]]
    games: list[Game]
    temptations: list[Temptation]
    omitted_jobs: int

    def run(self, name: str) -> PolicyRun | None:
        """Return a policy's run, None where it was not asked for."""
        return next((each for each in self.runs if each.run.policy == name), None)


def replay(
    trace: Trace,
    sites: Federation,
    table: Throughput,
    settings: Settings,
    *,
    start: dt.datetime | None = None,
    end: dt.datetime | None = None,
    progress: Progress = lambda _stage, _done: None,
    stopwatch: Stopwatch = time.perf_counter,
) -> Results:
    """Run a backtest. Capacities in `sites` come from the whole trace, arrivals from `start` up to `end`."""
    allocate, solver = _solver(settings.solver)
    chosen = trace.between(start, end)
    workload, listed = build(chosen, sites, table, bids=settings.bids, seed=settings.seed, patience=settings.patience)
    moments = np.linspace(0, 1, settings.moments + 2)[1:-1] * float(workload.arrival_s[-1] - workload.arrival_s[0])
    runs, weekly = [], {}
    books = []
    for name in settings.policies:
        policy = _policy(name, allocate, settings)
        if name == FEDERATED and isinstance(policy, Market):
            policy.keep_at_s = (moments + float(workload.arrival_s[0])).tolist()
        runs.append(_run(name, policy, workload, sites, settings, progress=progress, stopwatch=stopwatch))
        weekly[name] = weekly_welfare(runs[-1].run, workload)
        if name == FEDERATED and isinstance(policy, Market):
            books = policy.books
            open_to = policy.open_to
    ratios = _ratios(
        listed,
        workload,
        sites,
        settings,
        allocate=allocate,
        weekly=weekly,
        progress=progress,
        stopwatch=stopwatch,
    )
    gains = {
        reference: site_gains(ours.run, theirs.run, workload, sites.names)
        for reference in ALONE
        for ours, theirs in [(_named(runs, FEDERATED), _named(runs, reference))]
        if ours is not None and theirs is not None
    }
    games: list[Game] = []
    temptations: list[Temptation] = []
    for number, (time_s, book) in enumerate(books):
        if not len(book.job):
            continue
        progress("coalitions and misreports", number / len(books))
        instance = instance_of(book, workload, sites, open_to, settings.costs, term_s=TERM_S, home_only=False).instance
        cleared = allocate(instance, None)
        games.append(play(time_s, instance, cleared, settings.seed))
        if settings.agents:
            generator = np.random.Generator(np.random.PCG64([settings.seed, 4, number]))
            some = generator.permutation(instance.job_count)[: settings.agents].tolist()
            temptations += buyers(instance, cleared, allocate, sorted(some))
            temptations += sellers(instance, cleared, allocate, tenants=True)
    if books:
        progress("coalitions and misreports", 1.0)
    return Results(
        chosen,
        sites,
        table.name,
        settings,
        solver,
        workload,
        runs,
        ratios,
        weekly,
        gains,
        games,
        temptations,
        len(chosen) - len(listed),
    )


def _solver(solver: Solver) -> tuple[Allocator, str]:
    if solver is Solver.PRODUCT:
        return product(), "the product's solver (broker.allocation.solver)"
    return plain, "a reference LP with whole placements by best response (broker.backtest.allocate.plain)"


def _policy(name: str, allocate: Allocator, settings: Settings) -> Policy:
    kind = POLICIES[name]
    if issubclass(kind, Market):
        return kind(allocate, interval_s=settings.round_s)
    return kind()


def _run(
    name: str,
    policy: Policy,
    workload: Workload,
    sites: Federation,
    settings: Settings,
    *,
    progress: Progress,
    stopwatch: Stopwatch,
) -> PolicyRun:
    last_s = max(1.0, float(workload.arrival_s[-1]))
    first_s = float(workload.arrival_s[0])
    simulation = Simulation(workload, sites, policy, settings.costs, home_only=getattr(policy, "home_only", False))
    started, cpu_started = stopwatch(), time.process_time()
    simulation.run(lambda now, _events: progress(name, min(1.0, (now - first_s) / max(1.0, last_s - first_s))))
    wall_s, cpu_s = stopwatch() - started, time.process_time() - cpu_started
    market = policy if isinstance(policy, Market) else None
    return PolicyRun(
        run=summary(simulation),
        sentence=policy.sentence,
        wall_s=wall_s,
        cpu_s=cpu_s,
        rounds=getattr(policy, "rounds", 0),
        interval_s=getattr(policy, "interval_s", 0.0),
        price_series=market.price_series if market else [],
        bound_gap=(market.bound_sum - market.welfare_sum) / market.bound_sum if market and market.bound_sum else 0.0,
    )


def _ratios(
    listed: Trace,
    workload: Workload,
    sites: Federation,
    settings: Settings,
    *,
    allocate: Allocator,
    weekly: dict[str, Real],
    progress: Progress,
    stopwatch: Stopwatch,
) -> dict[str, Interval]:
    """Return welfare of the market over each way of standing alone, over weeks and draws of bids."""
    pairs = [reference for reference in ALONE if reference in weekly and FEDERATED in weekly]
    series = {name: [weekly[name]] for name in (FEDERATED, *pairs) if name in weekly}
    for draw in range(1, settings.bid_draws if pairs else 1):
        bids = draw_bids(listed, sites.ask_micros[workload.home], settings.bids, settings.seed + draw)
        other = workload.with_bids(bids)
        for name, found in series.items():
            run = _run(
                name,
                _policy(name, allocate, settings),
                other,
                sites,
                settings,
                progress=lambda stage, done, draw=draw: progress(f"{stage}, bids {draw + 1}", done),  # type: ignore[misc]  # the default binds the loop's value
                stopwatch=stopwatch,
            )
            found.append(weekly_welfare(run.run, other))
    return {
        reference: ratio_interval(
            series[FEDERATED], series[reference], block_weeks=settings.block_weeks, seed=settings.seed
        )
        for reference in pairs
    }


def _named(runs: Sequence[PolicyRun], name: str) -> PolicyRun | None:
    return next((each for each in runs if each.run.policy == name), None)
