"""Candidates: the configurations that a job could be given this round, each with its worth.

Small instances are enumerated: on one site, every power of two within the request, its ends, and
the whole pool; on 2 to `sites_max` sites of one GPU type, the same totals split equally and in
proportion to capacity, up to SPANS_MAX of them, sites in ascending order of ask. A configuration
whose own traffic exceeds a link, or that cannot meet the deadline, does not exist.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice

from broker.allocation.clearing import LINK_SHARES, Action
from broker.allocation.configuration import (
    SPANS_MAX,
    SPANS_TRIED_MAX,
    TERM_MARGIN,
    TERM_S_MIN,
    Configuration,
    Part,
    Traffic,
)
from broker.allocation.market import Market, Pair
from broker.allocation.snapshot import Incumbent, JobState, PoolState
from pricing.money import SECONDS_PER_HOUR, divide_up
from pricing.value import affordable_micros_per_hour, value_micros_per_hour
from training.spec import GpuRequest, SyncPlan
from training.throughput import Prediction, SitePart, predict, resolve_sync


@dataclass(frozen=True, slots=True)
class Column:
    """A candidate of one job: a column of the allocation LP. Rates are micro-credits per hour.

    `value` is net of what a move destroys; `charge_max` is the most that the buyer may be charged
    for GPUs and link rent together; `worth` is value less egress and asks: the gain to everyone.
    """

    job: JobState
    configuration: Configuration
    action: Action
    value: int
    egress: int
    asks: int
    charge_max: int
    term_s: int
    shares: tuple[tuple[Pair, int], ...]

    @property
    def worth(self) -> int:
        """What this placement adds to welfare per hour."""
        return self.value - self.egress - self.asks


@dataclass(frozen=True, slots=True)
class Candidate:
    """A configuration looked at for a job: a column, or the reason why it is none."""

    configuration: Configuration
    column: Column | None
    reason: str | None


def columns(market: Market, job: JobState) -> list[Column]:
    """Return the columns of a job that could ever be worth placing, in a fixed order."""
    return worthwhile(candidates(market, job))


def worthwhile(looked_at: Sequence[Candidate]) -> list[Column]:
    """Return the columns of one job that gain something at the asks; all of them for a kept job.

    A kept job has no way to stay out, so even its losses compete with one another.
    """
    found = [candidate.column for candidate in looked_at if candidate.column is not None]
    if any(column.action == "keep" for column in found):
        return found
    return [column for column in found if column.worth > 0]


def candidates(market: Market, job: JobState) -> list[Candidate]:
    """Return every configuration of a job in a fixed order, the incumbent's first."""
    found = []
    own_key = None
    if job.samples_left == 0 and job.job_id not in market.kept:
        return []
    if job.incumbent is not None:
        own = _own(market, job, job.incumbent)
        if own is not None:
            own_key = own.configuration.key
            found.append(own)
    found += [
        _judged(market, job, configuration)
        for configuration in _configurations(market, job)
        if configuration.key != own_key
    ]
    return found


