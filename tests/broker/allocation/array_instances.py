"""Markets as arrays, without a snapshot: small ones with every feature, and large ones to measure with.

`small` is for brute force: a few jobs and pools, every feature at random. `large` follows a federation
of S sites in S/12 regions and two to six continents, three to five GPU types per site, links in a
ring and at random up to degree six, demand 1.3 times the supply:

    A   loose: one job may fill a pool
    B   fragmented: at most a quarter of a pool for one job, links at 0.3 of A's bandwidth
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from broker.allocation import kernel
from broker.allocation.compiled import compiled
from broker.allocation.instance import (
    NONE,
    SHARES,
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
    capacity,
    stated_plans,
)

TERM_S = 3600.0
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


def small(seed: int) -> Instance:  # noqa: PLR0912, PLR0915 - one market, written out feature by feature
    """Return a market of 3 to 8 jobs whose columns can all be listed."""
    rng = np.random.default_rng(seed)
    slots = int(rng.integers(1, 4))
    site_count = int(rng.integers(3, 6))
    kind_count = int(rng.integers(1, 4))
    sites = Sites(
        region=rng.integers(-1, 2, site_count).astype(np.int32),
        continent=rng.integers(-1, 2, site_count).astype(np.int32),
    )
    places = [(s, k) for s in range(site_count) for k in range(kind_count) if rng.random() < 0.75] or [(0, 0)]
    sizes = rng.integers(2, 13, len(places))
    pools = Pools(
        site=np.array([s for s, _ in places], np.int32),
        kind=np.array([k for _, k in places], np.int32),
        job_max=np.minimum(sizes, rng.integers(1, 13, len(places))).astype(np.int64),
    )
    pairs = [(a, b) for a, b in itertools.permutations(range(site_count), 2) if rng.random() < 0.8]
    pairs = [pair for pair in pairs if pair[::-1] in pairs]
    tenants = int(rng.integers(0, 3))
    floors = int(rng.integers(0, 3))
    pool_rows = len(places) * slots
    links = _links(rng, pairs, pool_rows, bits_per_s=2e8)
    steps: list[list[tuple[int, int]]] = []
    base: list[int] = []
    for _ in range(slots):
        for size in sizes:
            curve, cost, left = [], int(rng.integers(100_000, 900_000)), int(size)
            while left > 0:
                units = int(rng.integers(1, left + 1)) if len(curve) < 2 else left
                curve.append((units, cost))
                left -= units
                cost += int(rng.integers(0, 400_000))
            free = int(rng.integers(0, 2)) if rng.random() < 0.2 else 0
            base.append(free)
            steps.append(curve)
    for _ in pairs:
        base.append(0)
        steps.append([(SHARES, 0)])
    for _ in range(tenants):
        base.append(SHARES)
        steps.append([])
    floor_units = rng.integers(1, 6, floors)
    for units in floor_units:
        base.append(-int(units))
        steps.append([(int(units), int(rng.integers(50_000, 600_000)))])
    rows = _rows(base, steps)
    jobs_count = int(rng.integers(3, 9))
    types = max(kind_count, 1)
    kinds = Kinds(
        gpu_type=np.arange(kind_count, dtype=np.int32),
        flops_per_s=rng.uniform(5e12, 60e12, kind_count),
        ring_bits_per_s=rng.uniform(2e10, 2e11, kind_count),
    )
    goods = _goods(
        [
            (k, a, b)
            for k in range(kind_count)
            for a in range(slots)
            for b in range(a + 1, slots + 1)
            if a == 0 or rng.random() < 0.6
        ],
        pools,
        rows,
        slots,
    )
    patterns, families = _small_patterns(rng, pools, pairs, kind_count)
    site_sets = rng.integers(1, 2**site_count, (3, 1)).astype(np.uint64)
    price = rng.uniform(0, 9e6, (jobs_count, TIERS)).astype(np.int64)
    price[:, 0] = 0
    price = np.sort(price, axis=1)
    price[np.arange(TIERS)[None, :] > rng.integers(1, TIERS + 1, jobs_count)[:, None]] = -1
    home = rng.integers(-1, site_count, jobs_count).astype(np.int32)
    flops = rng.uniform(5e12, 60e12, (jobs_count, types))
    flops[rng.random((jobs_count, types)) < 0.5] = np.nan
    ring = np.full((jobs_count, types), np.nan)
    # Some leave their plan to the market; drawn apart, so that the rest is as it is without them.
    open_draw = np.random.default_rng(jobs_count)
    sync_open = open_draw.random(jobs_count) < 0.4
    leaves_period = sync_open & (open_draw.random(jobs_count) < 0.7)
    jobs = Jobs(
        must=np.zeros(jobs_count, bool),
        own=np.full(jobs_count, NONE, np.int32),
        locked=np.zeros(jobs_count, np.int64),
        home=home,
        tier_price=price,
        site_set=np.where(rng.random(jobs_count) < 0.3, rng.integers(0, 3, jobs_count), -1).astype(np.int32),
        budget_row=np.full(jobs_count, NONE, np.int32),
        budget=np.zeros(jobs_count, np.int64),
        floor_row=np.full(jobs_count, NONE, np.int32),
        value_base=np.stack([np.zeros(jobs_count), rng.uniform(1e5, 8e6, jobs_count)], axis=1),
        value_slope=np.stack([rng.uniform(200, 4000, jobs_count), rng.uniform(0, 300, jobs_count)], axis=1),
        hold_left=rng.integers(10**6, 3 * 10**7, jobs_count),
        samples_left=rng.uniform(1e5, 1e8, jobs_count),
        deadline_s=np.where(rng.random(jobs_count) < 0.6, np.inf, rng.uniform(2e3, 1e5, jobs_count)),
        restart=np.zeros(jobs_count, np.int64),
        batch_per_gpu=rng.integers(8, 129, jobs_count).astype(float),
        parameters=rng.uniform(1e7, 1e9, jobs_count),
        flops_per_sample=rng.uniform(1e10, 1e11, jobs_count),
        data_bytes_per_sample=rng.choice([0.0, 1e3, 1e4], jobs_count),
        period_steps=np.where(leaves_period, 20.0, rng.integers(20, 400, jobs_count)),
        codec=rng.integers(-1, 3, jobs_count).astype(np.int32),
        sync_open=sync_open,
        samples=open_draw.uniform(1e6, 1e9, jobs_count).round(),
        target=open_draw.choice([0.8, 0.95, 0.99], jobs_count),
        egress_gb_max=open_draw.choice([np.inf, 0.1, 10.0], jobs_count),
        fragments=open_draw.integers(1, 6, jobs_count).astype(float),
        flops_per_s=flops,
        ring_bits_per_s=ring,
        barred_start=np.zeros(jobs_count + 1, np.int64),
        barred=np.zeros(0, np.int64),
    )
    if tenants:
        tenant = rng.integers(-1, tenants, jobs_count)
        tenant_budget = rng.integers(10**6, 2 * 10**7, tenants)
        jobs = jobs._replace(
            budget_row=np.where(tenant >= 0, pool_rows + len(pairs) + tenant, NONE).astype(np.int32),
            budget=np.where(tenant >= 0, tenant_budget[tenant], 0),
        )
    if floors:
        floor = rng.integers(-1, floors, jobs_count)
        jobs = jobs._replace(
            floor_row=np.where(floor >= 0, pool_rows + len(pairs) + tenants + floor, NONE).astype(np.int32)
        )
    jobs, bundles = _small_bundles(rng, jobs, rows, pools, links, slots)
    wanted = [[g for g in range(len(goods.kind)) if rng.random() < 0.6] for _ in range(jobs_count)]
    single_job, single_good, single_gpus = [], [], []
    span_job, span_family, span_gpus, span_sites, span_slots = [], [], [], [], []
    for job in range(jobs_count):
        for good in wanted[job]:
            for gpus in sorted(set(rng.integers(1, 9, 3).tolist())):
                single_job.append(job)
                single_good.append(good)
                single_gpus.append(gpus)
        for family in range(families):
            if rng.random() < 0.5:
                for gpus in sorted(set(rng.integers(2, 14, 2).tolist())):
                    span_job.append(job)
                    span_family.append(family)
                    span_gpus.append(gpus)
                    span_sites.append(int(rng.integers(2, 4)))
                    span_slots.append(int(rng.integers(1, slots + 1)))
    instance = Instance(
        slots=slots,
        term_s=TERM_S,
        rows=rows,
        sites=sites,
        pools=pools,
        kinds=kinds,
        links=links,
        goods=goods,
        jobs=jobs,
        site_sets=site_sets,
        singles=_no_singles(jobs_count),
        patterns=patterns,
        spans=Spans(
            start=_starts(span_job, jobs_count),
            family=np.array(span_family, np.int32),
            gpus=np.array(span_gpus, np.int64),
            sites_max=np.array(span_sites, np.int32),
            slots=np.array(span_slots, np.int32),
        ),
        bundles=bundles,
    )
    return _with_barred(rng, _with_singles(instance, single_job, single_good, single_gpus))


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
    links = _links(rng, pairs, len(places), bits_per_s=2e10 * (0.3 if family == "B" else 1.0))
    asks = np.array([_TYPES[k][2] for _, k in places]) * rng.uniform(0.9, 1.1, len(places))
    base = [0] * (len(places) + len(pairs))
    steps = [[(int(n), int(ask))] for n, ask in zip(sizes, asks, strict=True)] + [[(SHARES, 0)] for _ in pairs]
    rows = _rows(base, steps)
    kinds = Kinds(
        gpu_type=np.arange(len(_TYPES), dtype=np.int32),
        flops_per_s=np.array([t[0] for t in _TYPES]) * 1e12,
        ring_bits_per_s=np.array([t[1] for t in _TYPES]) * 1e9,
    )
    goods = _goods([(k, 0, 1) for k in range(len(_TYPES))], pools, rows, 1)
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
        singles=_no_singles(job_count),
        patterns=patterns,
        spans=Spans(
            start=_starts(span_job, job_count),
            family=span_family.astype(np.int32),
            gpus=span_gpus.astype(np.int64),
            sites_max=spans_max[span_job].astype(np.int32),
            slots=np.ones(len(span_job), np.int32),
        ),
        bundles=_no_bundles(job_count),
    )
    return _with_singles(instance, single_job, single_good, grid[single_gpus])


def _rows(base: Sequence[int], steps: Sequence[Sequence[tuple[int, int]]]) -> Rows:
    flat = [step for curve in steps for step in curve]
    return Rows(
        base=np.array(base, np.int64),
        step_start=np.concatenate([[0], np.cumsum([len(curve) for curve in steps])]).astype(np.int64),
        step_units=np.array([units for units, _ in flat], np.int64),
        step_cost=np.array([cost for _, cost in flat], np.int64),
    )


def _links(rng: np.random.Generator, pairs: Sequence[tuple[int, int]], first_row: int, *, bits_per_s: float) -> Links:
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


def _goods(names: Sequence[tuple[int, int, int]], pools: Pools, rows: Rows, slots: int) -> Goods:
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


def _starts(owner: Sequence[int], count: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.bincount(np.asarray(owner, np.int64), minlength=count))]).astype(np.int64)


def _no_singles(count: int) -> Singles:
    none = np.zeros(0, np.int64)
    return Singles(np.zeros(count + 1, np.int64), none.astype(np.int32), none, none, none.astype(float), none)


def _no_bundles(count: int) -> Bundles:
    none = np.zeros(0, np.int64)
    return Bundles(np.zeros(count + 1, np.int64), none, none, np.zeros(1, np.int64), none.astype(np.int32), none)


def _grid_of(mask: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (job, good, position in GRID) of every allowed type and count, in that order."""
    position = np.arange(len(GRID))
    inside = (position[None, :] >= low[:, None]) & (position[None, :] <= high[:, None])
    job, good, place = np.nonzero(mask[:, :, None] & inside[:, None, :])
    return job, good, place


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


