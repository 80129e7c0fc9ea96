"""Goodput over (size, type) configurations of elastic jobs, after Sia (Jayaram Subramanya et al., SOSP'23)."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from broker.backtest.engine import Simulation, State
from broker.backtest.linear import Matrix, maximise
from broker.backtest.policies.rounds import RoundPolicy
from broker.backtest.workload import HALF, TWICE

Real = NDArray[np.float64]
Int = NDArray[np.int64]

# The paper's evaluation: power p of the fairness objective, and what a job without GPUs costs.
POWER: Final = -0.5
LEFT_OUT: Final = 1.1
# Of a new configuration's utility: never worth less, however young the job is.
DISCOUNT_MIN: Final = 0.05


class _Columns(NamedTuple):
    owner: Int
    option: Int
    kind: Int
    gpus: Real
    x: Real
    gain: Real


class Sia(RoundPolicy):
    """Sia's matching of jobs to configurations, elastic in size and type.

    Taken: one configuration for each job; utilities are speeds normalised by the job's smallest, times
    the restart discount (T - N S) / (T + S) of a change (T age, N restarts so far, S seconds of a
    restart), to the power p = -0.5 with lambda = 1.1; GPUs at most doubled in a round. Goodput is
    throughput here: the trace has no gradient statistics, so batch sizes do not adapt. Rounds of 300
    seconds where the paper has 60 (it reports 12 % longer completion for that). The integer programme
    is solved as a linear one, whose basic solutions split at most one job for each GPU type; those are
    placed by hand. Not taken: bootstrapping of throughput models (the table is known here).
    """

    name = "sia"
    sentence = "goodput-optimal sizes and types for elastic jobs in 300-second rounds (Sia's objective)"
    interval_s = 300.0

    def open(self, simulation: Simulation) -> None:
        """Prepare utilities of all jobs."""
        super().open(simulation)
        workload, sites = simulation.workload, simulation.sites
        kinds = len(sites.gpu_types)
        by_kind = np.eye(kinds, dtype=bool)[sites.kind]
        self._possible = np.einsum("jcp,pk->jck", self.open_to, by_kind)
        speed = np.where(self._possible, workload.rate, np.inf)
        self._utility = np.where(
            self._possible, workload.rate / speed.min(axis=(1, 2), initial=np.inf)[:, None, None], 0.0
        )
        self._capacity = np.bincount(sites.kind, weights=sites.capacity, minlength=kinds)
        self._restarts: dict[int, int] = {}

    def ended(self, job: int, pool: int) -> None:
        """Forget a job's restarts."""
        super().ended(job, pool)
        self._restarts.pop(job, None)

    def round(self, now_s: float) -> None:
        """Match jobs and configurations."""
        simulation = self.simulation
        jobs = np.fromiter(self.alive, dtype=np.int64)
        gain = self._gains(jobs, now_s)
        owner, option, kind = np.nonzero(self._possible[jobs] & (gain > 0))
        gpus = simulation.workload.counts[jobs[owner], option].astype(float)
        count = len(owner)
        start = np.arange(0, 2 * count + 1, 2)
        row = np.stack([owner, len(jobs) + kind], axis=1).ravel()
        use = np.stack([np.ones(count), gpus], axis=1).ravel()
        limit: Real = np.append(np.ones(len(jobs)), self._capacity).astype(np.float64)
        solution = maximise(gain[owner, option, kind], np.ones(count), Matrix(start, row, use), limit)
        wanted = self._whole(jobs, _Columns(owner, option, kind, gpus, solution.x, gain[owner, option, kind]))
        for job, place in wanted.items():
            if simulation.state[job] == State.RUNNING:
                here = (simulation.kind[simulation.pool[job]], simulation.option[job])
                self._restarts[job] = self._restarts.get(job, 0) + (here != place)
        self.realise(wanted)

    def _gains(self, jobs: Int, now_s: float) -> Real:
        """Return what each configuration adds to the objective: lambda - utility^p."""
        simulation = self.simulation
        utility = self._utility[jobs].copy()
        restart_s = simulation.costs.restart_s
        for place, job in enumerate(jobs.tolist()):
            if simulation.state[job] != State.RUNNING:
                continue
            age_s = now_s - simulation.arrival_s[job]
            discount = (age_s - self._restarts.get(job, 0) * restart_s) / (age_s + restart_s)
            option, kind = simulation.option[job], simulation.kind[simulation.pool[job]]
            here = utility[place, option, kind]
            utility[place] *= max(DISCOUNT_MIN, discount)
            utility[place, option, kind] = here
            if option == HALF:
                utility[place, TWICE] = 0.0
        waiting = np.array([simulation.state[job] != State.RUNNING for job in jobs.tolist()])
        # A job starts with at most what it asked for, and grows from there.
        utility[waiting, TWICE] = 0.0
        with np.errstate(divide="ignore"):
            return np.where(utility > 0, LEFT_OUT - utility**POWER, 0.0)

    def _whole(self, jobs: Int, columns: _Columns) -> dict[int, tuple[int, int]]:
        """Return the configurations that the LP gives whole, then fill up by what each adds per GPU."""
        owner, option, kind, gpus, x, gain = columns
        left = self._capacity.copy()
        wanted: dict[int, tuple[int, int]] = {}
        names = jobs.tolist()
        whole = x > 1 - 1e-6
        for at in np.flatnonzero(whole).tolist():
            wanted[names[owner[at]]] = (int(kind[at]), int(option[at]))
            left[kind[at]] -= gpus[at]
        rest = np.flatnonzero(~whole)
        for at in rest[np.lexsort((rest, -gain[rest] / gpus[rest], -x[rest]))].tolist():
            job = names[owner[at]]
            if job not in wanted and left[kind[at]] >= gpus[at] - 1e-9:
                wanted[job] = (int(kind[at]), int(option[at]))
                left[kind[at]] -= gpus[at]
        return wanted
