"""A trace of jobs as arrays: when each arrived, for how long and on how many GPUs it ran, in which cluster.

Columns: `timestamp` (ISO 8601, UTC, or seconds), `duration` (seconds), `num_gpus`, `cluster`; and where a
trace has them `gpu_time` (not read: it follows from the others), `user`, `model` (a model family of the
throughput table) and `gpu_types` (acceptable types, joined by `|`).
"""

from __future__ import annotations

import datetime as dt
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from broker.backtest.errors import TraceError
from broker.backtest.rows import rows

REQUIRED: Final = ("timestamp", "duration", "num_gpus", "cluster")
OPTIONAL: Final = ("gpu_time", "user", "model", "gpu_types")
DURATION_S_MAX: Final = 10 * 365 * 86_400.0
GPUS_MAX: Final = 100_000
# Some centuries around 1970: beyond is taken for a mistake.
SECONDS_MIN: Final = -1e10
SECONDS_MAX: Final = 1e11

Real = NDArray[np.float64]
Int = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Trace:
    """Jobs in order of arrival. `arrival_s` counts from `epoch`; texts are empty where the trace has none."""

    name: str
    epoch: dt.datetime
    arrival_s: Real
    duration_s: Real
    gpus: Int
    cluster: list[str]
    user: list[str]
    model: list[str]
    gpu_types: list[str]
    line: Int

    def __len__(self) -> int:
        """Jobs of the trace."""
        return len(self.arrival_s)

    def time(self, since_s: float) -> dt.datetime:
        """Return the trace's own time at `since_s` seconds after its epoch."""
        return self.epoch + dt.timedelta(seconds=since_s)

    def chosen(self, keep: NDArray[np.bool_]) -> Trace:
        """Return the jobs for which `keep` holds."""
        places = np.flatnonzero(keep)
        pick = places.tolist()
        return Trace(
            self.name,
            self.epoch,
            self.arrival_s[places],
            self.duration_s[places],
            self.gpus[places],
            [self.cluster[place] for place in pick],
            [self.user[place] for place in pick],
            [self.model[place] for place in pick],
            [self.gpu_types[place] for place in pick],
            self.line[places],
        )

    def between(self, start: dt.datetime | None, end: dt.datetime | None) -> Trace:
        """Return the jobs that arrive from `start` up to, not including, `end`. Raises TraceError where none do."""
        keep = np.ones(len(self), dtype=bool)
        if start is not None:
            keep &= self.arrival_s >= (start - self.epoch).total_seconds()
        if end is not None:
            keep &= self.arrival_s < (end - self.epoch).total_seconds()
        if not keep.any():
            first, last = self.time(float(self.arrival_s[0])), self.time(float(self.arrival_s[-1]))
            raise TraceError(
                f"{self.name}: no job arrives between --from and --to; arrivals run from {first:%Y-%m-%d} to {last:%Y-%m-%d}"
            )
        return self.chosen(keep)


def read_trace(path: Path) -> Trace:
    """Read a trace. Raises TraceError with the line of the first fault, OSError where it cannot be opened."""
    found: list[tuple[float, float, int, str, str, str, str, int]] = []
    for line, row in rows(path, REQUIRED, OPTIONAL, TraceError):
        where = f"{path.name} line {line}"
        cluster = row["cluster"].strip()
        if not cluster:
            raise TraceError(f"{where}: cluster is empty; each job needs the cluster that it was submitted in")
        found.append(
            (
                _timestamp(row["timestamp"], where),
                _number(row["duration"], "duration", where, DURATION_S_MAX),
                _gpus(row["num_gpus"], where),
                cluster,
                row.get("user", "").strip(),
                row.get("model", "").strip(),
                row.get("gpu_types", "").strip(),
                line,
            )
        )
    if not found:
        raise TraceError(f"{path.name}: the trace has no jobs; it needs at least one row below the header")
    found.sort(key=lambda job: (job[0], job[7]))
    start = math.floor(found[0][0] / 86_400) * 86_400.0
    return Trace(
        path.name,
        dt.datetime.fromtimestamp(start, dt.UTC),
        np.array([job[0] - start for job in found]),
        np.array([job[1] for job in found]),
        np.array([job[2] for job in found], dtype=np.int64),
        [job[3] for job in found],
        [job[4] for job in found],
        [job[5] for job in found],
        [job[6] for job in found],
        np.array([job[7] for job in found], dtype=np.int64),
    )


def own_use(trace: Trace, cluster: str) -> tuple[Int, Real]:
    """Return how many GPUs a cluster's own jobs used and for how many seconds each level held.

    As the trace has it: every job from its arrival for its duration, from the cluster's first
    arrival to its last end.
    """
    mine = np.array([name == cluster for name in trace.cluster])
    start, end, gpus = trace.arrival_s[mine], trace.arrival_s[mine] + trace.duration_s[mine], trace.gpus[mine]
    times = np.concatenate([start, end])
    order = np.argsort(times, kind="stable")
    levels = np.cumsum(np.concatenate([gpus, -gpus])[order])
    held = np.diff(times[order], append=times[order][-1:])
    return levels, held


def use_percentile(trace: Trace, cluster: str, percentile: float) -> int:
    """Return the GPUs that a cluster's own use stays within for `percentile` per cent of the time."""
    levels, held = own_use(trace, cluster)
    order = np.argsort(levels, kind="stable")
    share = np.cumsum(held[order]) / max(float(held.sum()), 1e-9)
    place = min(int(np.searchsorted(share, percentile / 100 - 1e-12)), len(levels) - 1)
    return int(levels[order][place])


def _timestamp(text: str, where: str) -> float:
    text = text.strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            moment = dt.datetime.fromisoformat(text)
        except ValueError:
            raise TraceError(
                f"{where}: timestamp {text[:60]!r} is neither a date such as 2017-10-09 07:01:55 nor seconds"
            ) from None
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=dt.UTC)
        seconds = moment.timestamp()
    if not math.isfinite(seconds) or not SECONDS_MIN < seconds < SECONDS_MAX:
        raise TraceError(f"{where}: timestamp {text[:60]!r} is out of range")
    return seconds


def _number(text: str, name: str, where: str, most: float) -> float:
    try:
        number = float(text)
    except ValueError:
        raise TraceError(f"{where}: {name} {text[:60]!r} is not a number") from None
    if not math.isfinite(number) or number < 0:
        raise TraceError(f"{where}: {name} is {text[:60]}; it must be 0 or more")
    if number > most:
        raise TraceError(f"{where}: {name} is {text[:60]}; more than {most:g} is taken for a mistake")
    return number


def _gpus(text: str, where: str) -> int:
    try:
        gpus = int(text)
    except ValueError:
        raise TraceError(f"{where}: num_gpus {text[:60]!r} is not a whole number") from None
    if not 1 <= gpus <= GPUS_MAX:
        raise TraceError(f"{where}: num_gpus is {gpus}; a job needs 1 to {GPUS_MAX:,} GPUs")
    return gpus
