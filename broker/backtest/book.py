"""A round's market of a replay as the allocation's `Instance`, built in arrays without any snapshot.

Each class of pools that runs jobs alike is a *kind*: a GPU type, or a site by itself where jobs may not leave
home. A job's options are singles; what it already holds is a bundle, and every other place costs it a restart.
Starting away from home costs staging time: it is priced as data egress, the market's own word for that.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from broker.allocation.instance import (
    NONE,
    SPAN_SITES_MAX,
    TIERS,
    Bundles,
    Goods,
    Instance,
    Jobs,
    Kinds,
    Links,
    Patterns,
    Pools,
    Rows,
    Singles,
    Sites,
    Spans,
    stated_plans,
)
from broker.backtest.engine import SECONDS_PER_HOUR, Costs
from broker.backtest.sites import Federation
from broker.backtest.workload import Workload

Int = NDArray[np.int64]
Index = NDArray[np.int32]
Real = NDArray[np.float64]
Flag = NDArray[np.bool_]

# Micro-credits per GB at which a byte per second costs one micro-credit per hour.
_UNIT_PRICE: Final = 277_778
# A hold that never binds: replayed tenants have no budgets.
_AMPLE: Final = 2**44
_DATA_MAX: Final = 2**40


class Book(NamedTuple):
    """Who takes part in a round, [participant]; pools are those of the federation.

    job            indices into the workload, rising
    pool, option   what it holds, -1 for who waits
    left_s         reference seconds of work left
    paused         it has run before, so that starting means restoring a checkpoint
    free           [pool] GPUs that participants may have
    """

    job: Int
    pool: Index
    option: Index
    left_s: Real
    paused: Flag
    free: Int


class Singled(NamedTuple):
    """An instance and which option of the workload each of its singles is."""

    instance: Instance
    option: Index


def instance_of(
    book: Book, workload: Workload, sites: Federation, open_to: Flag, costs: Costs, *, term_s: float, home_only: bool
) -> Singled:
    """Return the market of a round. `open_to` [job, option, pool] says what may be at all."""
    jobs, count, pool_count = book.job, len(book.job), len(sites)
    kind_of_pool = np.arange(pool_count, dtype=np.int32) if home_only else sites.kind
    kinds = int(kind_of_pool.max()) + 1
    type_of_kind = np.zeros(kinds, dtype=np.int32)
    type_of_kind[kind_of_pool] = sites.kind
    goods = _goods(kind_of_pool, kinds, book.free)
    # Value per hour of every option by kind, less what starting it destroys, spread over what it will run.
    counts = workload.counts[jobs]
    value = workload.value[jobs][:, :, type_of_kind].astype(float)
    rate = workload.rate[jobs][:, :, type_of_kind]
    with np.errstate(divide="ignore"):
        run_s = np.minimum(term_s, book.left_s[:, None, None] / rate)
    holds = book.pool >= 0
    restart_s = np.where(holds | book.paused, costs.restart_s, 0.0)[:, None, None]
    net = np.floor(value * run_s / (run_s + restart_s))
    staging = np.where(value > 0, net - value * run_s / (run_s + restart_s + costs.staging_s), 0.0)
    destroyed = _destroyed(book, workload, sites, costs)
    net -= np.ceil(destroyed * SECONDS_PER_HOUR / term_s)[:, None, None]
    most = np.zeros(kinds, dtype=np.int64)
    np.maximum.at(most, kind_of_pool, book.free)
    least_ask = np.full(kinds, np.iinfo(np.int64).max)
    np.minimum.at(least_ask, kind_of_pool, sites.ask_micros)
    by_kind = np.zeros((pool_count, kinds), dtype=bool)
    by_kind[np.arange(pool_count), kind_of_pool] = True
    possible = (open_to[jobs].reshape(-1, pool_count) @ by_kind).reshape(count, -1, kinds)
    fits = (counts[:, :, None] > 0) & (counts[:, :, None] <= most) & (net >= counts[:, :, None] * least_ask)
    owner, option, kind = np.nonzero(possible & fits)
    away = np.clip(np.ceil(staging[owner, option, kind]), 0, _DATA_MAX).astype(np.int64)
    singles = Singles(
        start=_starts(owner, count),
        good=kind.astype(np.int32),
        gpus=counts[owner, option],
        value=net[owner, option, kind].astype(np.int64),
        speed=rate[owner, option, kind],
        data_bytes_per_s=np.zeros_like(away) if home_only else away,
    )
    rows = Rows(
        base=np.zeros(pool_count, dtype=np.int64),
        step_start=np.arange(pool_count + 1, dtype=np.int64),
        step_units=book.free.astype(np.int64),
        step_cost=sites.ask_micros.astype(np.int64),
    )
    instance = Instance(
        slots=1,
        term_s=term_s,
        rows=rows,
        sites=Sites(np.full(pool_count, NONE, dtype=np.int32), np.full(pool_count, NONE, dtype=np.int32)),
        pools=Pools(np.arange(pool_count, dtype=np.int32), kind_of_pool.astype(np.int32), sites.capacity.copy()),
        kinds=Kinds(type_of_kind, np.full(kinds, 1e12), np.full(kinds, 1e11)),
        links=_no_links(pool_count),
        goods=goods,
        jobs=_jobs(book, workload, destroyed, len(sites.gpu_types)),
        site_sets=np.zeros((0, (pool_count + 63) // 64), dtype=np.uint64),
        singles=singles,
        patterns=_no_patterns(),
        spans=_no_spans(count),
        bundles=_bundles(book, workload, sites),
    )
    return Singled(instance, option.astype(np.int32))


def _destroyed(book: Book, workload: Workload, sites: Federation, costs: Costs) -> Real:
    """Return micro-credits of progress that leaving its place costs each holder."""
    pool = np.maximum(book.pool, 0)
    here = workload.value[book.job, np.maximum(book.option, 0), sites.kind[pool]]
    return np.where(book.pool >= 0, np.ceil(here * costs.restart_s / SECONDS_PER_HOUR), 0.0)


def _goods(kind_of_pool: Index, kinds: int, free: Int) -> Goods:
    order = np.argsort(kind_of_pool, kind="stable")
    order = order[free[order] > 0]
    return Goods(
        kind=np.arange(kinds, dtype=np.int32),
        first=np.zeros(kinds, dtype=np.int32),
        end=np.ones(kinds, dtype=np.int32),
        offer_start=_starts(kind_of_pool[order], kinds),
        offer_pool=order.astype(np.int32),
        offer_limit=free[order].astype(np.int64),
    )


def _bundles(book: Book, workload: Workload, sites: Federation) -> Bundles:
    holders = np.flatnonzero(book.pool >= 0)
    jobs, pool, option = book.job[holders], book.pool[holders], book.option[holders]
    value = workload.value[jobs, option, sites.kind[pool]]
    return Bundles(
        start=_starts(holders, len(book.job)),
        value=value.astype(np.int64),
        charge_max=value.astype(np.int64),
        entry_start=np.arange(len(holders) + 1, dtype=np.int64),
        entry_row=pool.astype(np.int32),
        entry_use=workload.counts[jobs, option],
    )


def _jobs(book: Book, workload: Workload, destroyed: Real, types: int) -> Jobs:
    count = len(book.job)
    own = np.full(count, NONE, dtype=np.int32)
    holders = book.pool >= 0
    own[holders] = np.arange(int(holders.sum()), dtype=np.int32)
    tiers = np.zeros((count, TIERS), dtype=np.int64)
    tiers[:, 1:] = _UNIT_PRICE
    none, ones, zeros = np.full(count, NONE, dtype=np.int32), np.ones(count), np.zeros(count, dtype=np.int64)
    return Jobs(
        must=np.zeros(count, dtype=bool),
        own=own,
        locked=zeros,
        home=workload.home[book.job].astype(np.int32),
        tier_price=tiers,
        site_set=none,
        budget_row=none,
        budget=zeros,
        floor_row=none,
        value_base=np.zeros((count, 1)),
        value_slope=np.zeros((count, 1)),
        hold_left=np.full(count, _AMPLE, dtype=np.int64),
        samples_left=np.maximum(1.0, book.left_s),
        deadline_s=np.full(count, np.inf),
        restart=destroyed.astype(np.int64),
        batch_per_gpu=ones,
        parameters=ones,
        flops_per_sample=ones,
        data_bytes_per_sample=np.zeros(count),
        period_steps=ones,
        codec=none,
        **stated_plans(count),
        flops_per_s=np.full((count, types), np.nan),
        ring_bits_per_s=np.full((count, types), np.nan),
        barred_start=np.zeros(count + 1, dtype=np.int64),
        barred=np.zeros(0, dtype=np.int64),
    )


def _starts(owner: NDArray[np.signedinteger], count: int) -> Int:
    starts = np.zeros(count + 1, dtype=np.int64)
    np.cumsum(np.bincount(owner, minlength=count), out=starts[1:])
    return starts


def _no_links(first_row: int) -> Links:
    empty, ints = np.zeros(0), np.zeros(0, dtype=np.int32)
    return Links(first_row, ints, ints, empty, empty, empty, np.zeros(0, dtype=np.int64))


def _no_patterns() -> Patterns:
    table, row = np.zeros((0, SPAN_SITES_MAX), dtype=np.int32), np.zeros(0, dtype=np.int32)
    return Patterns(table, table, row, row, table, table, np.zeros(1, dtype=np.int32))


def _no_spans(jobs: int) -> Spans:
    row = np.zeros(0, dtype=np.int32)
    return Spans(np.zeros(jobs + 1, dtype=np.int64), row, np.zeros(0, dtype=np.int64), row, row)
