"""Jobs in numbers: work, acceptable options, value and home site of each, as the simulator reads them.

An *option* of a job is a number of GPUs (the traced one, half or twice of it) on one GPU type. Work is
measured in reference seconds: seconds of the traced GPUs at the home site, so that `rate` is 1 there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from broker.backtest.bids import BidRule, draw_bids
from broker.backtest.errors import TraceError
from broker.backtest.sites import Federation
from broker.backtest.throughput import Throughput
from broker.backtest.trace import Trace

# Options by count: half, the traced one, twice.
HALF: Final = 0
SAME: Final = 1
TWICE: Final = 2
COUNTS: Final = 3
# Elastic up to here; a job beyond one node runs on the GPUs that it asked for.
ELASTIC_GPUS_MAX: Final = 8
# A traced job of less is given a second of work: the simulator's clock needs one.
WORK_S_MIN: Final = 1.0

Real = NDArray[np.float64]
Int = NDArray[np.int64]
Index = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Workload:
    """Jobs by index, in order of arrival.

    counts                [job, COUNTS] GPUs of each option, 0 where there is none
    rate                  [job, COUNTS, kind] reference seconds of work done per second; 0: not acceptable
    bid_micros            per GPU-hour of reference work
    value                 [job, COUNTS, kind] micro-credits per hour while it progresses
    deadline_s            after it the job withdraws; inf: never
    """

    arrival_s: Real
    work_s: Real
    gpus: Int
    home: Index
    model: Index
    counts: Int
    rate: Real
    bid_micros: Int
    value: Int
    deadline_s: Real

    def __len__(self) -> int:
        """Jobs of the run."""
        return len(self.arrival_s)

    def with_bids(self, bid_micros: Int) -> Workload:
        """Return the same jobs with other bids."""
        return replace(self, bid_micros=bid_micros, value=value_rates(bid_micros, self.gpus, self.rate))


def value_rates(bid_micros: Int, gpus: Int, rate: Real) -> Int:
    """Return micro-credits per hour of every option, rounded down."""
    return np.floor((bid_micros * gpus)[:, None, None] * rate).astype(np.int64)


def build(
    trace: Trace,
    sites: Federation,
    table: Throughput,
    *,
    bids: BidRule,
    seed: int,
    patience: float | None = None,
    grace_s: float = 3600.0,
) -> tuple[Workload, Trace]:
    """Return the jobs of the listed sites as a workload, and the trace's rows that they are.

    Where the trace does not say which model a job trains, one is drawn from the families of the
    table that run on the traced GPUs at home. With `patience`, a job withdraws `grace_s` plus
    `patience` times its traced duration after its arrival. Raises TraceError where no job is at a
    listed site, or a row names a model or GPU type that the table lacks.
    """
    number = {name: site for site, name in enumerate(sites.names)}
    trace = trace.chosen(np.array([name in number for name in trace.cluster]))
    if not len(trace):
        raise TraceError(f"{trace.name}: no job is in one of the {len(sites)} listed sites")
    home = np.array([number[name] for name in trace.cluster], dtype=np.int32)
    counts = _counts(trace.gpus)
    sizes = np.unique(counts[counts > 0])
    speeds = table.speeds(sites.gpu_types, sizes)
    model = _models(trace, table, speeds, sizes, home_kind=sites.kind[home], seed=seed)
    place = np.searchsorted(sizes, np.where(counts > 0, counts, sizes[0]))
    speed = speeds[model[:, None, None], np.arange(len(sites.gpu_types))[None, None, :], place[:, :, None]]
    speed = np.where(counts[:, :, None] > 0, speed, 0.0)
    reference = speed[np.arange(len(trace)), SAME, sites.kind[home]]
    rate = speed / reference[:, None, None]
    rate *= _acceptable(trace, table, sites.gpu_types)[:, None, :]
    work_s = np.maximum(trace.duration_s, WORK_S_MIN)
    deadline_s = np.full(len(trace), np.inf)
    if patience is not None:
        deadline_s = trace.arrival_s + grace_s + patience * work_s
    bid_micros = draw_bids(trace, sites.ask_micros[home], bids, seed)
    value = value_rates(bid_micros, trace.gpus, rate)
    return (
        Workload(trace.arrival_s, work_s, trace.gpus, home, model, counts, rate, bid_micros, value, deadline_s),
        trace,
    )


def _counts(gpus: Int) -> Int:
    counts = np.zeros((len(gpus), COUNTS), dtype=np.int64)
    counts[:, SAME] = gpus
    elastic = gpus <= ELASTIC_GPUS_MAX
    counts[:, HALF] = np.where(elastic & (gpus % 2 == 0), gpus // 2, 0)
    counts[:, TWICE] = np.where(elastic & (gpus * 2 <= ELASTIC_GPUS_MAX), gpus * 2, 0)
    return counts


def _models(trace: Trace, table: Throughput, speeds: Real, sizes: Int, *, home_kind: Index, seed: int) -> Index:
    generator = np.random.Generator(np.random.PCG64([seed, 0]))
    draw = generator.random(len(trace))
    place = np.searchsorted(sizes, trace.gpus)
    known = {name: index for index, name in enumerate(table.models)}
    model = np.empty(len(trace), dtype=np.int32)
    eligible = {
        (int(kind), int(size)): np.flatnonzero(speeds[:, kind, size] > 0)
        for kind, size in {(int(kind), int(size)) for kind, size in zip(home_kind, place, strict=True)}
    }
    for job in range(len(trace)):
        named = trace.model[job]
        choices = eligible[int(home_kind[job]), int(place[job])]
        where = f"{trace.name} line {trace.line[job]}"
        if named:
            if named not in known:
                raise TraceError(
                    f"{where}: the model {named!r} is not in {table.name}; it has {', '.join(table.models[:8])}, ..."
                )
            if known[named] not in choices:
                raise TraceError(f"{where}: {named} on {trace.gpus[job]} GPUs does not run at its home by {table.name}")
            model[job] = known[named]
        elif len(choices):
            model[job] = choices[int(draw[job] * len(choices))]
        else:
            raise TraceError(f"{where}: no model of {table.name} runs on {trace.gpus[job]} GPUs of its home's type")
    return model


def _acceptable(trace: Trace, table: Throughput, gpu_types: tuple[str, ...]) -> Real:
    allowed = np.ones((len(trace), len(gpu_types)))
    for job, text in enumerate(trace.gpu_types):
        if not text:
            continue
        named = [name.strip() for name in text.split("|")]
        for name in named:
            if name not in table.gpu_types:
                raise TraceError(
                    f"{trace.name} line {trace.line[job]}: unknown GPU type {name[:40]!r}; "
                    f"{table.name} has {', '.join(table.gpu_types)}"
                )
        allowed[job] = [name in named for name in gpu_types]
    return allowed