def _with_singles(instance: Instance, job: Sequence[int], good: Sequence[int], gpus: Sequence[int]) -> Instance:
    owner, goods, counts = (np.asarray(part, np.int64) for part in (job, good, gpus))
    value, data, speed = np.zeros(len(owner), np.int64), np.zeros(len(owner), np.int64), np.zeros(len(owner))
    _fill_singles(instance, owner, goods, counts, value, speed, data)
    keep = value > 0
    return instance._replace(
        singles=Singles(
            start=_starts(owner[keep], instance.job_count),
            good=goods[keep].astype(np.int32),
            gpus=counts[keep],
            value=value[keep],
            speed=speed[keep],
            data_bytes_per_s=data[keep],
        )
    )


def _with_barred(rng: np.random.Generator, instance: Instance) -> Instance:
    """Veto a few of the columns."""
    lists: list[list[int]] = []
    for job in range(instance.job_count):
        barred = []
        for single in range(instance.singles.start[job], instance.singles.start[job + 1]):
            good = instance.singles.good[single]
            for offer in range(instance.goods.offer_start[good], instance.goods.offer_start[good + 1]):
                if rng.random() < 0.02:
                    barred.append(int(kernel.column_key(0, single, int(instance.goods.offer_pool[offer]))))
        for span in range(instance.spans.start[job], instance.spans.start[job + 1]):
            family = instance.spans.family[span]
            for pattern in range(instance.patterns.family_start[family], instance.patterns.family_start[family + 1]):
                if rng.random() < 0.02:
                    barred.append(int(kernel.column_key(1, span, pattern)))
        lists.append(barred)
    return instance._replace(
        jobs=instance.jobs._replace(
            barred_start=np.concatenate([[0], np.cumsum([len(barred) for barred in lists])]).astype(np.int64),
            barred=np.array([key for barred in lists for key in barred], np.int64),
        )
    )