def _own(market: Market, job: JobState, incumbent: Incumbent) -> Candidate | None:
    """Return the place that a job already has: as sold inside its term, predicted anew after it."""
    sold = incumbent.configuration
    if job.job_id in market.kept:
        value = value_micros_per_hour(job.bid_micros_per_million_samples, sold.samples_per_s)
        egress = market.egress_micros_per_hour(sold)
        term_s = max(1, (incumbent.term_ends_ms - market.snapshot.taken_at_ms) // 1000)
        return Candidate(
            sold,
            _column(
                market, job, sold, action="keep", value=value, egress=egress, charge_max=value - egress, term_s=term_s
            ),
            None,
        )
    pools = [market.pools.get(part.pool_id) for part in sold.parts]
    fits = all(
        pool is not None and pool.capacity_gpus >= part.gpus for pool, part in zip(pools, sold.parts, strict=True)
    )
    if not fits or any(not _reachable(market, row.from_site, row.to_site) for row in sold.traffic):
        return None
    parts = [market.site_part(pool, part.gpus) for pool, part in zip(pools, sold.parts, strict=True) if pool]
    hub = sold.hub_site
    return _judged(market, job, _predicted(market, job, parts, sold.sync, hub))


def _judged(market: Market, job: JobState, configuration: Configuration) -> Candidate:
    """Price one configuration for a job, or say why it has no value."""
    reason = _obstacle(market, job, configuration)
    if reason is not None:
        return Candidate(configuration, None, reason)
    term_s = _term_s(market, job, configuration)
    egress = market.egress_micros_per_hour(configuration)
    rows = 1 + len(configuration.traffic)
    affordable = affordable_micros_per_hour(job.hold_left_micros, term_s, rows)
    value: int = min(value_micros_per_hour(job.bid_micros_per_million_samples, configuration.samples_per_s), affordable)
    charge_max = value - egress
    action: Action = "start"
    if job.incumbent is not None:
        same = job.incumbent.configuration.key == configuration.key
        action = "renew" if same else "move"
        if not same:
            restart = divide_up(job.incumbent.restart_cost_micros * SECONDS_PER_HOUR, term_s)
            value -= restart
            charge_max -= restart + (_locked_surplus(market, job, job.incumbent) if job.job_id in market.kept else 0)
    return Candidate(
        configuration,
        _column(
            market,
            job,
            configuration,
            action=action,
            value=value,
            egress=egress,
            charge_max=charge_max,
            term_s=term_s,
        ),
        None,
    )


def _obstacle(market: Market, job: JobState, configuration: Configuration) -> str | None:
    if configuration.key in job.barred:
        return "a site declined this configuration a short while ago"
    for pair, shares in market.shares(configuration).items():
        if shares > LINK_SHARES:
            return f"its own traffic exceeds the link from {pair[0]} to {pair[1]}"
    if job.deadline_ms is not None:
        finish_ms = market.snapshot.taken_at_ms + 1000 * job.samples_left / configuration.samples_per_s
        if finish_ms > job.deadline_ms:
            return f"it would finish {(finish_ms - job.deadline_ms) / 3_600_000:.2f} hours after the deadline"
    return None


def _locked_surplus(market: Market, job: JobState, incumbent: Incumbent) -> int:
    """Return what the tenant gains per hour under the running term: a move must not take it away."""
    sold = incumbent.configuration
    value = value_micros_per_hour(job.bid_micros_per_million_samples, sold.samples_per_s)
    paid = sum(incumbent.locked_prices.get(part.pool_id, 0) * part.gpus for part in sold.parts)
    return max(0, value - market.egress_micros_per_hour(sold) - paid)


def _term_s(market: Market, job: JobState, configuration: Configuration) -> int:
    left_s = math.ceil(TERM_MARGIN * job.samples_left / configuration.samples_per_s)
    return min(market.snapshot.term_s, max(TERM_S_MIN, left_s))


def _column(
    market: Market,
    job: JobState,
    configuration: Configuration,
    *,
    action: Action,
    value: int,
    egress: int,
    charge_max: int,
    term_s: int,
) -> Column:
    return Column(
        job=job,
        configuration=configuration,
        action=action,
        value=value,
        egress=egress,
        asks=market.ask_micros_per_hour(configuration),
        charge_max=charge_max,
        term_s=term_s,
        shares=tuple(sorted(market.shares(configuration).items())),
    )


def _configurations(market: Market, job: JobState) -> Iterator[Configuration]:
    spans_left = SPANS_MAX
    for request in sorted(job.accelerators, key=lambda request: request.gpu_type):
        pools = _eligible(market, job, request.gpu_type)
        for pool in pools:
            for count in _totals(request, pool.capacity_gpus):
                yield from _resolved(market, job, [market.site_part(pool, count)])
        splits = islice(_splits(market, pools, request, job.sites_max), SPANS_TRIED_MAX)
        spans = (configuration for parts in splits for configuration in _resolved(market, job, parts))
        for configuration in islice(spans, spans_left):
            spans_left -= 1
            yield configuration


def _eligible(market: Market, job: JobState, gpu_type: str) -> list[PoolState]:
    """Return the pools that a job may use, in ascending order of ask."""
    return sorted(
        (
            pool
            for pool in market.pools.values()
            if pool.gpu_type == gpu_type
            and pool.capacity_gpus > 0
            and (job.sites_allowed is None or pool.site_id in job.sites_allowed)
        ),
        key=lambda pool: (pool.ask_micros_per_gpu_hour, pool.site_id),
    )


def _totals(request: GpuRequest, capacity_gpus: int) -> list[int]:
    """Return the GPU counts tried: powers of two, both ends of the request, and all there is."""
    powers = {1 << exponent for exponent in range(request.count_max.bit_length())}
    totals = powers | {request.count_min, request.count_max, min(request.count_max, capacity_gpus)}
    return sorted(total for total in totals if request.count_min <= total <= min(request.count_max, capacity_gpus))


def _splits(market: Market, pools: list[PoolState], request: GpuRequest, sites_max: int) -> Iterator[list[SitePart]]:
    for sites in range(2, min(sites_max, len(pools)) + 1):
        for chosen in combinations(pools, sites):
            if not _has_hub(market, chosen):
                continue
            group = sorted(chosen, key=lambda pool: pool.site_id)
            capacity = [pool.capacity_gpus for pool in group]
            for total in _totals(request, sum(capacity)):
                for split in dict.fromkeys((_equal(total, sites), _proportional(total, capacity))):
                    if all(1 <= gpus <= most for gpus, most in zip(split, capacity, strict=True)):
                        yield [market.site_part(pool, gpus) for pool, gpus in zip(group, split, strict=True)]


def _has_hub(market: Market, pools: tuple[PoolState, ...]) -> bool:
    sites = [pool.site_id for pool in pools]
    return any(
        hub in market.listening
        and all(site == hub or ((hub, site) in market.links and (site, hub) in market.links) for site in sites)
        for hub in sites
    )


def _equal(total: int, sites: int) -> tuple[int, ...]:
    return tuple(total // sites + (1 if index < total % sites else 0) for index in range(sites))


def _proportional(total: int, capacity: list[int]) -> tuple[int, ...]:
    """Split `total` in proportion to capacity by largest remainders, ties to the earlier site."""
    everything = sum(capacity)
    split = [total * most // everything for most in capacity]
    remainders = sorted(range(len(capacity)), key=lambda index: (-(total * capacity[index] % everything), index))
    for index in remainders[: total - sum(split)]:
        split[index] += 1
    return tuple(split)


def _resolved(market: Market, job: JobState, parts: list[SitePart]) -> Iterator[Configuration]:
    resolved = resolve_sync(job.workload, job.sync, parts, market.speeds, market.listening)
    if resolved is not None:
        yield _predicted(market, job, parts, resolved.plan, resolved.hub_site)


def _predicted(
    market: Market, job: JobState, parts: list[SitePart], sync: SyncPlan, hub_site: str | None
) -> Configuration:
    prediction = predict(job.workload, sync, parts, market.speeds, hub_site)
    return configuration_of(parts, sync, hub_site, prediction)


def configuration_of(
    parts: list[SitePart], sync: SyncPlan, hub_site: str | None, prediction: Prediction
) -> Configuration:
    """Return the configuration that a prediction is of."""
    return Configuration(
        parts=tuple(
            Part(
                pool_id=f"{part.site_id}/{part.gpu_type}", site_id=part.site_id, gpu_type=part.gpu_type, gpus=part.gpus
            )
            for part in parts
        ),
        sync=sync,
        hub_site=hub_site,
        samples_per_s=prediction.samples_per_s,
        compute_s=prediction.compute_s,
        intra_site_s=prediction.intra_site_s,
        inter_site_s=prediction.inter_site_s,
        step_s=prediction.step_s,
        traffic=tuple(
            Traffic(from_site=row.from_site, to_site=row.to_site, bytes_per_s=math.ceil(row.bytes_per_s))
            for row in prediction.traffic
        ),
    )


def _reachable(market: Market, from_site: str, to_site: str) -> bool:
    return (from_site, to_site) in market.links
