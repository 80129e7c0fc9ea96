"""The problems of the comparison, once as the peer states it and once as our Instance.

`time_shares` is Gavel's (jobs x worker types, OSDI'20), `configurations` Sia's (jobs x (GPU type,
GPUs), SOSP'23), `shared_workers` POP's benchmark (SOSP'21, figure 2: single-GPU jobs, pairs may
share a GPU). `market_of_*` writes the first two as arrays of our market, with values so scaled that
both sides see the same numbers to the last bit: speeds are rounded to whole VALUE_SCALE-ths first.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from broker.allocation.instance import (
    RATE_MICROS_PER_HOUR_MAX,
    TIERS,
    Bundles,
    Goods,
    Index,
    Instance,
    Int,
    Jobs,
    Kinds,
    Links,
    Patterns,
    Pools,
    Real,
    Rows,
    Singles,
    Sites,
    Spans,
    stated_plans,
)
from tests.benchmarks.market.tables import SCALES, Speeds

VALUE_SCALE: Final = 10**7
# GPUs per job as in Gavel's and Sia's generated traces, after the Philly trace: most take one.
_SCALE_SHARES: Final = (0.7, 0.1, 0.15, 0.05)
# A site's hosts feed some models better than others: speed at a site against the table's, at most.
SITE_SPREAD: Final = 0.15


class TimeShares(NamedTuple):
    """Gavel's problem: what share of its time each job spends on each worker type.

    `throughput` [job, worker type] in steps/s, 0 where it cannot run; `gpus` [job] while it runs;
    `workers` [worker type] in GPUs; `kind` [worker type]: equal where the columns are equal.
    """

    throughput: Real
    gpus: Int
    workers: Int
    kind: Index


class Configurations(NamedTuple):
    """Sia's problem: which configuration each job gets, or none.

    `cost` [job, configuration] is what Sia minimises; a job left without costs `none_cost`.
    `gpus`, `gpu_type` [configuration]; `capacity` [GPU type].
    """

    cost: Real
    none_cost: float
    gpus: Int
    gpu_type: Index
    capacity: Int


class SharedWorkers(NamedTuple):
    """Single-GPU jobs that may share a GPU in pairs.

    `job_type` [job]; `alone` [type, worker type] steps/s; `beside` [a, b, worker type]: steps/s of
    a job of type a beside one of type b; `workers` [worker type].
    """

    job_type: Index
    alone: Real
    beside: Real
    workers: Int


def time_shares(speeds: Speeds, jobs: int, sites: int, seed: int, *, alike: bool = False) -> TimeShares:
    """Draw jobs from a table; workers are jobs/4 GPUs of each type, dealt over the sites.

    With `alike` a GPU type is equally fast at every site, as in Gavel's own experiments; otherwise
    each (job type, worker type) has its own speed within SITE_SPREAD of the table's. A job runs
    nowhere where it needs more GPUs than there are, which the paper's LP by itself would allow.
    """
    rng = np.random.default_rng((seed, 2))
    types = len(speeds.gpu_types)
    gpus = rng.choice(SCALES, jobs, p=_SCALE_SHARES).astype(np.int64)
    site_speed: dict[str, Real] = {}
    throughput = np.empty((jobs, sites * types))
    for job in range(jobs):
        names = speeds.job_types(int(gpus[job]))
        name = names[rng.integers(len(names))]
        if name not in site_speed:
            site_speed[name] = rng.uniform(1 - SITE_SPREAD, 1 + SITE_SPREAD, sites * types)
        own = np.tile(speeds.steps_per_s[name, int(gpus[job])], sites)
        throughput[job] = own if alike else own * site_speed[name]
    workers = np.stack([rng.multinomial(jobs // 4, np.full(sites, 1 / sites)) for _ in range(types)], axis=1).ravel()
    throughput[gpus[:, None] > workers] = 0.0
    kind = np.tile(np.arange(types), sites) if alike else np.arange(sites * types)
    return TimeShares(_rounded(throughput), gpus, workers.astype(np.int64), kind.astype(np.int32))


def configurations(speeds: Speeds, jobs: int, seed: int) -> Configurations:
    """Draw Sia's matrices: up to 64 GPUs of a type, half of the jobs running, p = -0.5, lambda = 1.1.

    Goodput up to 8 GPUs is the table's speed; beyond, made up: each doubling over nodes gains a
    drawn factor of 1.1 to 1.8. A change of configuration is discounted by the job's age.
    """
    rng = np.random.default_rng((seed, 3))
    sizes = np.array([1, 2, 4, 8, 16, 24, 32, 48, 64])
    types = len(speeds.gpu_types)
    names = [
        name for name in speeds.job_types(SCALES[-1]) if all((name, gpus) in speeds.steps_per_s for gpus in SCALES)
    ]
    goodput = np.zeros((jobs, types, len(sizes)))
    for job in range(jobs):
        name = names[rng.integers(len(names))]
        measured = np.stack([speeds.steps_per_s[name, gpus] for gpus in SCALES], axis=1)
        gain = rng.uniform(1.1, 1.8, (types, 1))
        beyond = measured[:, -1:] * gain ** np.log2(sizes[len(SCALES) :] / SCALES[-1])
        goodput[job] = np.hstack([measured, beyond]) * rng.uniform(0.9, 1.1)
    flat = goodput.reshape(jobs, -1)
    running = rng.random(jobs) < 0.5
    current = rng.integers(flat.shape[1], size=jobs)
    age_s, restart_s, restarts = rng.uniform(300, 36_000, jobs), 60.0, rng.integers(0, 4, jobs)
    discount = np.maximum(0.05, (age_s - restarts * restart_s) / (age_s + restart_s))[:, None]
    stays = running[:, None] & (np.arange(flat.shape[1]) == current[:, None])
    flat = np.where(stays | ~running[:, None], flat, flat * discount)
    lowest = np.where(flat > 0, flat, np.inf).min(axis=1, keepdims=True)
    # Where a model does not run, its utility is 0, and a cost above `none_cost` keeps it out.
    cost = np.where(flat > 0, (np.maximum(flat, lowest) / lowest) ** -0.5, 2.0)
    gpus, gpu_type = np.tile(sizes, types), np.repeat(np.arange(types), len(sizes))
    return Configurations(
        _rounded(cost), 1.1, gpus.astype(np.int64), gpu_type.astype(np.int32), np.full(types, 3 * jobs // 4, np.int64)
    )


def shared_workers(speeds: Speeds, jobs: int, seed: int) -> SharedWorkers:
    """Draw POP's space-sharing benchmark: jobs/4 GPUs of each type, every pair may share one.

    The isolated speeds are the table's. How fast two jobs run side by side is made up, since it is
    not in such a table: each keeps a share of its speed drawn from 0.3..0.95 per (type, type, GPU
    type), and one pair in ten does not fit into memory together.
    """
    rng = np.random.default_rng((seed, 4))
    names = speeds.job_types(1)
    alone = _rounded(np.stack([speeds.steps_per_s[name, 1] for name in names]))
    kept = rng.uniform(0.3, 0.95, (len(names), len(names), alone.shape[1]))
    fits = rng.random(kept.shape) < 0.9
    fits &= fits.transpose(1, 0, 2)
    beside = _rounded(alone[:, None, :] * kept * fits)
    workers = np.full(alone.shape[1], jobs // 4, np.int64)
    return SharedWorkers(rng.integers(len(names), size=jobs).astype(np.int32), alone, beside, workers)


def market_of_time_shares(problem: TimeShares) -> Instance:
    """Write Gavel's problem as a market: a pool per worker type, a value per hour of throughput.

    The configuration LP's x is then the share of time; a good is a kind of GPU, so that equal
    worker types are one candidate.
    """
    kinds = int(problem.kind.max()) + 1
    speed = np.stack([problem.throughput[:, problem.kind == kind].max(axis=1) for kind in range(kinds)], axis=1)
    fits = problem.gpus[:, None] <= problem.workers
    assert np.array_equal(problem.throughput, speed[:, problem.kind] * fits)
    value = np.rint(speed * VALUE_SCALE).astype(np.int64)
    job, good = np.nonzero(value > 0)
    gpus = problem.gpus[job]
    return _market(
        problem.workers, problem.kind, jobs=len(value), job=job, good=good, gpus=gpus, value=value[job, good]
    )


def market_of_configurations(problem: Configurations) -> Instance:
    """Write Sia's problem as a market: a pool per GPU type; a value is the cost that it saves."""
    saved = np.rint((problem.none_cost - problem.cost) * VALUE_SCALE).astype(np.int64)
    job, column = np.nonzero(saved > 0)
    kind = np.arange(len(problem.capacity), dtype=np.int32)
    good, gpus = problem.gpu_type[column], problem.gpus[column]
    return _market(problem.capacity, kind, jobs=len(saved), job=job, good=good, gpus=gpus, value=saved[job, column])


