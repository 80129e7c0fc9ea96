"""Pieces of a market as arrays: rows and their steps, links, goods, singles and patterns.

`small_instances` and `large_instances` put them together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from broker.allocation import kernel
from broker.allocation.compiled import compiled
from broker.allocation.instance import (
    NONE,
    SPAN_SITES_MAX,
    Goods,
    Instance,
    Links,
    Patterns,
    Pools,
    Rows,
    Singles,
    capacity,
)

TERM_S = 3600.0


def rows_of(base: Sequence[int], steps: Sequence[Sequence[tuple[int, int]]]) -> Rows:
    flat = [step for curve in steps for step in curve]
    return Rows(
        base=np.array(base, np.int64),
        step_start=np.concatenate([[0], np.cumsum([len(curve) for curve in steps])]).astype(np.int64),
        step_units=np.array([units for units, _ in flat], np.int64),
        step_cost=np.array([cost for _, cost in flat], np.int64),
    )


def links_between(
    rng: np.random.Generator, pairs: Sequence[tuple[int, int]], first_row: int, *, bits_per_s: float
) -> Links:
    count = len(pairs)
    return Links(
        first_row=first_row,
        from_site=np.array([a for a, _ in pairs], np.int32),
        to_site=np.array([b for _, b in pairs], np.int32),
        bits_per_s=bits_per_s * rng.lognormal(0.0, 0.6, count),
        delay_s=rng.uniform(0.002, 0.08, count),
        loss=rng.choice([0.0, 1e-5], count),
        egress_micros_per_gb=rng.integers(0, 20_000, count),
    )


def goods_of(names: Sequence[tuple[int, int, int]], pools: Pools, rows: Rows, slots: int) -> Goods:
    supply = capacity(rows)[: slots * len(pools.site)].reshape(slots, -1)
    offers, limits, counts = [], [], []
    for kind, first, end in names:
        found = np.flatnonzero(pools.kind == kind)
        limit = np.minimum(pools.job_max[found], supply[first:end, found].min(axis=0))
        found, limit = found[limit > 0], limit[limit > 0]
        offers.append(found)
        limits.append(limit)
        counts.append(len(found))
    return Goods(
        kind=np.array([name[0] for name in names], np.int32),
        first=np.array([name[1] for name in names], np.int32),
        end=np.array([name[2] for name in names], np.int32),
        offer_start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        offer_pool=np.concatenate(offers).astype(np.int32),
        offer_limit=np.concatenate(limits).astype(np.int64),
    )


def starts_of(owner: Sequence[int], count: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.bincount(np.asarray(owner, np.int64), minlength=count))]).astype(np.int64)


def no_singles(count: int) -> Singles:
    none = np.zeros(0, np.int64)
    return Singles(np.zeros(count + 1, np.int64), none.astype(np.int32), none, none, none.astype(float), none)


def with_singles(instance: Instance, job: Sequence[int], good: Sequence[int], gpus: Sequence[int]) -> Instance:
    owner, goods, counts = (np.asarray(part, np.int64) for part in (job, good, gpus))
    value, data, speed = np.zeros(len(owner), np.int64), np.zeros(len(owner), np.int64), np.zeros(len(owner))
    _fill_singles(instance, owner, goods, counts, value, speed, data)
    keep = value > 0
    return instance._replace(
        singles=Singles(
            start=starts_of(owner[keep], instance.job_count),
            good=goods[keep].astype(np.int32),
            gpus=counts[keep],
            value=value[keep],
            speed=speed[keep],
            data_bytes_per_s=data[keep],
        )
    )


@compiled
def _fill_singles(
    instance: Instance,
    job: np.ndarray,
    good: np.ndarray,
    gpus: np.ndarray,
    value: np.ndarray,
    speed: np.ndarray,
    data: np.ndarray,
) -> None:
    jobs, goods = instance.jobs, instance.goods
    for index in range(len(job)):
        j, g = job[index], good[index]
        step_s = kernel.kind_step_s(instance, j, goods.kind[g], gpus[index])
        speed[index] = jobs.batch_per_gpu[j] * gpus[index] / step_s
        data[index] = np.int64(math.ceil(jobs.data_bytes_per_sample[j] * speed[index]))
        if jobs.samples_left[j] / speed[index] > jobs.deadline_s[j]:
            value[index] = -1
            continue
        term_s = kernel.term_seconds(instance, j, speed[index])
        rate = min(kernel.value_rate(jobs, j, speed[index]), kernel.affordable_rate(jobs, j, term_s, 2))
        if jobs.own[j] >= 0:
            rate -= kernel.restart_rate(jobs, j, term_s)
        value[index] = rate * np.int64(goods.end[g] - goods.first[g])


def patterns_of(
    found: Sequence[tuple[Sequence[int], Sequence[int], int, Sequence[int], Sequence[int]]], start: Sequence[int]
) -> Patterns:
    count = len(found)
    pool, up, down = (np.full((count, SPAN_SITES_MAX), NONE, np.int32) for _ in range(3))
    weight = np.zeros((count, SPAN_SITES_MAX), np.int32)
    parts, hub = np.zeros(count, np.int32), np.zeros(count, np.int32)
    for index, (pools, weights, center, ups, downs) in enumerate(found):
        size = len(pools)
        pool[index, :size], weight[index, :size], up[index, :size], down[index, :size] = pools, weights, ups, downs
        parts[index], hub[index] = size, center
    return Patterns(pool, weight, parts, hub, up, down, np.array(start, np.int64))


def hub_links(
    sites: Sequence[int], hub: int, link_of: dict[tuple[int, int], int]
) -> tuple[list[int], list[int]] | None:
    """Return the links to and from the hub by part, None where one is missing."""
    up, down = [], []
    for part, site in enumerate(sites):
        if part == hub:
            up.append(NONE)
            down.append(NONE)
            continue
        pair = (site, sites[hub])
        if pair not in link_of:
            return None
        up.append(link_of[pair])
        down.append(link_of[pair[::-1]])
    return up, down
