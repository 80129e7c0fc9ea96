"""Max-min fairness that knows how fast each job runs on each GPU type, after Gavel (Narayanan et al., OSDI'20)."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from broker.backtest.engine import Simulation, State
from broker.backtest.linear import Matrix, maximise
from broker.backtest.policies.rounds import RoundPolicy
from broker.backtest.workload import HALF, SAME, TWICE

Real = NDArray[np.float64]

# Beside the smallest share, so that GPUs which the poorest cannot use serve others.
_CONSERVING: Final = 1e-3
# A share of time below this is a solver's noise.
_SHARE_MIN: Final = 1e-9


class Gavel(RoundPolicy):
    """Least attained service over heterogeneous types, as a linear programme and a round mechanism.

    Taken: the LP over shares of time X[job, type] (each job's shares at most 1, each type's GPUs at
    most what there is) which maximises the smallest effective throughput, each normalised by what an
    equal split over types would give; 360-second rounds which realise X by priority = X / rounds
    received; leases extended in place. Jobs of one model, size and set of types share a column, which
    leaves the optimum as it is. Not taken: space sharing (pairs of jobs on a GPU), weights, the other
    objectives, and water filling beyond the smallest share (a thousandth of the sum instead).
    Jobs are rigid, as there.
    """

    name = "gavel"
    sentence = "heterogeneity-aware max-min fairness in 360-second rounds (Gavel's LP), jobs rigid"

    def open(self, simulation: Simulation) -> None:
        """Start with no time received."""
        super().open(simulation)
        self.open_to[:, [HALF, TWICE]] = False
        kinds = len(simulation.sites.gpu_types)
        self._received: dict[int, Real] = {}
        by_kind = np.eye(kinds, dtype=bool)[simulation.sites.kind]
        # [job, kind]: some pool of that kind takes it.
        self._types = np.any(self.open_to[:, SAME, :, None] & by_kind[None], axis=1)
        self._capacity = np.bincount(simulation.sites.kind, weights=simulation.sites.capacity, minlength=kinds)
        self._waits = False
        workload = simulation.workload
        mask = self._types @ (1 << np.arange(kinds))
        keys = np.stack([workload.model, workload.gpus, mask, workload.home * simulation.home_only], axis=1)
        _, first, self._class_of = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        self._first = first
        self._class_of = self._class_of.reshape(-1)

    def restless(self) -> bool:
        """Return whether somebody waits: then time is shared, round by round."""
        return self._waits

    def ended(self, job: int, pool: int) -> None:
        """Forget the time that a job received."""
        super().ended(job, pool)
        self._received.pop(job, None)

    def round(self, _now_s: float) -> None:
        """Give the GPUs of each type to the jobs furthest behind their share."""
        simulation = self.simulation
        jobs = np.fromiter(self.alive, dtype=np.int64)
        classes, of_job, members = np.unique(self._class_of[jobs], return_inverse=True, return_counts=True)
        share = self._shares(self._first[classes], members)[of_job.reshape(-1)]
        kinds = share.shape[1]
        received = np.array([self._received.setdefault(job, np.zeros(kinds)) for job in self.alive])
        priority = np.where(share > _SHARE_MIN, share / (received + 1e-3), 0.0)
        job_place, kind = np.nonzero(priority > 0)
        order = np.lexsort((job_place, -priority[job_place, kind]))
        left = self._capacity.astype(np.int64).tolist()
        gpus = simulation.workload.gpus[jobs].tolist()
        wanted: dict[int, tuple[int, int]] = {}
        names = jobs.tolist()
        taken = [False] * len(names)
        for place, at in zip(job_place[order].tolist(), kind[order].tolist(), strict=True):
            if not taken[place] and left[at] >= gpus[place]:
                left[at] -= gpus[place]
                taken[place] = True
                wanted[names[place]] = (at, SAME)
        self.realise(wanted)
        self._waits = False
        for job in names:
            if simulation.state[job] == State.RUNNING:
                self._received[job][simulation.kind[simulation.pool[job]]] += 1.0
            else:
                self._waits = True

    def _shares(self, example: NDArray[np.int64], members: NDArray[np.int64]) -> Real:
        """Return X[class, type] of one member, from one example job of each class."""
        workload = self.simulation.workload
        rate: Real = workload.rate[example, SAME] * self._types[example]
        equal: Real = rate @ (self._capacity / self._capacity.sum())
        normal = rate / equal[:, None]
        classes, kinds = rate.shape
        gpus = workload.gpus[example]
        # Columns: X by class and type, then the smallest share t. Rows: class's time, types' GPUs, t <= share.
        owner, kind = np.nonzero(rate)
        count = len(owner)
        row = np.stack([owner, classes + kind, classes + kinds + owner], axis=1).ravel()
        use = np.stack([np.ones(count), (gpus * members)[owner].astype(float), -normal[owner, kind]], axis=1).ravel()
        start = np.append(np.arange(0, 3 * count + 1, 3), 3 * count + classes)
        row = np.append(row, classes + kinds + np.arange(classes))
        use = np.append(use, np.ones(classes))
        worth = np.append(_CONSERVING * normal[owner, kind] * members[owner] / members.sum(), 1.0)
        limit = np.concatenate([np.ones(classes), self._capacity, np.zeros(classes)])
        solution = maximise(worth, np.append(np.ones(count), np.inf), Matrix(start, row, use), limit)
        share = np.zeros((classes, kinds))
        share[owner, kind] = solution.x[:count]
        return share
