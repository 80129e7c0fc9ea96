"""Small markets as arrays for brute force: a few jobs and pools, every feature at random."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from broker.allocation import kernel
from broker.allocation.instance import (
    NONE,
    SHARES,
    TIERS,
    Bundles,
    Instance,
    Jobs,
    Kinds,
    Links,
    Patterns,
    Pools,
    Rows,
    Sites,
    Spans,
    capacity,
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
    links = links_between(rng, pairs, pool_rows, bits_per_s=2e8)
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
    rows = rows_of(base, steps)
    jobs_count = int(rng.integers(3, 9))
    types = max(kind_count, 1)
    kinds = Kinds(
        gpu_type=np.arange(kind_count, dtype=np.int32),
        flops_per_s=rng.uniform(5e12, 60e12, kind_count),
        ring_bits_per_s=rng.uniform(2e10, 2e11, kind_count),
    )
    goods = goods_of(
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
        singles=no_singles(jobs_count),
        patterns=patterns,
        spans=Spans(
            start=starts_of(span_job, jobs_count),
            family=np.array(span_family, np.int32),
            gpus=np.array(span_gpus, np.int64),
            sites_max=np.array(span_sites, np.int32),
            slots=np.array(span_slots, np.int32),
        ),
        bundles=bundles,
    )
    return _with_barred(rng, with_singles(instance, single_job, single_good, single_gpus))


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
                ends = hub_links(sites, hub, link_of)
                if ends and rng.random() < 0.6:
                    found.append((members, weights, hub, *ends))
        start.append(len(found))
    return patterns_of(found, start), len(families)


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
