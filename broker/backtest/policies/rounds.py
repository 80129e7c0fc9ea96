"""What schedulers that decide in rounds share: who is alive, when the next round is due, and placing in pools."""

from __future__ import annotations

import math
from abc import abstractmethod

import numpy as np
from numpy.typing import NDArray

from broker.backtest.engine import NOWHERE, Place, Policy, Simulation, State

Flag = NDArray[np.bool_]


class RoundPolicy(Policy):
    """Decides at most every `interval_s`, and only when something changed or `restless` says so."""

    interval_s: float = 360.0

    def open(self, simulation: Simulation) -> None:
        """Start with nobody there."""
        super().open(simulation)
        self.alive: dict[int, None] = {}
        self.rounds = 0
        self._changed = False
        self._due_s = 0.0
        workload, sites = simulation.workload, simulation.sites
        counts = workload.counts[:, :, None]
        fits = (counts > 0) & (counts <= sites.capacity[None, None, :])
        runs = workload.rate[:, :, sites.kind] > 0
        pays = workload.value[:, :, sites.kind] >= counts * sites.ask_micros[None, None, :]
        # [job, option, pool]: it may run there and its bid covers the ask.
        self.open_to: Flag = fits & runs & pays
        if simulation.home_only:
            self.open_to &= workload.home[:, None, None] == np.arange(len(sites))[None, None, :]

    @abstractmethod
    def round(self, now_s: float) -> None:
        """Hold a round."""

    def restless(self) -> bool:
        """Return whether a round is due even if nothing happened."""
        return False

    def arrived(self, job: int) -> None:
        """Count a job in, unless it can run nowhere."""
        if self.open_to[job].any():
            self.alive[job] = None
            self._changed = True

    def ended(self, job: int, _pool: int) -> None:
        """Count a job out."""
        self._changed = self._changed or job in self.alive
        self.alive.pop(job, None)

    def decide(self, now_s: float) -> None:
        """Hold a round if one is due."""
        if now_s >= self._due_s - 1e-6 and self.alive and (self._changed or self.restless()):
            self._changed = False
            self._due_s = now_s + self.interval_s
            self.rounds += 1
            self.round(now_s)

    def wake_s(self) -> float:
        """Return when the next round is due."""
        return self._due_s if self.alive and (self._changed or self.restless()) else math.inf

    def realise(self, wanted: dict[int, tuple[int, int]]) -> None:
        """Place every live job as (kind, option) or, if it is not named, let it wait.

        Who has what it shall have stays; the others take, large ones first, the pool of the kind with
        the least room that suffices. What fits in no one pool waits.
        """
        simulation = self.simulation
        free = simulation.free.copy()
        places: dict[int, Place | None] = {}
        loose = []
        for job in self.alive:
            target = wanted.get(job)
            if simulation.state[job] == State.RUNNING:
                pool = simulation.pool[job]
                if target == (simulation.kind[pool], simulation.option[job]):
                    continue
                free[pool] += simulation.gpus(job, simulation.option[job])
                places[job] = None
            if target is not None:
                loose.append((-simulation.gpus(job, target[1]), job))
        pools_of: dict[int, list[int]] = {}
        for pool, kind in enumerate(simulation.kind):
            pools_of.setdefault(kind, []).append(pool)
        for negative, job in sorted(loose):
            kind, option = wanted[job]
            allowed = self.open_to[job, option]
            best = min(
                (pool for pool in pools_of[kind] if free[pool] >= -negative and allowed[pool]),
                key=lambda pool: (pool != simulation.home[job], free[pool], pool),
                default=NOWHERE,
            )
            if best != NOWHERE:
                free[best] += negative
                places[job] = Place(best, option)
        simulation.rearrange(places)
