"""Large markets as arrays, without a snapshot, to measure with.

A federation of S sites in S/12 regions and two to six continents, three to five GPU types per site, links in a
ring and at random up to degree six, demand 1.3 times the supply:

    A   loose: one job may fill a pool
    B   fragmented: at most a quarter of a pool for one job, links at 0.3 of A's bandwidth
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from broker.allocation.instance import (
    NONE,
    SHARES,
    TIERS,
    Bundles,
    Instance,
    Jobs,
    Kinds,
    Patterns,
    Pools,
    Sites,
    Spans,
    stated_plans,
)
from tests.broker.allocation.array_parts import (
    TERM_S,
    goods_of,
    hub_links,
    links_between,
    no_singles,
    patterns_of,
    rows_of,
    starts_of,
    with_singles,
)

GRID = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
# GPU types of the large markets: TFLOP/s achieved, ring Gbit/s, ask in micro-credits per GPU hour.
_TYPES = (
    (8.0, 60.0, 164_000),
    (14.0, 60.0, 192_000),
    (16.0, 80.0, 333_000),
    (35.0, 150.0, 677_000),
    (90.0, 600.0, 1_106_000),
)
_LOAD = 1.3


def large(  # noqa: PLR0915 - one market, written out feature by feature
    job_count: int, site_count: int, family: str, seed: int, *, bespoke: float = 0.0, spanning: float = 0.25
) -> Instance:
    """Return a market of family "A" or "B"; `bespoke` is the share of jobs with a site list of their own.

    One slot, no incumbents, no budgets, one ask per pool.
    """
    rng = np.random.default_rng((seed, job_count, site_count))
    region_count = max(1, site_count // 12)
    continent_count = min(6, max(2, region_count // 6))
    region = np.sort(rng.integers(0, region_count, site_count))
    sites = Sites(region=region.astype(np.int32), continent=(region * continent_count // region_count).astype(np.int32))
    places = [
        (s, int(k))
        for s in range(site_count)
        for k in np.sort(rng.choice(len(_TYPES), int(rng.integers(3, 6)), replace=False))
    ]
    low = np.minimum(rng.geometric(0.22, job_count) - 1, 6)
    high = np.minimum(low + rng.integers(2, 6, job_count), len(GRID) - 1)
    grid = np.array(GRID)
    typical = grid[(low + high) // 2]
    weights = rng.lognormal(0.0, 0.7, len(places))
    sizes = np.maximum(2, np.rint(weights / weights.sum() * typical.sum() / _LOAD)).astype(np.int64)
    pools = Pools(
        site=np.array([s for s, _ in places], np.int32),
        kind=np.array([k for _, k in places], np.int32),
        job_max=np.maximum(1, sizes // 4) if family == "B" else sizes,
    )
    neighbours: set[tuple[int, int]] = {(s, (s + 1) % site_count) for s in range(site_count)}
    while len(neighbours) < min(3 * site_count, site_count * (site_count - 1) // 2):
        a, b = (int(v) for v in rng.integers(0, site_count, 2))
        if a != b and (b, a) not in neighbours:
            neighbours.add((a, b))
    pairs = sorted(neighbours | {(b, a) for a, b in neighbours})
    links = links_between(rng, pairs, len(places), bits_per_s=2e10 * (0.3 if family == "B" else 1.0))
    asks = np.array([_TYPES[k][2] for _, k in places]) * rng.uniform(0.9, 1.1, len(places))
    base = [0] * (len(places) + len(pairs))
    steps = [[(int(n), int(ask))] for n, ask in zip(sizes, asks, strict=True)] + [[(SHARES, 0)] for _ in pairs]
    rows = rows_of(base, steps)
    kinds = Kinds(
        gpu_type=np.arange(len(_TYPES), dtype=np.int32),
        flops_per_s=np.array([t[0] for t in _TYPES]) * 1e12,
        ring_bits_per_s=np.array([t[1] for t in _TYPES]) * 1e9,
    )
    goods = goods_of([(k, 0, 1) for k in range(len(_TYPES))], pools, rows, 1)
    parameters = rng.lognormal(math.log(8e8), 1.0, job_count)
    batch = rng.choice([16.0, 32.0, 64.0], job_count)
    flops_per_sample = rng.lognormal(math.log(2e11), 0.8, job_count)
    affinity = rng.lognormal(0.0, 0.25, (job_count, len(_TYPES)))
    tier = rng.choice([1, 2, 3], job_count, p=[0.25, 0.35, 0.4])
    price = np.tile(np.array([0, 20_000, 80_000, 200_000], np.int64), (job_count, 1))
    price[np.arange(TIERS)[None, :] > tier[:, None]] = -1
    words = (site_count + 63) // 64
    chosen = rng.random(job_count) < bespoke
    sets = np.zeros((max(1, int(chosen.sum())), words), np.uint64)
    for index in range(int(chosen.sum())):
        for site in rng.choice(site_count, max(1, site_count // 3), replace=False):
            sets[index, site >> 6] |= np.uint64(1) << np.uint64(site & 63)
    site_set = np.full(job_count, NONE, np.int32)
    site_set[chosen] = np.arange(int(chosen.sum()))
    # What a job would make of its typical count on V100s, and what it pays for that hour.
    step_s = batch * flops_per_sample / kinds.flops_per_s[3]
    typical_speed = batch * typical / step_s
    worth = typical * 677_000 * rng.lognormal(0.6, 0.6, job_count)
    fraction = rng.uniform(0.3, 0.7, job_count)
    value_slope = np.stack([worth / typical_speed, worth * fraction / typical_speed, np.zeros(job_count)], axis=1)
    value_base = np.stack(
        [np.zeros(job_count), worth * (1 - fraction), worth * rng.uniform(1.1, 2.5, job_count)], axis=1
    )
    samples_left = typical_speed * rng.uniform(3_600, 400_000, job_count)
    jobs = Jobs(
        must=np.zeros(job_count, bool),
        own=np.full(job_count, NONE, np.int32),
        locked=np.zeros(job_count, np.int64),
        home=rng.integers(0, site_count, job_count).astype(np.int32),
        tier_price=price,
        site_set=site_set,
        budget_row=np.full(job_count, NONE, np.int32),
        budget=np.zeros(job_count, np.int64),
        floor_row=np.full(job_count, NONE, np.int32),
        value_base=value_base,
        value_slope=value_slope,
        hold_left=(worth * rng.uniform(0.8, 3.0, job_count)).astype(np.int64),
        samples_left=samples_left,
        deadline_s=np.where(
            rng.random(job_count) < 0.5, np.inf, samples_left / typical_speed * rng.uniform(0.5, 3.0, job_count)
        ),
        restart=np.zeros(job_count, np.int64),
        batch_per_gpu=batch,
        parameters=parameters,
        flops_per_sample=flops_per_sample,
        data_bytes_per_sample=rng.choice([0.0, 2e2, 2e3], job_count),
        period_steps=rng.integers(30, 300, job_count).astype(float),
        codec=rng.choice(np.array([-1, 1, 1], np.int32), job_count).astype(np.int32),
        **stated_plans(job_count),
        flops_per_s=kinds.flops_per_s[None, :] * affinity,
        ring_bits_per_s=np.full((job_count, len(_TYPES)), np.nan),
        barred_start=np.zeros(job_count + 1, np.int64),
        barred=np.zeros(0, np.int64),
    )
    patterns = _large_patterns(rng, pools, pairs, site_count)
    mask = rng.random((job_count, len(_TYPES))) < 0.6
    mask[np.arange(job_count), rng.integers(0, len(_TYPES), job_count)] = True
    single_job, single_good, single_gpus = _grid_of(mask, low, high)
    spans_max = np.where(rng.random(job_count) < spanning, rng.integers(2, 4, job_count), 1)
    # Spans are asked for at the three largest counts of a job, from 4 GPUs up.
    span_rows = []
    many = grid[single_gpus] >= np.maximum(4, grid[np.maximum(low, high - 2)][single_job])
    for parts in (2, 3):
        chosen_spans = many & (spans_max[single_job] >= parts)
        span_rows.append(
            np.stack(
                [
                    single_job[chosen_spans],
                    (parts - 2) * len(_TYPES) + single_good[chosen_spans],
                    grid[single_gpus[chosen_spans]],
                ]
            )
        )
    span_job, span_family, span_gpus = np.concatenate(span_rows, axis=1)
    order = np.lexsort((span_gpus, span_family, span_job))
    span_job, span_family, span_gpus = span_job[order], span_family[order], span_gpus[order]
    instance = Instance(
        slots=1,
        term_s=TERM_S,
        rows=rows,
        sites=sites,
        pools=pools,
        kinds=kinds,
        links=links,
        goods=goods,
        jobs=jobs,
        site_sets=sets,
        singles=no_singles(job_count),
        patterns=patterns,
        spans=Spans(
            start=starts_of(span_job, job_count),
            family=span_family.astype(np.int32),
            gpus=span_gpus.astype(np.int64),
            sites_max=spans_max[span_job].astype(np.int32),
            slots=np.ones(len(span_job), np.int32),
        ),
        bundles=_no_bundles(job_count),
    )
    return with_singles(instance, single_job, single_good, grid[single_gpus])


def _no_bundles(count: int) -> Bundles:
    none = np.zeros(0, np.int64)
    return Bundles(np.zeros(count + 1, np.int64), none, none, np.zeros(1, np.int64), none.astype(np.int32), none)


def _grid_of(mask: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (job, good, position in GRID) of every allowed type and count, in that order."""
    position = np.arange(len(GRID))
    inside = (position[None, :] >= low[:, None]) & (position[None, :] <= high[:, None])
    job, good, place = np.nonzero(mask[:, :, None] & inside[:, None, :])
    return job, good, place


