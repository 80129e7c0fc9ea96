"""Every configuration of a job and what it is worth, straight from the rules: the verifier's own.

This repeats in the plainest form what `candidates` and `market` do, and shares no code with them
beyond the data types, the rule's constants and the throughput model: an error in one shows as a
difference to the other. Exact fractions, no speed.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction

from broker.allocation.clearing import LINK_SHARES
from broker.allocation.configuration import (
    SPANS_MAX,
    SPANS_TRIED_MAX,
    TERM_MARGIN,
    TERM_S_MIN,
    Configuration,
)
from broker.allocation.snapshot import JobState, PoolState, Snapshot
from training.spec import SyncPlan
from training.throughput import Link, Prediction, SitePart, predict, resolve_sync

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Option:
    """One thing that a job could be given, with its worth per hour from raw data."""

    key: str
    gpus: dict[str, int]
    speed: float
    sync: SyncPlan
    hub_site: str | None
    bytes_per_s: dict[Pair, int]
    shares: dict[Pair, int]
    value: int
    egress: int
    charge_max: int
    term_s: int
    action: str
    feasible: bool


class Rules:
    """The rules of a round over one snapshot."""

    def __init__(self, snapshot: Snapshot) -> None:
        """Index the raw rows."""
        self.snapshot = snapshot
        self.pools = {pool.pool_id: pool for pool in snapshot.pools}
        self.jobs = {job.job_id: job for job in snapshot.jobs}
        self.links = {(link.from_site, link.to_site): link for link in snapshot.links}
        self.speeds = {
            pair: Link(row.bandwidth_bits_per_s, row.delay_s, row.loss, row.egress_price_micros_per_gb)
            for pair, row in self.links.items()
        }
        self.listening = frozenset(site.site_id for site in snapshot.sites if site.listens)
        self.kept = self._inside_their_term()

    def _inside_their_term(self) -> set[str]:
        running = [
            job
            for job in self.jobs.values()
            if job.incumbent and job.incumbent.term_ends_ms > self.snapshot.taken_at_ms
        ]
        left = {pool_id: pool.capacity_gpus for pool_id, pool in self.pools.items()}
        kept: set[str] = set()
        for job in sorted(running, key=lambda job: (job.submitted_ms, job.job_id)):
            assert job.incumbent is not None
            held = {part.pool_id: part.gpus for part in job.incumbent.configuration.parts}
            if all(left.get(pool_id, -1) >= gpus for pool_id, gpus in held.items()):
                kept.add(job.job_id)
                for pool_id, gpus in held.items():
                    left[pool_id] -= gpus
        return kept

    def link_capacity(self) -> dict[Pair, int]:
        """Return each link's shares: all of it, or what kept jobs already use where that is more."""
        used = dict.fromkeys(self.links, 0)
        for job_id in self.kept:
            incumbent = self.jobs[job_id].incumbent
            assert incumbent is not None
            for pair, shares in self.shares(self.sent(incumbent.configuration)).items():
                used[pair] += shares
        return {pair: max(LINK_SHARES, shares) for pair, shares in used.items()}

    def sent(self, configuration: Configuration) -> dict[Pair, int]:
        """Return a configuration's traffic by link."""
        return {(row.from_site, row.to_site): row.bytes_per_s for row in configuration.traffic}

    def shares(self, bytes_per_s: dict[Pair, int]) -> dict[Pair, int]:
        """Return ten-thousandths of each link that traffic takes, rounded up."""
        return {
            pair: math.ceil(Fraction(size * 8 * LINK_SHARES, max(1, int(self.links[pair].bandwidth_bits_per_s))))
            for pair, size in bytes_per_s.items()
            if pair in self.links
        }

    def egress(self, bytes_per_s: dict[Pair, int]) -> int:
        """Return the predicted egress cost of an hour, each link rounded up."""
        return sum(
            math.ceil(Fraction(size * 3600 * self.links[pair].egress_price_micros_per_gb, 10**9))
            for pair, size in bytes_per_s.items()
            if pair in self.links
        )

    def asks(self, gpus: dict[str, int]) -> int:
        """Return what the sites ask for an hour."""
        return sum(self.pools[pool_id].ask_micros_per_gpu_hour * count for pool_id, count in gpus.items())

    def worth(self, option: Option) -> int:
        """Return what an option adds to welfare per hour."""
        return option.value - option.egress - self.asks(option.gpus)

    def linear_value(self, job: JobState, speed: float) -> int:
        """Return bid x samples/s x 3600 / 1,000,000, rounded down."""
        return math.floor(Fraction(job.bid_micros_per_million_samples) * Fraction(speed) * 3600 / 10**6)

    def options(self, job: JobState) -> list[Option]:
        """Return every option of a job, infeasible ones left out, its own place included."""
        if job.workload.samples <= job.samples_done and job.job_id not in self.kept:
            return []
        found: dict[str, Option] = {}
        own = self._own(job)
        if own is not None:
            found[own.key] = own
        for parts in [*self._single(job), *self._spanning(job)]:
            option = self.judged(job, parts)
            if option is not None and option.key not in found:
                found[option.key] = option
        return [option for option in found.values() if option.feasible]

    def judged(self, job: JobState, parts: list[SitePart]) -> Option | None:
        """Return the option that these parts are for a job, None where no hub joins them."""
        resolved = resolve_sync(job.workload, job.sync, parts, self.speeds, self.listening)
        if resolved is None:
            return None
        prediction = predict(job.workload, resolved.plan, parts, self.speeds, resolved.hub_site)
        return self._option(job, parts, resolved.plan, resolved.hub_site, prediction)

    def _own(self, job: JobState) -> Option | None:
        if job.incumbent is None:
            return None
        sold = job.incumbent.configuration
        gpus = {part.pool_id: part.gpus for part in sold.parts}
        sent = self.sent(sold)
        if job.job_id in self.kept:
            value, egress = self.linear_value(job, sold.samples_per_s), self.egress(sent)
            return Option(
                key=sold.key,
                gpus=gpus,
                speed=sold.samples_per_s,
                sync=sold.sync,
                hub_site=sold.hub_site,
                bytes_per_s=sent,
                shares=self.shares(sent),
                value=value,
                egress=egress,
                charge_max=value - egress,
                term_s=max(1, (job.incumbent.term_ends_ms - self.snapshot.taken_at_ms) // 1000),
                action="keep",
                feasible=True,
            )
        if any(pool_id not in self.pools or self.pools[pool_id].capacity_gpus < n for pool_id, n in gpus.items()):
            return None
        if any(pair not in self.links for pair in sent):
            return None
        parts = [self._part(self.pools[pool_id], count) for pool_id, count in gpus.items()]
        prediction = predict(job.workload, sold.sync, parts, self.speeds, sold.hub_site)
        return self._option(job, parts, sold.sync, sold.hub_site, prediction)

    def _option(
        self, job: JobState, parts: list[SitePart], sync: SyncPlan, hub_site: str | None, prediction: Prediction
    ) -> Option:
        gpus = {f"{part.site_id}/{part.gpu_type}": part.gpus for part in parts}
        key = "+".join(f"{pool_id}:{count}" for pool_id, count in gpus.items())
        sent = {(row.from_site, row.to_site): math.ceil(row.bytes_per_s) for row in prediction.traffic}
        shares, egress, speed = self.shares(sent), self.egress(sent), prediction.samples_per_s
        left = job.workload.samples - job.samples_done
        term_s = min(self.snapshot.term_s, max(TERM_S_MIN, math.ceil(TERM_MARGIN * left / speed)))
        affordable = math.floor(Fraction(max(0, job.hold_left_micros - 1 - len(sent)) * 3600, term_s))
        value = min(self.linear_value(job, speed), affordable)
        charge_max = value - egress
        action = "start"
        if job.incumbent is not None:
            action = "renew" if key == job.incumbent.configuration.key else "move"
        if action == "move" and job.incumbent is not None:
            restart = math.ceil(Fraction(job.incumbent.restart_cost_micros * 3600, term_s))
            value -= restart
            charge_max -= restart + (self._locked_gain(job) if job.job_id in self.kept else 0)
        late = job.deadline_ms is not None and (self.snapshot.taken_at_ms + 1000 * left / speed > job.deadline_ms)
        return Option(
            key=key,
            gpus=gpus,
            speed=speed,
            sync=sync,
            hub_site=hub_site,
            bytes_per_s=sent,
            shares=shares,
            value=value,
            egress=egress,
            charge_max=charge_max,
            term_s=term_s,
            action=action,
            feasible=not late and key not in job.barred and all(share <= LINK_SHARES for share in shares.values()),
        )

    def _locked_gain(self, job: JobState) -> int:
        assert job.incumbent is not None
        sold = job.incumbent.configuration
        paid = sum(job.incumbent.locked_prices.get(part.pool_id, 0) * part.gpus for part in sold.parts)
        return max(0, self.linear_value(job, sold.samples_per_s) - self.egress(self.sent(sold)) - paid)

    def _part(self, pool: PoolState, gpus: int) -> SitePart:
        return SitePart(pool.site_id, pool.gpu_type, gpus, pool.flops_per_s, pool.intra_site_bits_per_s)

    def _pools_for(self, job: JobState, gpu_type: str) -> list[PoolState]:
        allowed = [
            pool
            for pool in self.pools.values()
            if pool.gpu_type == gpu_type
            and pool.capacity_gpus >= 1
            and (job.sites_allowed is None or pool.site_id in job.sites_allowed)
        ]
        return sorted(allowed, key=lambda pool: (pool.ask_micros_per_gpu_hour, pool.site_id))

    def _single(self, job: JobState) -> list[list[SitePart]]:
        return [
            [self._part(pool, count)]
            for request in job.accelerators
            for pool in self._pools_for(job, request.gpu_type)
            for count in _ladder(request.count_min, request.count_max, pool.capacity_gpus)
        ]

    def _spanning(self, job: JobState) -> list[list[SitePart]]:
        chosen: list[list[SitePart]] = []
        for request in sorted(job.accelerators, key=lambda request: request.gpu_type):
            splits = self._spans(job, request.gpu_type, request.count_min, request.count_max)
            for parts in itertools.islice(splits, SPANS_TRIED_MAX):
                if len(chosen) < SPANS_MAX and self.judged(job, parts) is not None:
                    chosen.append(parts)
        return chosen

    def _spans(self, job: JobState, gpu_type: str, low: int, high: int) -> itertools.chain[list[SitePart]]:
        pools = self._pools_for(job, gpu_type)
        groups = itertools.chain.from_iterable(
            itertools.combinations(pools, size) for size in range(2, min(job.sites_max, len(pools)) + 1)
        )
        return itertools.chain.from_iterable(
            self._splits(sorted(group, key=lambda pool: pool.site_id), low, high)
            for group in groups
            if self.hub_exists([pool.site_id for pool in group])
        )

    def hub_exists(self, sites: list[str]) -> bool:
        """Return whether one of the sites listens and has links both ways with each other one."""
        return any(
            {(hub, other) for other in sites if other != hub} | {(other, hub) for other in sites if other != hub}
            <= self.links.keys()
            for hub in self.listening.intersection(sites)
        )

    def _splits(self, pools: list[PoolState], low: int, high: int) -> list[list[SitePart]]:
        capacity = [pool.capacity_gpus for pool in pools]
        result: list[list[SitePart]] = []
        for total in _ladder(low, high, sum(capacity)):
            base, extra = divmod(total, len(pools))
            equal = [base + (index < extra) for index in range(len(pools))]
            ideal = [Fraction(total * most, sum(capacity)) for most in capacity]
            proportional = [math.floor(share) for share in ideal]
            by_remainder = sorted(range(len(pools)), key=lambda i: (math.floor(ideal[i]) - ideal[i], i))
            for index in by_remainder[: total - sum(proportional)]:
                proportional[index] += 1
            splits = [equal] if equal == proportional else [equal, proportional]
            result += [
                [self._part(pool, count) for pool, count in zip(pools, split, strict=True)]
                for split in splits
                if all(1 <= count <= most for count, most in zip(split, capacity, strict=True))
            ]
        return result


def _ladder(low: int, high: int, capacity: int) -> list[int]:
    return [
        count
        for count in range(low, min(high, capacity) + 1)
        if count in {low, high, min(high, capacity)} or count & (count - 1) == 0
    ]
