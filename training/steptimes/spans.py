"""What a job's runs across sites say of the next one: its step, what a round costs by itself, what links carry.

`intersite` states a sync round from the links' probed figures; real rounds also cost what no probe shows: encoding, merging,
the log's own exchanges. Three figures of a job on so many sites are fitted to the steps that its runs had,

    step = alone + max(0, round + transfer / share + 2 rtt - tau alone) / H

and an interval is the wider of two: split conformal, of each run's error where the fit has not seen its links; and what the
fit leaves open at the configuration that is asked for, which a few runs' errors cannot show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from scipy.optimize import least_squares
from scipy.special import stdtrit

from training.steptimes.intersite import Schedule, WideLink, sync_s
from training.steptimes.intervals import conformal_quantile

COVERAGE: Final = 0.9
RUNS_MIN: Final = 3
# Where the fit starts, and how far (as a logarithm) runs may pull it: a round of some milliseconds, links as probed.
_START: Final = (0.01, 0.005, 1.0)
_OPEN: Final = (3.0, 1.5, 0.5)
_SCATTER: Final = 0.05
_NUDGE: Final = 1e-4


@dataclass(frozen=True, slots=True)
class SpanRun:
    """A measured run: when its sites agreed, over which links to the hub, and how long an inner step took in all."""

    schedule: Schedule
    links: tuple[WideLink, ...]
    step_s: float


@dataclass(frozen=True, slots=True)
class SpanModel:
    """The three figures, and how open they are.

    `conformal_log` is how far nine of ten unseen runs lay off, `covariance` of the figures' logarithms, `scatter_log` of a
    run. `spread` is how many standard deviations hold nine of ten: Student's, as few runs say little of their scatter.
    """

    alone_s: float
    round_s: float
    link_share: float
    conformal_log: float = math.inf
    scatter_log: float = _SCATTER
    spread: float = 1.645
    covariance: tuple[tuple[float, ...], ...] = ()

    def step_s(self, schedule: Schedule, links: Sequence[WideLink]) -> float:
        """Return the seconds of an inner step, what it waits for other sites included."""
        slower = [replace(link, bandwidth_bits_per_s=link.bandwidth_bits_per_s * self.link_share) for link in links]
        syncing = sync_s(schedule, slower) + (self.round_s if links else 0.0)
        return self.alone_s + max(0.0, syncing - schedule.overlap_steps * self.alone_s) / schedule.period_steps

    def half_width_log(self, schedule: Schedule, links: Sequence[WideLink]) -> float:
        """Return the half width of a 90 % interval of the step, as a logarithm."""
        if not self.covariance:
            return self.conformal_log
        logs = np.log([self.alone_s, self.round_s, self.link_share])
        middle = math.log(self.step_s(schedule, links))
        slope = np.array(
            [
                (math.log(_of(logs + _NUDGE * one).step_s(schedule, links)) - middle) / _NUDGE
                for one in np.eye(len(logs))
            ]
        )
        open_still = float(slope @ np.array(self.covariance) @ slope)
        return max(self.conformal_log, self.spread * math.sqrt(open_still + self.scatter_log**2))


def fit_spans(runs: Sequence[SpanRun], coverage: float = COVERAGE) -> SpanModel:
    """Return the model of one job's runs on one number of sites. Raises ValueError for fewer than RUNS_MIN.

    Log errors with a robust loss. The interval leaves out each link speed in turn, as the next question will be about
    links that no run had.
    """
    if len(runs) < RUNS_MIN:
        message = f"{len(runs)} runs say too little of three figures; at least {RUNS_MIN} are needed"
        raise ValueError(message)
    found = _fit(runs)
    scores = []
    for group in sorted({_links_of(run) for run in runs}):
        kept = [run for run in runs if _links_of(run) != group]
        if len(kept) >= RUNS_MIN:
            unseen = _fit(kept)
            scores += [_error(unseen, run) for run in runs if _links_of(run) == group]
    if not scores:
        scores = [_error(_fit([*runs[:place], *runs[place + 1 :]]), run) for place, run in enumerate(runs)]
    return replace(found, conformal_log=conformal_quantile(np.abs(np.array(scores)), coverage))


def _fit(runs: Sequence[SpanRun]) -> SpanModel:
    start = np.log(_START)

    def residuals(x: Any) -> Any:  # noqa: ANN401  numpy's arrays, as scipy has them
        model = _of(x)
        errors = [_error(model, run) / _SCATTER for run in runs]
        return np.array([*errors, *((x - start) / _OPEN)])

    solve: Callable[..., Any] = least_squares
    solved = solve(residuals, start, loss="soft_l1")
    found = _of(solved.x)
    off = np.array([_error(found, run) for run in runs])
    spare = max(1, len(runs) - len(_START))
    scatter = max(_SCATTER, math.sqrt(float(off @ off) / spare))
    # The solver's residuals are in units of _SCATTER: rows of runs scale with what they were found to scatter.
    slopes = np.array(solved.jac)
    slopes[: len(runs)] *= _SCATTER / scatter
    covariance = np.linalg.inv(slopes.T @ slopes)
    return replace(
        found,
        scatter_log=scatter,
        spread=float(stdtrit(spare, 0.95)),
        covariance=tuple(tuple(map(float, row)) for row in covariance),
    )


def _of(x: Any) -> SpanModel:  # noqa: ANN401  the same
    alone_s, round_s, share = (float(each) for each in np.exp(x))
    return SpanModel(alone_s, round_s, share)


def _error(model: SpanModel, run: SpanRun) -> float:
    return math.log(run.step_s / model.step_s(run.schedule, run.links))


def _links_of(run: SpanRun) -> tuple[tuple[float, float, float], ...]:
    return tuple((link.bandwidth_bits_per_s, link.round_trip_s, link.loss) for link in run.links)