def _patterns(
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


def _hub_links(
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


def _small_patterns(
    rng: np.random.Generator, pools: Pools, pairs: Sequence[tuple[int, int]], kind_count: int
) -> tuple[Patterns, int]:
    link_of = {pair: index for index, pair in enumerate(pairs)}
    families = [[k, k] for k in range(kind_count)] + [[k, k, k] for k in range(kind_count)]
    families += [list(pair) for pair in itertools.combinations(range(kind_count), 2)]
    found, start = [], [0]
    for kinds in families:
        # Every set of pools on different sites with these kinds, in order of sites.
        for members in itertools.combinations(range(len(pools.site)), len(kinds)):
            sites = [int(pools.site[p]) for p in members]
            if len(set(sites)) < len(sites) or sorted(int(pools.kind[p]) for p in members) != sorted(kinds):
                continue
            for weights in ([1] * len(members), [2] + [1] * (len(members) - 1), [1] * (len(members) - 1) + [3]):
                hub = int(rng.integers(0, len(members)))
                ends = _hub_links(sites, hub, link_of)
                if ends and rng.random() < 0.6:
                    found.append((members, weights, hub, *ends))
        start.append(len(found))
    return _patterns(found, start), len(families)


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
                ends = _hub_links((a, b), 0, link_of)
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
                ends = _hub_links(members, hub, link_of)
                assert ends is not None
                found.append(([pool_of[site, kind] for site in members], (1, 1, 1), hub, *ends))
        start.append(len(found))
    return _patterns(found, start)


def _small_bundles(
    rng: np.random.Generator, jobs: Jobs, rows: Rows, pools: Pools, links: Links, slots: int
) -> tuple[Jobs, Bundles]:
    """Give some jobs an incumbent bundle, some of them inside a term; all of those fit together."""
    count, pool_count = len(jobs.must), len(pools.site)
    left = capacity(rows)
    must, own, locked, restart = jobs.must.copy(), jobs.own.copy(), jobs.locked.copy(), jobs.restart.copy()
    start, value, charge, entry_start, row, use = [0], [], [], [0], [], []
    for job in range(count):
        for number in range(int(rng.integers(0, 3)) if rng.random() < 0.5 else 0):
            until = int(rng.integers(1, slots + 1))
            entries: dict[int, int] = {}
            members = (
                rng.choice(pool_count, int(rng.integers(1, 3)), replace=False) if pool_count > 1 else np.array([0])
            )
            total = 0
            for pool in members:
                gpus = int(rng.integers(1, 4))
                total += gpus
                for slot in range(until):
                    entries[slot * pool_count + int(pool)] = gpus
            if len(members) > 1 and len(links.from_site) > 1:
                entries[links.first_row + int(rng.integers(0, len(links.from_site)))] = int(rng.integers(1, 4000))
            worth = int(rng.integers(200_000, 9_000_000))
            if jobs.budget_row[job] >= 0:
                entries[int(jobs.budget_row[job])] = math.ceil(worth * SHARES / int(jobs.budget[job]))
            if jobs.floor_row[job] >= 0:
                entries[int(jobs.floor_row[job])] = -total
            if number == 0:
                own[job] = len(value)
                restart[job] = int(rng.integers(0, 500_000))
                if rng.random() < 0.6 and all(left[r] >= u for r, u in entries.items()):
                    must[job] = True
                    locked[job] = int(rng.integers(0, 400_000))
                    for r, u in entries.items():
                        left[r] -= max(u, 0)
            value.append(worth * until)
            charge.append(worth)
            for r in sorted(entries):
                row.append(r)
                use.append(entries[r])
            entry_start.append(len(row))
        start.append(len(value))
    bundles = Bundles(
        start=np.array(start, np.int64),
        value=np.array(value, np.int64),
        charge_max=np.array(charge, np.int64),
        entry_start=np.array(entry_start, np.int64),
        entry_row=np.array(row, np.int32),
        entry_use=np.array(use, np.int64),
    )
    return jobs._replace(must=must, own=own, locked=locked, restart=restart), bundles
