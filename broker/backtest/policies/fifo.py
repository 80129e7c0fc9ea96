"""First come, first served with backfill: each site by itself, or over the federation.

EASY backfill (Lifka 1995, "The ANL/IBM SP scheduling system"): the head of the queue gets the earliest
reservation that running jobs allow; a later job may start before it if that does not delay it. Taken: one
reservation, for the head. Not taken: users' estimates of run times (the simulator's own are used, so backfill
is never wrong: better than any real system) and fair-share between users.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from broker.backtest.engine import NOWHERE, Policy, Simulation
from broker.backtest.workload import SAME

# Jobs past the head that are tried; Slurm's own default (bf_max_job_test) is 500.
BACKFILL_DEPTH: Final = 200


class _Queue:
    """One queue over some pools."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._jobs: dict[int, tuple[int, ...]] = {}
        self._fresh: list[int] = []
        self._freed = False
        # The head's reservation as of the last full pass: pool, when, and GPUs left over then.
        self._reserved: tuple[int, float, int] | None = None

    def arrived(self, job: int, pools: tuple[int, ...]) -> None:
        self._jobs[job] = pools
        self._fresh.append(job)

    def ended(self, job: int) -> None:
        self._jobs.pop(job, None)
        self._freed = True

    def serve(self) -> None:
        """Start what can be started."""
        if self._freed or self._reserved is None:
            self._pass(list(self._jobs))
        else:
            # Nothing was freed: only arrivals can start, in front of nobody's reservation.
            self._backfill([job for job in self._fresh if job in self._jobs])
        self._fresh, self._freed = [], False

    def _pass(self, order: list[int]) -> None:
        self._reserved = None
        for place, job in enumerate(order):
            pool = self._open_pool(job, self._jobs[job])
            if pool == NOWHERE:
                self._reserved = self._reservation(job, self._jobs[job])
                self._backfill(order[place + 1 : place + 1 + BACKFILL_DEPTH])
                return
            self._start(job, pool)

    def _open_pool(self, job: int, pools: Sequence[int]) -> int:
        simulation = self._simulation
        gpus = simulation.gpus(job)
        return next((pool for pool in pools if simulation.free[pool] >= gpus), NOWHERE)

    def _reservation(self, job: int, pools: Sequence[int]) -> tuple[int, float, int]:
        """Return the pool where the head can start earliest, when, and what is free beside it then."""
        simulation = self._simulation
        gpus, best = simulation.gpus(job), None
        for pool in pools:
            free = simulation.free[pool]
            ends = sorted((simulation.finish_s[other], other) for other in simulation.running[pool])
            for finish, other in ends:
                free += simulation.gpus(other, simulation.option[other])
                if free >= gpus:
                    if best is None or finish < best[1]:
                        best = (pool, finish, free - gpus)
                    break
        assert best is not None, "a pool drained of all jobs holds any job that it accepts"
        return best

    def _backfill(self, order: Sequence[int]) -> None:
        assert self._reserved is not None
        simulation = self._simulation
        held, shadow_s, extra = self._reserved
        for job in order:
            if not any(simulation.free):
                break
            gpus = simulation.gpus(job)
            for pool in self._jobs[job]:
                if simulation.free[pool] < gpus:
                    continue
                if pool == held:
                    work_s = simulation.left_s[job] / simulation.rate(job, SAME, pool)
                    if simulation.now_s + simulation.overhead_s(job, pool) + work_s > shadow_s:
                        if gpus > extra:
                            continue
                        extra -= gpus
                self._start(job, pool)
                break
        self._reserved = (held, shadow_s, extra)

    def _start(self, job: int, pool: int) -> None:
        del self._jobs[job]
        self._simulation.start(job, pool)


class Alone(Policy):
    """Each site by itself, first come first served with backfill."""

    name = "alone"
    sentence = "each site runs its own jobs, first come first served with EASY backfill"

    def open(self, simulation: Simulation) -> None:
        """Open one queue for each site."""
        super().open(simulation)
        self._queues = [_Queue(simulation) for _ in range(len(simulation.sites))]
        self._touched: set[int] = set()

    def arrived(self, job: int) -> None:
        """Queue a job at home, unless its bid is below the ask there."""
        home = self.simulation.home[job]
        if self.simulation.worth_its_ask(job, SAME, home):
            self._queues[home].arrived(job, (home,))
            self._touched.add(home)

    def ended(self, job: int, _pool: int) -> None:
        """Let the site look again."""
        home = self.simulation.home[job]
        self._queues[home].ended(job)
        self._touched.add(home)

    def decide(self, _now_s: float) -> None:
        """Serve the queues in which something happened."""
        for home in sorted(self._touched):
            self._queues[home].serve()
        self._touched.clear()


class FirstCome(Policy):
    """One queue over the federation."""

    name = "fcfs"
    sentence = (
        "one queue over all sites, first come first served with EASY backfill; a job goes home where that has "
        "room, else to the fastest site that has"
    )

    def open(self, simulation: Simulation) -> None:
        """Open the queue."""
        super().open(simulation)
        self._queue = _Queue(simulation)

    def arrived(self, job: int) -> None:
        """Queue a job with the pools where its bid covers the ask: home first, then by speed."""
        simulation = self.simulation
        home = simulation.home[job]
        pools = [pool for pool in range(len(simulation.sites)) if simulation.worth_its_ask(job, SAME, pool)]
        pools.sort(key=lambda pool: (pool != home, -simulation.rate(job, SAME, pool), pool))
        if pools:
            self._queue.arrived(job, tuple(pools))

    def ended(self, job: int, _pool: int) -> None:
        """Let the queue look again."""
        self._queue.ended(job)

    def decide(self, _now_s: float) -> None:
        """Serve the queue."""
        self._queue.serve()
