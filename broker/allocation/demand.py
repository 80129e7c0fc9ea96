"""What every job would rather have at the published prices, found by looking at everything at once.

The verifier's own oracle: for each job, count and way to divide it, all pools or groups of sites
are valued together as numpy columns. Slow, and with nothing in common with the solver's: the point.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from broker.allocation.configuration import TERM_MARGIN, TERM_S_MIN
from broker.allocation.errors import AllocationError
from broker.allocation.rules import (
    RATE_MAX,
    SHARES,
    SPAN_SITES_MAX,
    TIER_OF_RESIDENCY,
    WEIGHTS,
    Row,
    Rules,
    ladder,
)
from broker.allocation.snapshot import JobState
from training import throughput
from training.catalogue import GPU_TYPES
from training.spec import GpuRequest

Array = NDArray[Any]
Prices = Mapping[Row, int]
# The closed form works on columns element by element, though it is written for one.
_compute_s = cast("Callable[..., Array]", throughput.compute_s)
_all_reduce_s = cast("Callable[..., Array]", throughput.all_reduce_s)
_link_transfer_s = cast("Callable[..., Array]", throughput.link_transfer_s)
# Sites of a pair: it may mix types, and its hub is the first by name.
PAIR: Final = 2
# Nothing that may not be had is ever best.
NEVER: Final = -(2**62)
# As the chapter says: how many groups there may be, and of how many of a hub's best neighbours.
GROUPS_MAX: Final = 200_000
NEIGHBOURS_MAX: Final = 16


@dataclass(frozen=True, slots=True)
class _Bench:
    """The pools of some GPU types, by column: index of site, speed, supply and price by slot."""

    pool_ids: tuple[str, ...]
    site: Array
    flops_per_s: Array
    ring_bits_per_s: Array
    most: Array
    price: Array


@dataclass(frozen=True, slots=True)
class _Groups:
    """Groups of sites with one way to divide GPUs: [group, part] pools of a bench, and links."""

    weights: tuple[int, ...]
    pool: Array
    up: Array
    down: Array


class Demand:
    """Every job's best surplus at given prices of rows."""

    def __init__(self, rules: Rules, prices: Prices) -> None:
        """Lay the pools, the links and the groups of sites out in columns."""
        self._rules, self._prices = rules, prices
        self._slots = rules.snapshot.slots
        self._bench = self._laid_out()
        self._of_type: dict[str, Array] = {}
        kinds = [pool.gpu_type for pool in rules.pools.values()]
        for gpu_type in sorted(set(kinds)):
            self._of_type[gpu_type] = np.array([i for i, kind in enumerate(kinds) if kind == gpu_type])
        pairs = list(rules.links)
        self._link_number = {pair: number for number, pair in enumerate(pairs)}
        rows = list(rules.links.values())
        self._bits = np.array([row.bandwidth_bits_per_s for row in rows])
        self._delay = np.array([row.delay_s for row in rows])
        self._loss = np.array([row.loss for row in rows])
        self._egress = np.array([row.egress_price_micros_per_gb for row in rows], dtype=np.int64)
        self._link_price = np.array([prices.get(("link", *pair), 0) for pair in pairs], dtype=np.int64)
        self._groups: dict[tuple[str, ...], list[_Groups]] = {}

    def best(self, job: JobState) -> int:
        """Return a job's best surplus over its slots; 0 is staying out, unless it is inside its term."""
        found = [] if job.job_id in self._rules.kept else [0]
        own = self._rules.own(job)
        if own is not None:
            found.append(self.surplus(own.worth, own.rows))
        if self._rules.left(job) > 0:
            found += [int(most) for most in self._on_one_site(job)]
            found += [int(most) for most in self._across_sites(job)]
        return max(found)

    def surplus(self, worth: int, rows: Mapping[tuple[str, ...], int]) -> int:
        """Return what an option leaves its job at the prices."""
        return worth - sum(use * self._prices.get(row, 0) for row, use in rows.items())

    def _laid_out(self) -> _Bench:
        rules = self._rules
        pools = list(rules.pools.values())
        defaults = [GPU_TYPES[pool.gpu_type] for pool in pools]
        return _Bench(
            pool_ids=tuple(rules.pools),
            site=np.array([rules.place[pool.site_id] for pool in pools], dtype=np.int64),
            flops_per_s=np.array(
                [p.flops_per_s or d.peak_flops_per_s * d.achieved_share for p, d in zip(pools, defaults, strict=True)]
            ),
            ring_bits_per_s=np.array(
                [p.intra_site_bits_per_s or d.intra_site_bits_per_s for p, d in zip(pools, defaults, strict=True)]
            ),
            most=np.array(
                [
                    [min(rules.supply(pool, slot), pool.job_gpus_max or 2**40) for pool in pools]
                    for slot in range(self._slots)
                ],
                dtype=np.int64,
            ).reshape(self._slots, len(pools)),
            price=np.array(
                [
                    [self._prices.get(("pool", pool_id, str(slot)), 0) for pool_id in rules.pools]
                    for slot in range(self._slots)
                ],
                dtype=np.int64,
            ).reshape(self._slots, len(pools)),
        )

    def _allowed(self, job: JobState) -> tuple[Array, Array]:
        """Return by site whether a job may be there, and what a GB of its data costs there."""
        rules = self._rules
        allowed = np.ones(len(rules.sites), dtype=bool)
        if job.sites_allowed is not None:
            allowed[:] = False
            allowed[[rules.place[site] for site in job.sites_allowed if site in rules.place]] = True
        price = np.zeros(len(rules.sites), dtype=np.int64)
        if job.data is not None:
            tiers = np.array([rules.tier(job, site_id) for site_id in rules.sites])
            allowed &= tiers <= TIER_OF_RESIDENCY[job.data.residency]
            tariff = rules.sites[job.data.home_site].egress_micros_per_gb
            price = np.array([0, tariff.to_region, tariff.to_continent, tariff.beyond], dtype=np.int64)[tiers]
        return allowed, price

    def _speeds(self, job: JobState, pools: Array) -> tuple[Array, Array]:
        flops, ring = self._bench.flops_per_s[pools], self._bench.ring_bits_per_s[pools]
        for measured in job.speeds:
            same = np.isin(pools, self._of_type.get(measured.gpu_type, np.zeros(0, dtype=int)))
            flops = np.where(same, measured.flops_per_s, flops)
            if measured.ring_bits_per_s is not None:
                ring = np.where(same, measured.ring_bits_per_s, ring)
        return flops, ring

    def _on_one_site(self, job: JobState) -> Iterator[int]:
        allowed, tariff = self._allowed(job)
        rules, work = self._rules, job.workload
        for request in job.accelerators:
            pools = self._of_type.get(request.gpu_type)
            if pools is None:
                continue
            pools = pools[allowed[self._bench.site[pools]]]
            if not len(pools):
                continue
            flops, ring = self._speeds(job, pools)
            computing = _compute_s(float(work.batch_per_gpu), work.flops_per_sample, flops)
            for count in ladder(request):
                step = computing + _all_reduce_s(float(work.parameters), count, ring)
                speed = work.batch_per_gpu * count / step
                data = np.ceil((job.data.bytes_per_sample if job.data is not None else 0.0) * speed).astype(np.int64)
                costs = _cost(data, tariff[self._bench.site[pools]])
                hourly = self._hourly(job, speed, 1 + (data > 0))
                # A job that runs is not put off: it stays, moves or ends.
                for start in range(1 if rules.own(job) is not None else self._slots):
                    yield from self._windows(job, pools, count, speed=speed, hourly=hourly, costs=costs, start=start)

    def _windows(
        self, job: JobState, pools: Array, count: int, *, speed: Array, hourly: Array, costs: Array, start: int
    ) -> Iterator[int]:
        """Yield the best surplus of `count` GPUs from slot `start` on, by how many slots it takes."""
        rules = self._rules
        left, length = float(rules.left(job)), rules.snapshot.slot_s
        ok = ~self._late(job, speed, float(start * length) if start else 0.0)
        slots = np.ones(len(pools), dtype=np.int64)
        if self._slots > 1:
            slots = np.clip(np.ceil(left / speed / length), 1, self._slots - start).astype(np.int64)
        for taken in np.unique(slots):
            here = ok & (slots == taken)
            window = slice(start, start + int(taken))
            here = here & (count <= self._bench.most[window][:, pools].min(axis=0))
            later = hourly
            if start:
                waiting = 1.0
                for _ in range(start):
                    waiting *= 1.0 - rules.snapshot.waiting_discount
                later = np.floor(hourly * waiting).astype(np.int64)
            surplus = (later - costs) * taken - count * self._bench.price[window][:, pools].sum(axis=0)
            surplus = surplus - self._tenant(job, self._spend(job, later), count)
            surplus = np.where(here & ~self._barred_single(job, pools, count), surplus, NEVER)
            yield int(surplus.max(initial=NEVER))

    def _spend(self, job: JobState, hourly: Array) -> Array:
        locked = self._rules.locked(job) if job.job_id in self._rules.kept else 0
        return hourly - locked

    def _tenant(self, job: JobState, spend: Array, count: int) -> Array:
        """Return what a job pays for its tenant's budget, less what a floor gives for its GPUs."""
        tenant = self._rules.tenants.get(job.tenant_id) if job.tenant_id is not None else None
        due = np.zeros(len(spend), dtype=np.int64)
        if tenant is None:
            return due
        price = self._prices.get(("budget", tenant.tenant_id), 0)
        if price and tenant.budget_micros_per_hour is not None:
            used = np.ceil(np.maximum(spend, 0).astype(float) * SHARES / float(tenant.budget_micros_per_hour))
            due = due + used.astype(np.int64) * price
        return due - count * self._prices.get(("floor", tenant.tenant_id), 0)

    def _hourly(self, job: JobState, speed: Array, rounded: Array) -> Array:
        """Return the value per hour at each speed, after hold and restart."""
        rules = self._rules
        base, slope = 0.0, float(job.bid_micros_per_million_samples) * 3600.0 / 1e6
        worth: Array = base + slope * speed
        for step in job.bid_steps:
            lower = float(step.bid_micros_per_million_samples) * 3600.0 / 1e6
            base += (slope - lower) * step.above_samples_per_s
            slope = lower
            worth = np.minimum(worth, base + slope * speed)
        worth = np.minimum(np.maximum(0.0, np.floor(worth)), float(RATE_MAX)).astype(np.int64)
        left = float(rules.left(job))
        term = np.minimum(rules.snapshot.term_s, np.maximum(TERM_S_MIN, np.ceil(TERM_MARGIN * left / speed)))
        term = term.astype(np.int64)
        worth = np.minimum(worth, np.maximum(0, job.hold_left_micros - rounded) * 3600 // term)
        if job.incumbent is not None and rules.own(job) is not None:
            worth = worth + (-job.incumbent.restart_cost_micros * 3600) // term
        return worth

    def _late(self, job: JobState, speed: Array, starts_s: float) -> Array:
        if job.deadline_ms is None:
            return np.zeros(len(speed), dtype=bool)
        due_s = (job.deadline_ms - self._rules.snapshot.taken_at_ms) / 1000
        return starts_s + self._rules.left(job) / speed > due_s

    def _barred_single(self, job: JobState, pools: Array, count: int) -> Array:
        if not job.barred:
            return np.zeros(len(pools), dtype=bool)
        return np.array([f"{self._bench.pool_ids[pool]}:{count}" in job.barred for pool in pools])

    # Across sites.

    def _across_sites(self, job: JobState) -> Iterator[int]:
        if job.sites_max < PAIR or job.sync.strategy == "local":
            return
        requests = {request.gpu_type: request for request in job.accelerators}
        for gpu_type, request in sorted(requests.items()):
            for groups in self._groups_of((gpu_type,)):
                for total in ladder(request):
                    yield self._best_group(job, groups, total, None)
        if job.mixed_types:
            for one, other in itertools.combinations(sorted(requests), 2):
                yield from self._mixed(job, requests[one], requests[other])

    def _mixed(self, job: JobState, one: GpuRequest, other: GpuRequest) -> Iterator[int]:
        low, high = min(one.count_min, other.count_min), max(one.count_max, other.count_max)
        most = {one.gpu_type: one.count_max, other.gpu_type: other.count_max}
        span = GpuRequest(gpu_type=one.gpu_type, count_min=low, count_max=high)
        for types in ((one.gpu_type, other.gpu_type), (other.gpu_type, one.gpu_type)):
            for groups in self._groups_of(types):
                for total in ladder(span):
                    yield self._best_group(job, groups, total, [most[gpu_type] for gpu_type in types])

    def _groups_of(self, types: tuple[str, ...]) -> list[_Groups]:
        """Return the groups whose pools have these types: one type for all parts, or one for each of two."""
        if types in self._groups:
            return self._groups[types]
        found = []
        for parts, (sites, hubs) in self._site_groups.items():
            if len(types) == PAIR and parts != PAIR:
                continue
            kinds = types if len(types) == PAIR else types * parts
            pools = np.stack([self._pool_at(kind)[sites[:, part]] for part, kind in enumerate(kinds)], axis=1)
            whole = (pools >= 0).all(axis=1)
            pools, here, hub = pools[whole], sites[whole], hubs[whole]
            if not len(pools):
                continue
            up, down = self._links_of(here, hub)
            found += [_Groups(weights, pools, up, down) for weights in WEIGHTS[parts]]
            if len(types) < PAIR:
                found += self._by_what_they_give(pools, up, down)
        self._groups[types] = found
        return found

    def _by_what_they_give(self, pools: Array, up: Array, down: Array) -> list[_Groups]:
        """Return the groups of unlike pools, divided by the most that each gives one job."""
        gives = self._bench.most[0][pools]
        distinct, number = np.unique(gives, axis=0, return_inverse=True)
        number = number.reshape(-1)
        return [
            _Groups(tuple(weights), pools[number == place], up[number == place], down[number == place])
            for place, weights in enumerate(distinct.tolist())
            if len(set(weights)) > 1
        ]

    @cached_property
    def _site_groups(self) -> dict[int, tuple[Array, Array]]:
        """Return by number of sites: the groups [group, part] in order of site, and each group's hub.

        Two sites that could both be the hub are one group, whose hub is the first by name. Larger
        groups are made of a hub and some of its best neighbours: NEIGHBOURS_MAX of them, or as
        many fewer as keep the whole within GROUPS_MAX. Raises AllocationError where nothing does.
        """
        jobs = [j for j in self._rules.jobs.values() if j.sites_max > 1 and j.sync.strategy != "local"]
        jobs = [job for job in jobs if self._rules.left(job) > 0]
        wanted = {request.gpu_type for job in jobs for request in job.accelerators}
        mixes = {
            pair
            for job in jobs
            if job.mixed_types
            for pair in itertools.permutations(sorted({request.gpu_type for request in job.accelerators}), 2)
        }
        at = {gpu_type: self._pool_at(gpu_type) >= 0 for gpu_type in sorted(wanted)}
        neighbours = self._neighbours(at)
        room, found = GROUPS_MAX, {}
        for parts in range(PAIR, min(SPAN_SITES_MAX, max((job.sites_max for job in jobs), default=1)) + 1):
            nearest = NEIGHBOURS_MAX if parts > PAIR else 2**30
            while True:
                sites, hubs = self._grouped(neighbours, parts, nearest)
                count = sum(int(has[sites].all(axis=1).sum()) for has in at.values())
                if parts == PAIR:
                    count += sum(int((at[a][sites[:, 0]] & at[b][sites[:, 1]]).sum()) for a, b in mixes)
                count *= len(WEIGHTS[parts])
                count += sum(self._unlike(sites, gpu_type) for gpu_type in at)
                if count <= room or nearest <= parts - 1 or parts == PAIR:
                    break
                nearest -= 1
            if count > room:
                message = f"{count} groups of {parts} sites are more than can be verified; fewer links would help"
                raise AllocationError(message)
            room -= count
            found[parts] = (sites, hubs)
        return found

    def _unlike(self, sites: Array, gpu_type: str) -> int:
        """Return how many groups have pools of a type that do not all give the same."""
        pools = self._pool_at(gpu_type)[sites]
        gives = self._bench.most[0][pools[(pools >= 0).all(axis=1)]]
        return int((gives != gives[:, :1]).any(axis=1).sum())

    def _neighbours(self, at: Mapping[str, Array]) -> dict[int, list[int]]:
        """Return each listening site's partners by links both ways, the best links first."""
        rules = self._rules
        names = list(rules.sites)
        useful = np.logical_or.reduce([np.zeros(len(names), dtype=bool), *at.values()])
        ranked: dict[int, list[tuple[float, float, int]]] = {}
        for (hub, other), there in rules.links.items():
            back = rules.links.get((other, hub))
            a, b = rules.place[hub], rules.place[other]
            if back is None or hub not in rules.listening or not (useful[a] and useful[b]):
                continue
            speed = min(there.bandwidth_bits_per_s, back.bandwidth_bits_per_s)
            ranked.setdefault(a, []).append((-speed, there.delay_s + back.delay_s, b))
        return {hub: [site for _, _, site in sorted(found)] for hub, found in sorted(ranked.items())}

    def _grouped(self, neighbours: Mapping[int, list[int]], parts: int, nearest: int) -> tuple[Array, Array]:
        listens = {self._rules.place[site] for site in self._rules.listening if site in self._rules.place}
        groups, hubs = [], []
        for hub, others in neighbours.items():
            for chosen in itertools.combinations(others[:nearest], parts - 1):
                if parts == PAIR and chosen[0] in listens and chosen[0] < hub:
                    continue
                groups.append(sorted((hub, *chosen)))
                hubs.append(hub)
        return np.array(groups, dtype=np.int64).reshape(-1, parts), np.array(hubs, dtype=np.int64)

    def _pool_at(self, gpu_type: str) -> Array:
        """Return by site the number of its pool of a type, -1 without one."""
        at = np.full(len(self._rules.sites), -1, dtype=np.int64)
        pools = self._of_type.get(gpu_type, np.zeros(0, dtype=np.int64))
        pools = pools[self._bench.most[0][pools] > 0]
        at[self._bench.site[pools]] = pools
        return at

    def _links_of(self, sites: Array, hub: Array) -> tuple[Array, Array]:
        names = list(self._rules.sites)
        up, down = np.full(sites.shape, -1, dtype=np.int64), np.full(sites.shape, -1, dtype=np.int64)
        for row, (members, center) in enumerate(zip(sites.tolist(), hub.tolist(), strict=True)):
            for part, site in enumerate(members):
                if site != center:
                    up[row, part] = self._link_number[names[site], names[center]]
                    down[row, part] = self._link_number[names[center], names[site]]
        return up, down

    def _best_group(  # noqa: C901  one formula, part by part
        self, job: JobState, groups: _Groups, total: int, most_by_part: list[int] | None
    ) -> int:
        """Return the best surplus of `total` GPUs over any of the groups, divided by their weights."""
        parts = len(groups.weights)
        counts = divided(total, groups.weights)
        if parts > job.sites_max or min(counts) < 1:
            return NEVER
        if most_by_part is not None and any(n > most for n, most in zip(counts, most_by_part, strict=True)):
            return NEVER
        allowed, tariff = self._allowed(job)
        pool = groups.pool
        fits = allowed[self._bench.site[pool]].all(axis=1) & (np.array(counts) <= self._bench.most[0][pool]).all(axis=1)
        if not fits.any():
            return NEVER
        pool, up, down = pool[fits], groups.up[fits], groups.down[fits]
        work, period = job.workload, job.sync.period_steps
        slowest, single = np.zeros(len(pool)), np.zeros(len(pool))
        for part, count in enumerate(counts):
            flops, ring = self._speeds(job, pool[:, part])
            one = _compute_s(float(work.batch_per_gpu), work.flops_per_sample, flops)
            single = np.maximum(single, one + _all_reduce_s(float(work.parameters), 1, ring))
            step = _compute_s(float(work.batch_per_gpu), work.flops_per_sample, flops)
            step = step + _all_reduce_s(float(work.parameters), count, ring)
            slowest = np.maximum(slowest, step)
        sync_s, size = self._sync(job, parts, up, down, period * slowest)
        step_s = slowest + sync_s / period
        speed = work.batch_per_gpu * total / step_s
        ok = ~self._late(job, speed, 0.0)
        ceiling = work.batch_per_gpu * total / single
        egress, rounded = np.zeros(len(pool), dtype=np.int64), np.ones(len(pool), dtype=np.int64)
        rent = np.zeros(len(pool), dtype=np.int64)
        for part, count in enumerate(counts):
            if job.data is not None:
                data = np.ceil(job.data.bytes_per_sample * speed * count / total).astype(np.int64)
                egress += _cost(data, tariff[self._bench.site[pool[:, part]]])
                rounded += data > 0
            for link, amount in ((up[:, part], size), (down[:, part], size * (parts - 1))):
                used = link >= 0
                number = np.maximum(link, 0)
                sent = np.where(used, np.ceil(amount / (step_s * period)), 0).astype(np.int64)
                shares = np.minimum(np.ceil(sent.astype(float) * 8.0 * SHARES / self._bits[number]), 2.0**40)
                shares = shares.astype(np.int64)
                ok &= shares <= SHARES
                egress += np.where(used, _cost(sent, self._egress[number]), 0)
                rent += np.where(used & (shares <= SHARES), shares * self._link_price[number], 0)
                rounded += used
        slots = np.ones(len(pool), dtype=np.int64)
        if self._slots > 1:
            left = float(self._rules.left(job))
            slots = np.clip(np.ceil(left / ceiling / self._rules.snapshot.slot_s), 1, self._slots).astype(np.int64)
        hourly = self._hourly(job, speed, rounded)
        surplus = (hourly - egress) * slots - rent - self._tenant(job, self._spend(job, hourly), total)
        for part, count in enumerate(counts):
            for slot in range(self._slots):
                held = slots > slot
                surplus = surplus - np.where(held, count * self._bench.price[slot][pool[:, part]], 0)
        ok &= ~self._barred_group(job, pool, counts)
        return int(np.where(ok, surplus, NEVER).max(initial=NEVER))

    def _sync(self, job: JobState, parts: int, up: Array, down: Array, steps_s: Array) -> tuple[Array, Array]:
        """Return a sync round's seconds and a contribution's bytes by group, with the codec that each takes."""
        codecs = throughput.AUTO_CODECS if job.sync.codec == "auto" else (job.sync.codec,)
        seconds, sizes = np.zeros(len(up)), np.zeros(len(up))
        open_ = np.ones(len(up), dtype=bool)
        for codec in codecs:
            size = throughput.contribution_size_bytes(float(job.workload.parameters), throughput.CODEC_RATIOS[codec])
            slowest = np.zeros(len(up))
            for part in range(parts):
                used = up[:, part] >= 0
                a, b = np.maximum(up[:, part], 0), np.maximum(down[:, part], 0)
                there = _link_transfer_s(size, self._bits[a], self._loss[a])
                back = _link_transfer_s(size * (parts - 1), self._bits[b], self._loss[b])
                trip = there + back + throughput.ROUND_TRIPS_PER_SYNC * (self._delay[a] + self._delay[b])
                slowest = np.where(used, np.maximum(slowest, trip), slowest)
            seconds, sizes = np.where(open_, slowest, seconds), np.where(open_, size, sizes)
            open_ &= ~(slowest / steps_s <= throughput.SYNC_SHARE_MAX)
        return seconds, sizes

    def _barred_group(self, job: JobState, pool: Array, counts: list[int]) -> Array:
        if not any("+" in key for key in job.barred):
            return np.zeros(len(pool), dtype=bool)
        names = self._bench.pool_ids
        keys = ["+".join(f"{names[p]}:{n}" for p, n in zip(row, counts, strict=True)) for row in pool.tolist()]
        return np.array([key in job.barred for key in keys])


def divided(total: int, weights: tuple[int, ...]) -> list[int]:
    """Divide GPUs by weight, largest remainders first, ties to the earlier part."""
    whole = sum(weights)
    counts = [total * weight // whole for weight in weights]
    remainders = sorted(range(len(weights)), key=lambda part: (-(total * weights[part] % whole), part))
    for part in remainders[: total - sum(counts)]:
        counts[part] += 1
    return counts


def _cost(bytes_per_s: Array, price_micros_per_gb: Array) -> Array:
    """Return what traffic costs per hour, rounded up."""
    cost = np.ceil(bytes_per_s.astype(float) * 3600.0 * price_micros_per_gb.astype(float) / 1e9)
    bounded: Array = np.minimum(cost, float(RATE_MAX)).astype(np.int64)
    return bounded
