"""The market's rules a second time, for `verify`: what a job may have, what it is worth, what it uses.

Written from the chapter, not from the solver: it reads the snapshot's rows, knows nothing of
goods, patterns or compiled loops, and finds each job's best option by looking at every pool and
every group of sites at once in numpy. Only the closed form of `training.throughput` is shared,
which is the product's statement of how fast a job would run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from numpy.typing import NDArray

from broker.allocation.configuration import TERM_MARGIN, TERM_S_MIN, Configuration, as_sold
from broker.allocation.snapshot import JobState, PoolState, Snapshot, TenantState
from training import throughput
from training.spec import GpuRequest, SyncPlan
from training.sync_choice import choose_sync
from training.throughput import Link, SitePart

Pair = tuple[str, str]
Row = tuple[str, ...]
Array = NDArray[Any]

SHARES: Final = 10_000
RATE_MAX: Final = 2**45
SPAN_SITES_MAX: Final = 4
# How GPUs may be divided over the sites of a span, by number of sites.
WEIGHTS: Final = {
    2: ((1, 1), (3, 1), (1, 3)),
    3: ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)),
    4: ((1, 1, 1, 1),),
}
TIER_OF_RESIDENCY: Final = {"site": 0, "region": 1, "continent": 2, "world": 3}


@dataclass(frozen=True, slots=True)
class Option:
    """One thing that a job could be given, per hour where nothing else is said.

    `worth` is the value over all its slots net of egress; `rows` are its uses of whatever is
    scarce, named ("pool", id, slot), ("link", from, to), ("budget", tenant) or ("floor", tenant).
    """

    value: int
    egress: int
    charge_max: int
    term_s: int
    action: str
    speed: float
    worth: int
    gpus: dict[str, int]
    shares: dict[Pair, int]
    bytes_per_s: dict[Pair, int]
    data: dict[str, int]
    rows: dict[Row, int] = field(default_factory=dict)


class Rules:
    """A snapshot, indexed by name, and what its rules say about each job."""

    def __init__(self, snapshot: Snapshot) -> None:
        """Index the rows and decide which incumbents are inside their term."""
        self.snapshot = snapshot
        self.sites = {site.site_id: site for site in sorted(snapshot.sites, key=lambda site: site.site_id)}
        self.pools = {pool.pool_id: pool for pool in sorted(snapshot.pools, key=lambda pool: pool.pool_id)}
        self.links = {(row.from_site, row.to_site): row for row in snapshot.links if row.from_site != row.to_site}
        self.links = dict(sorted(self.links.items()))
        self.speeds = {
            pair: Link(row.bandwidth_bits_per_s, row.delay_s, row.loss, row.egress_price_micros_per_gb)
            for pair, row in self.links.items()
        }
        self.listening = frozenset(site.site_id for site in snapshot.sites if site.listens)
        self.jobs = {job.job_id: job for job in snapshot.jobs}
        self.tenants = {row.tenant_id: row for row in snapshot.tenants}
        self._owns: dict[str, Option | None] = {}
        self.kept = self._kept()
        self.place = {site_id: number for number, site_id in enumerate(self.sites)}

    def _kept(self) -> frozenset[str]:
        """Return the incumbents inside their term, oldest first where a pool shrank."""
        free = {pool_id: pool.capacity_gpus for pool_id, pool in self.pools.items()}
        kept = set()
        for job in sorted(self.jobs.values(), key=lambda job: (job.submitted_ms, job.job_id)):
            if job.incumbent is None or job.incumbent.term_ends_ms <= self.snapshot.taken_at_ms:
                continue
            parts = job.incumbent.configuration.parts
            if all(free.get(part.pool_id, 0) >= part.gpus for part in parts):
                kept.add(job.job_id)
                for part in parts:
                    free[part.pool_id] -= part.gpus
        return frozenset(kept)

    # What is scarce.

    def supply(self, pool: PoolState, slot: int) -> int:
        """Return the GPUs of a pool that are for sale in a slot: what its worst moment leaves."""
        starts_ms, ends_ms = self.slot_ms(slot)
        if pool.drains_at_ms is not None and pool.drains_at_ms < ends_ms:
            return 0
        here = [row for row in pool.reserved if row.from_ms < ends_ms and row.to_ms > starts_ms]
        moments = [max(row.from_ms, starts_ms) for row in here]
        worst = max((sum(row.gpus for row in here if row.from_ms <= at < row.to_ms) for at in moments), default=0)
        return max(0, pool.capacity_gpus - worst)

    def slot_ms(self, slot: int) -> tuple[int, int]:
        """Return the UTC milliseconds between which a slot lies; without a horizon it lasts a term."""
        length = 1000 * (self.snapshot.slot_s if self.snapshot.slots > 1 else self.snapshot.term_s)
        starts_ms = self.snapshot.taken_at_ms + slot * length
        return starts_ms, starts_ms + length

    def curve(self, pool: PoolState, gpus: int) -> list[tuple[int, int]]:
        """Return what a pool sells of `gpus` GPUs as (GPUs, ask): the flat ask first, its last GPUs dearer."""
        dear = sum(step.gpus for step in pool.ask_steps)
        steps = [(max(0, gpus - dear), pool.ask_micros_per_gpu_hour)]
        steps += [(step.gpus, step.ask_micros_per_gpu_hour) for step in pool.ask_steps]
        found, left = [], gpus
        for units, ask in steps:
            taken = min(units, left)
            left -= taken
            if taken:
                found.append((taken, ask))
        return found

    def supplies(self) -> dict[Row, tuple[int, list[tuple[int, int]]]]:
        """Return every row as (what it gives for nothing, further steps of (units, cost)).

        Jobs inside their term always fit: a row supplies at least what they use.
        """
        used: dict[Row, int] = {}
        for job_id in self.kept:
            own = self.own(self.jobs[job_id])
            assert own is not None, "a job inside its term has its place"
            for row, use in own.rows.items():
                used[row] = used.get(row, 0) + use
        found: dict[Row, tuple[int, list[tuple[int, int]]]] = {}
        for slot in range(self.snapshot.slots):
            for pool_id, pool in self.pools.items():
                row = ("pool", pool_id, str(slot))
                found[row] = (0, self.curve(pool, max(self.supply(pool, slot), used.get(row, 0))))
        for pair in self.links:
            found["link", *pair] = (0, [(max(SHARES, used.get(("link", *pair), 0)), 0)])
        for tenant_id, tenant in sorted(self.tenants.items()):
            if tenant.budget_micros_per_hour is not None:
                found["budget", tenant_id] = (0, [(max(SHARES, used.get(("budget", tenant_id), 0)), 0)])
            if self.has_floor(tenant):
                penalty = self.snapshot.floor_penalty_micros_per_gpu_hour
                found["floor", tenant_id] = (-(tenant.floor_gpus or 0), [(tenant.floor_gpus or 0, penalty)])
        return found

    def has_floor(self, tenant: TenantState) -> bool:
        """Return whether missing a tenant's floor costs anything."""
        return bool(tenant.floor_gpus) and self.snapshot.floor_penalty_micros_per_gpu_hour > 0

    def shares(self, pair: Pair, bytes_per_s: int) -> int:
        """Return what traffic uses of a link in ten-thousandths, rounded up."""
        return int(min(math.ceil(float(bytes_per_s) * 8.0 * SHARES / self.links[pair].bandwidth_bits_per_s), 2.0**40))

    def sent(self, sold: Configuration) -> dict[Pair, int]:
        """Return a configuration's predicted traffic by link."""
        return {(row.from_site, row.to_site): row.bytes_per_s for row in sold.traffic}

    # What a job may have.

    def tier(self, job: JobState, site_id: str) -> int:
        """Return how far a site is from a job's data: 0 the same, 1 region, 2 continent, 3 beyond."""
        if job.data is None or job.data.home_site == site_id:
            return 0
        home, site = self.sites[job.data.home_site], self.sites[site_id]
        if home.region is not None and home.region == site.region:
            return 1
        return 2 if home.continent is not None and home.continent == site.continent else 3

    def may_be_at(self, job: JobState, site_id: str) -> bool:
        """Return whether a job may use a site, by its list and by how far its data may go."""
        if job.sites_allowed is not None and site_id not in job.sites_allowed:
            return False
        return job.data is None or self.tier(job, site_id) <= TIER_OF_RESIDENCY[job.data.residency]

    def data_price(self, job: JobState, site_id: str) -> int:
        """Return what a GB of a job's data costs at a site."""
        tier = self.tier(job, site_id)
        if job.data is None or tier == 0:
            return 0
        prices = self.sites[job.data.home_site].egress_micros_per_gb
        return (prices.to_region, prices.to_continent, prices.beyond)[tier - 1]

    def part(self, job: JobState, pool: PoolState, gpus: int) -> SitePart:
        """Return GPUs of a pool with the speed that this job was measured to have there."""
        flops, ring = pool.flops_per_s, pool.intra_site_bits_per_s
        for measured in job.speeds:
            if measured.gpu_type == pool.gpu_type:
                flops, ring = measured.flops_per_s, measured.ring_bits_per_s or ring
        return SitePart(pool.site_id, pool.gpu_type, gpus, flops, ring)

    def hubs(self, sites: list[str]) -> list[str]:
        """Return the sites that could be the hub: listening, with links both ways to each other one."""
        return [
            hub
            for hub in sites
            if hub in self.listening
            and all((hub, site) in self.links and (site, hub) in self.links for site in sites if site != hub)
        ]

    def resolved(self, job: JobState, parts: list[SitePart], hub: str | None) -> SyncPlan | None:
        """Return what a job's plan becomes on these sites, through this hub; None where it cannot."""
        if len(parts) == 1:
            found = throughput.resolve_sync(job.workload, job.sync, parts, self.speeds, self.listening)
        elif hub is None:
            return None
        elif job.sync_open and job.sync.strategy == "auto":
            chosen = choose_sync(job.workload, job.sync, parts, self.speeds, frozenset({hub}))
            return None if chosen is None else as_sold(chosen.plan, is_open=True)
        else:
            found = throughput.resolve_sync(job.workload, job.sync, parts, self.speeds, frozenset({hub}))
        return None if found is None else as_sold(found.plan, is_open=job.sync_open)

    # What it is worth.

    def value_rate(self, job: JobState, speed: float) -> int:
        """Return what an hour at `speed` is worth by the bid, falling where bid steps say so."""
        worth = math.inf
        base, slope = 0.0, float(job.bid_micros_per_million_samples) * 3600.0 / 1e6
        worth = min(worth, base + slope * speed)
        for step in job.bid_steps:
            lower = float(step.bid_micros_per_million_samples) * 3600.0 / 1e6
            base += (slope - lower) * step.above_samples_per_s
            slope = lower
            worth = min(worth, base + slope * speed)
        return int(min(max(0.0, math.floor(worth)), float(RATE_MAX)))

    def left(self, job: JobState) -> int:
        """Return the samples still to be done."""
        return max(0, job.workload.samples - job.samples_done)

    def term_s(self, job: JobState, speed: float) -> int:
        """Return for how long a job at `speed` is offered its price."""
        return int(min(self.snapshot.term_s, max(TERM_S_MIN, math.ceil(TERM_MARGIN * self.left(job) / speed))))

    def is_late(self, job: JobState, speed: float, starts_s: float = 0.0) -> bool:
        """Return whether a job at `speed` would miss its deadline."""
        if job.deadline_ms is None:
            return False
        return starts_s + self.left(job) / speed > (job.deadline_ms - self.snapshot.taken_at_ms) / 1000

    def slots_of(self, job: JobState, speed: float, start: int) -> int:
        """Return how many slots a job at `speed` holds from `start` on, within the horizon."""
        needed = math.ceil(self.left(job) / (speed * self.snapshot.slot_s)) if self.snapshot.slots > 1 else 1
        return max(1, min(needed, self.snapshot.slots - start))

    def option(
        self,
        job: JobState,
        parts: list[SitePart],
        sync: SyncPlan,
        hub: str | None,
        *,
        action: str,
        start: int = 0,
    ) -> Option | None:
        """Return what these parts are to a job, None where it may not have them: late, or too much traffic."""
        prediction = throughput.predict(job.workload, sync, parts, self.speeds, hub, overlapped=job.sync_open)
        speed = prediction.samples_per_s
        held = self.slots_of(job, speed if len(parts) == 1 or action == "renew" else self._ceiling(job, parts), start)
        sent = {(row.from_site, row.to_site): math.ceil(row.bytes_per_s) for row in prediction.traffic}
        shares = {pair: self.shares(pair, size) for pair, size in sent.items()}
        if any(used > SHARES for used in shares.values()):
            return None
        if self.is_late(job, speed, start * self.snapshot.slot_s if start else 0.0):
            return None
        gpus, waiting = sum(part.gpus for part in parts), 1.0
        data = {}
        if job.data is not None:
            for part in parts:
                size = math.ceil(job.data.bytes_per_sample * speed * part.gpus / gpus)
                if size:
                    data[part.site_id] = size
        egress = sum(_cost(size, self.links[pair].egress_price_micros_per_gb) for pair, size in sent.items())
        egress += sum(_cost(size, self.data_price(job, site)) for site, size in data.items())
        term_s = self.term_s(job, speed)
        affordable = max(0, job.hold_left_micros - 1 - len(sent) - len(data)) * 3600 // term_s
        value = min(self.value_rate(job, speed), affordable)
        locked = 0
        if action == "move" and job.incumbent is not None and self.own(job) is not None:
            value += -job.incumbent.restart_cost_micros * 3600 // term_s
            locked = self.locked(job) if job.job_id in self.kept else 0
        for _ in range(start):
            waiting *= 1.0 - self.snapshot.waiting_discount
        if start:
            value = math.floor(value * waiting)
        charge_max = value - egress - locked
        by_pool = {f"{part.site_id}/{part.gpu_type}": part.gpus for part in parts}
        return Option(
            value=value, egress=egress, charge_max=charge_max, term_s=term_s, action=action, speed=speed, worth=(value - egress) * held,
            gpus=by_pool, shares=shares, bytes_per_s=sent, data=data,
            rows=self._rows(job, by_pool, shares, charge_max + egress, start, held),
        )  # fmt: skip

    def _ceiling(self, job: JobState, parts: list[SitePart]) -> float:
        """Return the speed that a span's slots are counted by: its slowest kind, synchronising in no time."""
        alone = [
            SitePart(part.site_id, part.gpu_type, 1, part.flops_per_s, part.intra_site_bits_per_s) for part in parts
        ]
        local = SyncPlan(strategy="local", codec="fp32")
        slowest_s = max(throughput.predict(job.workload, local, [part], {}).step_s for part in alone)
        return job.workload.batch_per_gpu * sum(part.gpus for part in parts) / slowest_s

    def locked(self, job: JobState) -> int:
        """Return what a tenant gains per hour under its running term: a move must not take it away."""
        assert job.incumbent is not None
        sold = job.incumbent.configuration
        return max(0, self.value_rate(job, sold.samples_per_s) - self._egress(job, sold) - self.paid(job))

    def paid(self, job: JobState) -> int:
        """Return what a running lease pays per hour for its GPUs, as locked."""
        assert job.incumbent is not None
        locked = job.incumbent.locked_prices
        return sum(locked.get(part.pool_id, 0) * part.gpus for part in job.incumbent.configuration.parts)

    def own(self, job: JobState) -> Option | None:
        """Return the place that a job has: as sold inside its term, predicted anew after it."""
        if job.incumbent is None:
            return None
        if job.job_id not in self._owns:
            self._owns[job.job_id] = self._own(job)
        return self._owns[job.job_id]

    def _own(self, job: JobState) -> Option | None:
        assert job.incumbent is not None
        sold = job.incumbent.configuration
        gpus = {part.pool_id: part.gpus for part in sold.parts}
        if job.job_id in self.kept:
            sent = {pair: size for pair, size in self.sent(sold).items() if pair in self.links}
            shares = {pair: self.shares(pair, size) for pair, size in sent.items()}
            value, egress = self.value_rate(job, sold.samples_per_s), self._egress(job, sold)
            term_s = max(1, (job.incumbent.term_ends_ms - self.snapshot.taken_at_ms) // 1000)
            held = self.slots_of(job, sold.samples_per_s, 0)
            return Option(
                value=value, egress=egress, charge_max=value - egress, term_s=term_s, action="keep",
                speed=sold.samples_per_s, worth=(value - egress) * held, gpus=gpus, shares=shares,
                bytes_per_s=sent, data={}, rows=self._rows(job, gpus, shares, self.paid(job) + egress, 0, held),
            )  # fmt: skip
        if any(pool_id not in self.pools or self.most(self.pools[pool_id]) < n for pool_id, n in gpus.items()):
            return None
        if any(pair not in self.links for pair in self.sent(sold)) or self.left(job) == 0:
            return None
        if key_of(gpus) in job.barred or not all(self.may_be_at(job, part.site_id) for part in sold.parts):
            return None
        parts = [self.part(job, self.pools[pool_id], count) for pool_id, count in gpus.items()]
        return self.option(job, parts, sold.sync, sold.hub_site, action="renew")

    def most(self, pool: PoolState, slot: int = 0) -> int:
        """Return the most GPUs that one job may take of a pool in a slot."""
        supply = self.supply(pool, slot)
        return supply if pool.job_gpus_max is None else min(supply, pool.job_gpus_max)

    def _egress(self, job: JobState, sold: Configuration) -> int:
        """Return what a sold configuration's traffic and reading cost per hour."""
        total = sum(
            _cost(size, self.links[pair].egress_price_micros_per_gb)
            for pair, size in self.sent(sold).items()
            if pair in self.links
        )
        if job.data is not None:
            for part in sold.parts:
                size = math.ceil(job.data.bytes_per_sample * sold.samples_per_s * part.gpus / sold.gpus)
                total += _cost(size, self.data_price(job, part.site_id)) if self.may_be_at(job, part.site_id) else 0
        return total

    def _rows(  # noqa: PLR0917  what a use is made of
        self, job: JobState, gpus: dict[str, int], shares: dict[Pair, int], spend: int, start: int, slots: int
    ) -> dict[Row, int]:
        rows: dict[Row, int] = {
            ("pool", pool_id, str(slot)): count
            for pool_id, count in gpus.items()
            for slot in range(start, start + slots)
        }
        rows.update({("link", *pair): used for pair, used in shares.items()})
        tenant = self.tenants.get(job.tenant_id) if job.tenant_id is not None else None
        if tenant is not None and tenant.budget_micros_per_hour is not None and spend > 0:
            rows["budget", tenant.tenant_id] = math.ceil(float(spend) * SHARES / float(tenant.budget_micros_per_hour))
        if tenant is not None and self.has_floor(tenant):
            rows["floor", tenant.tenant_id] = -sum(gpus.values())
        return rows


def _cost(bytes_per_s: int, price_micros_per_gb: int) -> int:
    """Return what traffic costs per hour, rounded up."""
    return int(min(math.ceil(float(bytes_per_s) * 3600.0 * float(price_micros_per_gb) / 1e9), RATE_MAX))


def ladder(request: GpuRequest) -> list[int]:
    """Return the GPU counts that a request may be given: 1, 2, 3, 4, 6, 8, 12, ... and its two ends."""
    low, high = request.count_min, request.count_max
    counts = {low, high}
    for power in range(high.bit_length()):
        counts |= {count for count in (1 << power, 3 << power) if low <= count <= high}
    return sorted(counts)


def key_of(gpus: Mapping[str, int]) -> str:
    """Return the name by which a site vetoes a configuration: `ada/H100:8+bob/H100:8`."""
    return "+".join(f"{pool_id}:{count}" for pool_id, count in gpus.items())