def _large_patterns(
    rng: np.random.Generator, pools: Pools, pairs: Sequence[tuple[int, int]], site_count: int
) -> Patterns:
    link_of = {pair: index for index, pair in enumerate(pairs)}
    pool_of = {(int(s), int(k)): index for index, (s, k) in enumerate(zip(pools.site, pools.kind, strict=True))}
    near: list[list[int]] = [[] for _ in range(site_count)]
    for a, b in pairs:
        near[a].append(b)
    found, start = [], [0]
    for kind in range(len(_TYPES)):
        for a, b in pairs:
            if a < b and (a, kind) in pool_of and (b, kind) in pool_of:
                ends = hub_links((a, b), 0, link_of)
                assert ends is not None
                found.extend(
                    ((pool_of[a, kind], pool_of[b, kind]), weights, 0, *ends) for weights in ((1, 1), (2, 1), (1, 2))
                )
        start.append(len(found))
    for kind in range(len(_TYPES)):
        for hub_site in range(site_count):
            for others in itertools.combinations(near[hub_site], 2):
                members = tuple(sorted((hub_site, *others)))
                if any((site, kind) not in pool_of for site in members):
                    continue
                hub = members.index(hub_site)
                ends = hub_links(members, hub, link_of)
                assert ends is not None
                found.append(([pool_of[site, kind] for site in members], (1, 1, 1), hub, *ends))
        start.append(len(found))
    return patterns_of(found, start)
