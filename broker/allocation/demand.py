"""What every job would rather have at the published prices, found by looking at everything at once.

The verifier's own oracle: for each job, count and way to divide it, all pools or groups of sites
are valued together as numpy columns. Slow, and with nothing in common with the solver's: the point.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, cast

import numpy as np

from broker.allocation.configuration import TERM_MARGIN, TERM_S_MIN
from broker.allocation.groups import PAIR, Array, Bench, Groups, Spread
from broker.allocation.rules import (
    RATE_MAX,
    SHARES,
    SPAN_SITES_MAX,
    TIER_OF_RESIDENCY,
    Row,
    Rules,
    ladder,
)
from broker.allocation.snapshot import JobState
from training import throughput
from training.catalogue import GPU_TYPES
from training.spec import GpuRequest
from training.sync_rule import OVERLAP_STEPS_MAX, PERIOD_STEPS_MIN, PERIOD_STEPS_OPEN, ROUNDS_MIN, WAYS

Prices = Mapping[Row, int]
# The closed form works on columns element by element, though it is written for one.
_compute_s = cast("Callable[..., Array]", throughput.compute_s)
_all_reduce_s = cast("Callable[..., Array]", throughput.all_reduce_s)
_link_transfer_s = cast("Callable[..., Array]", throughput.link_transfer_s)
# Nothing that may not be had is ever best.
NEVER: Final = -(2**62)
# Rows looked at first, four times as many each time after.
CHUNK_ROWS: Final = 256


@dataclass(frozen=True, slots=True)
class _Most:
    """What a spread could at most leave a job before the price of its GPUs, and the least slots that it holds."""

    worth: int
    held_min: int


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
        self._groups = Groups(rules, self._bench, self._of_type, self._link_number)
        self._tiers: dict[str, Array] = {}

    def best(self, job: JobState) -> int:
        """Return a job's best surplus over its slots; 0 is staying out, unless it is inside its term."""
        found = [] if job.job_id in self._rules.kept else [0]
        own = self._rules.own(job)
        if own is not None:
            found.append(self.surplus(own.worth, own.rows))
        if self._rules.left(job) > 0:
            found += [int(most) for most in self._on_one_site(job)]
            # NEVER is below everything: a job inside its term may have nothing but its own place.
            found.append(self._across_sites(job, max(found, default=NEVER)))
        return max(found)

    def surplus(self, worth: int, rows: Mapping[tuple[str, ...], int]) -> int:
        """Return what an option leaves its job at the prices."""
        return worth - sum(use * self._prices.get(row, 0) for row, use in rows.items())

    def _laid_out(self) -> Bench:
        rules = self._rules
        pools = list(rules.pools.values())
        defaults = [GPU_TYPES[pool.gpu_type] for pool in pools]
        return Bench(
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
            home = job.data.home_site
            if home not in self._tiers:
                self._tiers[home] = np.array([rules.tier(job, site_id) for site_id in rules.sites])
            tiers = self._tiers[home]
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

    def _hourly(self, job: JobState, speed: Array, rounded: Array, *, moving: bool = True) -> Array:
        """Return the value per hour at each speed, after hold and, where the job moves, restart."""
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
        if moving and job.incumbent is not None and rules.own(job) is not None:
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

    def _across_sites(self, job: JobState, best: int) -> int:
        """Return the best surplus across sites, or `best` where nothing is better.

        What could at most be left is known for each way to spread: the worth of its GPUs as if synchronising took no
        time, less their price. Whatever that bound keeps at or below the best so far is not looked at.
        """
        if job.sites_max < PAIR or job.sync.strategy == "local":
            return best
        ways = []
        for spread, limits in self._ways(job):
            most = self._most(job, spread)
            ways.append((most.worth - int(spread.cost(most.held_min)[0]), spread, limits, most))
        for bound, spread, limits, most in sorted(ways, key=lambda way: -way[0]):
            if bound <= best:
                break
            best = self._best_of(job, spread, limits, most, best)
        return best

    def _ways(self, job: JobState) -> Iterator[tuple[Spread, list[int] | None]]:
        """Yield the ways to spread a job over sites that exist, and the most GPUs of each part where types differ."""
        requests = {request.gpu_type: request for request in job.accelerators}
        sites_max = min(job.sites_max, SPAN_SITES_MAX)
        for gpu_type, request in sorted(requests.items()):
            for parts in range(PAIR, sites_max + 1):
                for total in ladder(request):
                    spread = self._groups.spread((gpu_type,), parts, total)
                    if spread is not None:
                        yield spread, None
        if not job.mixed_types:
            return
        for one, other in itertools.combinations(sorted(requests), 2):
            both = requests[one], requests[other]
            low, high = min(row.count_min for row in both), max(row.count_max for row in both)
            span = GpuRequest(gpu_type=one, count_min=low, count_max=high)
            for types in ((one, other), (other, one)):
                for total in ladder(span):
                    spread = self._groups.spread(types, PAIR, total)
                    if spread is not None:
                        yield spread, [requests[gpu_type].count_max for gpu_type in types]

    def _most(self, job: JobState, spread: Spread) -> _Most:
        """Return what a spread could at most be worth to a job, and how many slots it would hold."""
        work = job.workload
        flops, ring = self._speeds(job, spread.pools)
        alone = _compute_s(float(work.batch_per_gpu), work.flops_per_sample, flops)
        speed = np.array([work.batch_per_gpu * spread.total / alone.min()])
        held_min = held_max = 1
        if self._slots > 1:
            single = alone + _all_reduce_s(float(work.parameters), 1, ring)
            ceilings = work.batch_per_gpu * spread.total / np.array([single.min(), single.max()])
            left = float(self._rules.left(job))
            held = np.clip(np.ceil(left / ceilings / self._rules.snapshot.slot_s), 1, self._slots).astype(np.int64)
            held_min, held_max = int(held[0]), int(held[1])
        hourly = int(self._hourly(job, speed, np.ones(1, dtype=np.int64), moving=False)[0])
        tenant = job.tenant_id
        subsidy = 0 if tenant is None else spread.total * self._prices.get(("floor", tenant), 0)
        return _Most(hourly * held_max + subsidy, held_min)

    def _best_of(self, job: JobState, spread: Spread, limits: list[int] | None, most: _Most, best: int) -> int:
        """Return the best surplus of a spread, or `best`: the cheapest rows first, as far as the bound allows."""
        cost = spread.cost(most.held_min)
        allowed, tariff = self._allowed(job)
        everywhere = bool(allowed.all())
        at, size = 0, CHUNK_ROWS
        while True:
            end = min(int(np.searchsorted(cost, most.worth - best, side="left")), at + size)
            if end <= at:
                return best
            rows = spread.order(most.held_min)[at:end]
            if not everywhere:
                rows = rows[allowed[self._bench.site[spread.pool[rows]]].all(axis=1)]
            if limits is not None:
                rows = rows[(spread.counts[rows] <= np.array(limits)).all(axis=1)]
            if len(rows):
                best = max(best, self._best_row(job, spread, rows, tariff))
            at, size = end, size * 4

    def _best_row(self, job: JobState, spread: Spread, rows: Array, tariff: Array) -> int:
        """Return the best surplus over some rows of a spread."""
        pool, up, down = spread.pool[rows], spread.up[rows], spread.down[rows]
        counts, total, parts = spread.counts[rows], spread.total, spread.parts
        work = job.workload
        flops, ring = self._speeds(job, pool)
        alone = _compute_s(float(work.batch_per_gpu), work.flops_per_sample, flops)
        slowest = (alone + _all_reduce_s(float(work.parameters), counts, ring)).max(axis=1)
        if job.sync_open and job.sync.strategy == "auto":
            waits_s, size, period = self._chosen(job, total, up, down, slowest)
        else:
            period = np.full(len(rows), float(job.sync.period_steps))
            waits_s, size = self._sync(job, up, down, period * slowest)
        step_s = slowest + waits_s / period
        speed = work.batch_per_gpu * total / step_s
        ok = ~self._late(job, speed, 0.0)
        egress, rounded = np.zeros(len(pool), dtype=np.int64), np.ones(len(pool), dtype=np.int64)
        rent = np.zeros(len(pool), dtype=np.int64)
        if job.data is not None:
            data = np.ceil(job.data.bytes_per_sample * speed[:, None] * counts / total).astype(np.int64)
            egress += _cost(data, tariff[self._bench.site[pool]]).sum(axis=1)
            rounded += (data > 0).sum(axis=1)
        for link, amount in ((up, size), (down, size * (parts - 1))):
            used = link >= 0
            number = np.maximum(link, 0)
            sent = np.where(used, np.ceil(amount / (step_s * period))[:, None], 0).astype(np.int64)
            shares = np.minimum(np.ceil(sent.astype(float) * 8.0 * SHARES / self._bits[number]), 2.0**40)
            shares = shares.astype(np.int64)
            ok &= (shares <= SHARES).all(axis=1)
            egress += np.where(used, _cost(sent, self._egress[number]), 0).sum(axis=1)
            rent += np.where(used & (shares <= SHARES), shares * self._link_price[number], 0).sum(axis=1)
            rounded += used.sum(axis=1)
        slots = np.ones(len(pool), dtype=np.int64)
        if self._slots > 1:
            single = (alone + _all_reduce_s(float(work.parameters), 1, ring)).max(axis=1)
            ceiling = work.batch_per_gpu * total / single
            left = float(self._rules.left(job))
            slots = np.clip(np.ceil(left / ceiling / self._rules.snapshot.slot_s), 1, self._slots).astype(np.int64)
        hourly = self._hourly(job, speed, rounded)
        surplus = (hourly - egress) * slots - rent - self._tenant(job, self._spend(job, hourly), total)
        for slot in range(self._slots):
            price = (counts * self._bench.price[slot][pool]).sum(axis=1)
            surplus = surplus - np.where(slots > slot, price, 0)
        ok &= ~self._barred_group(job, pool, counts)
        return int(np.where(ok, surplus, NEVER).max(initial=NEVER))

    def _sync(self, job: JobState, up: Array, down: Array, steps_s: Array) -> tuple[Array, Array]:
        """Return a sync round's seconds and a contribution's bytes by group, with the codec that each takes."""
        codecs = throughput.AUTO_CODECS if job.sync.codec == "auto" else (job.sync.codec,)
        seconds, sizes = np.zeros(len(up)), np.zeros(len(up))
        open_ = np.ones(len(up), dtype=bool)
        for codec in codecs:
            size = throughput.contribution_size_bytes(float(job.workload.parameters), throughput.CODEC_RATIOS[codec])
            slowest = self._round_s(size, up, down)
            seconds, sizes = np.where(open_, slowest, seconds), np.where(open_, size, sizes)
            open_ &= ~(slowest / steps_s <= throughput.SYNC_SHARE_MAX)
        return seconds, sizes

    def _chosen(self, job: JobState, total: int, up: Array, down: Array, step_s: Array) -> tuple[Array, Array, Array]:
        """Return, by group, what an open plan becomes: seconds waited and bytes sent in a period, and its steps."""
        asked, work = job.sync, job.workload
        steps = max(1, work.samples // (work.batch_per_gpu * total))
        cap = asked.max_egress_gb or math.inf
        waits, sizes, periods = np.zeros(len(up)), np.zeros(len(up)), np.ones(len(up))
        over, share = np.full(len(up), math.inf), np.full(len(up), -1.0)
        open_ = np.ones(len(up), dtype=bool)
        for strategy, own_codec, period_max in WAYS:
            codec, streams = own_codec if asked.codec == "auto" else asked.codec, strategy == "streaming"
            groups = asked.fragments if streams else 1
            size = throughput.contribution_size_bytes(
                float(-(-work.parameters // groups)), throughput.CODEC_RATIOS[codec]
            )
            round_s = self._round_s(size, up, down)
            beside = np.minimum(OVERLAP_STEPS_MAX, np.maximum(1, np.ceil(round_s / step_s))) if streams else 0.0
            wait_s = np.maximum(0.0, round_s - beside * step_s)
            if strategy == "every_step":
                period = np.ones(len(up))
            elif asked.period_steps != PERIOD_STEPS_OPEN:
                period = np.full(len(up), float(max(groups, asked.period_steps // groups * groups)))
            else:
                wanted = wait_s / step_s * groups * asked.target_utilisation / (1 - asked.target_utilisation)
                least = max(PERIOD_STEPS_MIN, (OVERLAP_STEPS_MAX + 1) * groups if groups > 1 else 1)
                most = min(period_max, max(1, steps // ROUNDS_MIN))
                period = np.ceil(np.maximum(1, np.minimum(most, np.maximum(wanted, least))) / groups) * groups
            if streams:
                beside = np.minimum(beside, period / groups - 1)
                wait_s = np.maximum(0.0, round_s - beside * step_s)
            computing = period * step_s / (period * step_s + wait_s * groups)
            sent_gb = steps / period * work.parameters * throughput.BYTES_PER_PARAMETER
            sent_gb = sent_gb / throughput.CODEC_RATIOS[codec] / 1e9
            does = (computing >= asked.target_utilisation) & (sent_gb <= cap)
            beyond = np.maximum(sent_gb, cap)
            take = open_ & (does | (share < 0) | (beyond < over) | ((beyond == over) & (computing > share)))
            waits, sizes = np.where(take, wait_s * groups, waits), np.where(take, size * groups, sizes)
            over, share = np.where(take, beyond, over), np.where(take, computing, share)
            periods = np.where(take, period, periods)
            open_ &= ~does
        return waits, sizes, periods

    def _round_s(self, size: float, up: Array, down: Array) -> Array:
        """Return the seconds of a sync round by group, for contributions of `size` bytes."""
        used, a, b = up >= 0, np.maximum(up, 0), np.maximum(down, 0)
        there = _link_transfer_s(size, self._bits[a], self._loss[a])
        back = _link_transfer_s(size * (up.shape[1] - 1), self._bits[b], self._loss[b])
        trip = there + back + throughput.ROUND_TRIPS_PER_SYNC * (self._delay[a] + self._delay[b])
        slowest: Array = np.where(used, trip, 0.0).max(axis=1)
        return slowest

    def _barred_group(self, job: JobState, pool: Array, counts: Array) -> Array:
        if not any("+" in key for key in job.barred):
            return np.zeros(len(pool), dtype=bool)
        names = self._bench.pool_ids
        keys = [
            "+".join(f"{names[p]}:{n}" for p, n in zip(row, gpus, strict=True))
            for row, gpus in zip(pool.tolist(), counts.tolist(), strict=True)
        ]
        return np.array([key in job.barred for key in keys])


def _cost(bytes_per_s: Array, price_micros_per_gb: Array) -> Array:
    """Return what traffic costs per hour, rounded up."""
    cost = np.ceil(bytes_per_s.astype(float) * 3600.0 * price_micros_per_gb.astype(float) / 1e9)
    bounded: Array = np.minimum(cost, float(RATE_MAX)).astype(np.int64)
    return bounded
