"""Two systems in use, as ideas: the cheapest offer now (SkyPilot) and a race of all clusters (MultiKueue).

Neither reserves for the head of a queue: what fits starts.
"""

from __future__ import annotations

from abc import abstractmethod

from broker.backtest.engine import NOWHERE, Policy, Simulation
from broker.backtest.workload import SAME

_MIX = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1


class _Eager(Policy):
    """Waiting jobs in order of arrival; whichever has a pool with room starts."""

    def open(self, simulation: Simulation) -> None:
        """Start with nobody waiting."""
        super().open(simulation)
        self._waiting: dict[int, list[int]] = {}
        self._fresh: list[int] = []
        self._freed: set[int] = set()

    @abstractmethod
    def _preferred(self, job: int, pools: list[int]) -> list[int]:
        """Return the pools in the order in which this job tries them."""

    def arrived(self, job: int) -> None:
        """Note a job and where its bid covers the ask."""
        simulation = self.simulation
        pools = [pool for pool in range(len(simulation.sites)) if simulation.worth_its_ask(job, SAME, pool)]
        if pools:
            self._waiting[job] = self._preferred(job, pools)
            self._fresh.append(job)

    def ended(self, job: int, pool: int) -> None:
        """Note where GPUs came free."""
        self._waiting.pop(job, None)
        if pool != NOWHERE:
            self._freed.add(pool)

    def decide(self, _now_s: float) -> None:
        """Start every waiting job for which a pool has room."""
        simulation = self.simulation
        free = simulation.free
        if self._freed and len(self._waiting) > len(self._fresh):
            # Older jobs found no room elsewhere before, so only the freed pools can be new to them.
            room = max(free[pool] for pool in self._freed)
            order = list(self._waiting)
        else:
            room, order = max(free), self._fresh
        for job in order:
            if room <= 0:
                break
            pools = self._waiting.get(job)
            if pools is None:
                continue
            gpus = simulation.gpus(job)
            pool = next((pool for pool in pools if free[pool] >= gpus), NOWHERE)
            if pool != NOWHERE:
                del self._waiting[job]
                simulation.start(job, pool)
                if pool in self._freed:
                    room = max(free[pool] for pool in self._freed)
        self._fresh, self._freed = [], set()


class Cheapest(_Eager):
    """SkyPilot's optimiser as an idea.

    Taken: candidates ranked by estimated cost of the whole job (price x GPUs x time by the throughput
    table), failover down that list, retry until something has room. Not taken: clouds' quotas and
    spot markets, egress between the tasks of a DAG, retry gaps (a retry happens the moment that GPUs
    come free, which favours it).
    """

    name = "cheapest"
    sentence = "each job takes the site with room where the whole job costs least at the asks (SkyPilot's idea)"

    def _preferred(self, job: int, pools: list[int]) -> list[int]:
        simulation = self.simulation
        return sorted(pools, key=lambda pool: (simulation.ask[pool] / simulation.rate(job, SAME, pool), pool))


class Race(_Eager):
    """MultiKueue's AllAtOnce dispatcher as an idea.

    Taken: a copy of each job waits in every cluster, the first that reserves quota wins and the other
    copies are withdrawn; clusters admit in order of arrival and skip what does not fit
    (BestEffortFIFO). Not taken: preemption, cohorts and borrowing, the dispatcher's delay. Where
    several have room at once, who answers first is a hash of job and cluster.
    """

    name = "race"
    sentence = "a copy of each job waits at every site and the first with room wins (MultiKueue's idea)"

    def _preferred(self, job: int, pools: list[int]) -> list[int]:
        return sorted(pools, key=lambda pool: (_answer(job, pool), pool))


def _answer(job: int, pool: int) -> int:
    """Return a number that orders the answers of clusters without regard to anything else (splitmix64)."""
    word = (job * 1_000_003 + pool + 1) * _MIX & _WORD
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & _WORD
    return word ^ (word >> 31)