def _rounded(amounts: Real) -> Real:
    return np.rint(amounts * VALUE_SCALE) / VALUE_SCALE


def _market(workers: Int, kind: Index, *, jobs: int, job: Int, good: Int | Index, gpus: Int, value: Int) -> Instance:
    """Return a market of one slot with free pools and singles of stated values, in order of job."""
    pools, kinds = len(workers), int(kind.max()) + 1
    order = np.argsort(kind, kind="stable")
    pool_index = np.arange(pools, dtype=np.int32)
    offer_start = np.searchsorted(kind[order], np.arange(kinds + 1)).astype(np.int64)
    return Instance(
        slots=1,
        term_s=3600.0,
        rows=Rows(np.zeros(pools, np.int64), np.arange(pools + 1), workers.copy(), np.zeros(pools, np.int64)),
        sites=Sites(np.full(pools, -1, np.int32), np.full(pools, -1, np.int32)),
        pools=Pools(pool_index, kind.copy(), workers.copy()),
        kinds=Kinds(np.arange(kinds, dtype=np.int32), np.ones(kinds), np.ones(kinds)),
        links=_no_links(pools),
        goods=Goods(
            np.arange(kinds, dtype=np.int32),
            np.zeros(kinds, np.int32),
            np.ones(kinds, np.int32),
            offer_start,
            pool_index[order],
            workers[order],
        ),
        jobs=_plain_jobs(jobs, kinds),
        site_sets=np.zeros((0, (pools + 63) // 64), np.uint64),
        singles=Singles(
            np.searchsorted(job, np.arange(jobs + 1)).astype(np.int64),
            good.astype(np.int32),
            gpus.astype(np.int64),
            value,
            value / VALUE_SCALE,
            np.zeros(len(value), np.int64),
        ),
        patterns=_no_patterns(),
        spans=Spans(np.zeros(jobs + 1, np.int64), *(np.zeros(0, t) for t in (np.int32, np.int64, np.int32, np.int32))),
        bundles=Bundles(
            np.zeros(jobs + 1, np.int64),
            np.zeros(0, np.int64),
            np.zeros(0, np.int64),
            np.zeros(1, np.int64),
            np.zeros(0, np.int32),
            np.zeros(0, np.int64),
        ),
    )


def _plain_jobs(jobs: int, kinds: int) -> Jobs:
    """Return jobs without home, budget, deadline or incumbent: what their singles say is all there is."""

    def same(amount: float, dtype: type = np.float64) -> Real:
        return np.full(jobs, amount, dtype)

    return Jobs(
        must=same(0, np.bool_),
        own=same(-1, np.int32),
        locked=same(0, np.int64),
        home=same(-1, np.int32),
        tier_price=np.zeros((jobs, TIERS), np.int64),
        site_set=same(-1, np.int32),
        budget_row=same(-1, np.int32),
        budget=same(0, np.int64),
        floor_row=same(-1, np.int32),
        value_base=np.zeros((jobs, 1)),
        value_slope=np.ones((jobs, 1)),
        hold_left=same(RATE_MICROS_PER_HOUR_MAX, np.int64),
        samples_left=same(1e12),
        deadline_s=same(np.inf),
        restart=same(0, np.int64),
        batch_per_gpu=same(1),
        parameters=same(1),
        flops_per_sample=same(1),
        data_bytes_per_sample=same(0),
        period_steps=same(1),
        codec=same(-1, np.int32),
        **stated_plans(jobs),
        flops_per_s=np.full((jobs, kinds), np.nan),
        ring_bits_per_s=np.full((jobs, kinds), np.nan),
        barred_start=np.zeros(jobs + 1, np.int64),
        barred=np.zeros(0, np.int64),
    )


def _no_links(first_row: int) -> Links:
    none, index = np.zeros(0), np.zeros(0, np.int32)
    return Links(first_row, index, index, none, none, none, np.zeros(0, np.int64))


def _no_patterns() -> Patterns:
    parts = np.zeros((0, 4), np.int32)
    line = np.zeros(0, np.int32)
    return Patterns(parts, parts, line, line, parts, parts, np.zeros(1, np.int64))
