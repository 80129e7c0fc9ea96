"""Quotes: what a job could get, before it is submitted, without any effect.

`quote` prices every candidate at the last published prices; `never_possible` says at submit that
no federation of these sites could ever hold the job, however little else ran.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from broker.allocation.candidates import Candidate, candidates
from broker.allocation.configuration import Configuration
from broker.allocation.market import Market, open_market
from broker.allocation.snapshot import JobState, LinkState, PoolState, SiteState, Snapshot
from pricing.money import divide_up
from pricing.value import value_micros_per_hour


@dataclass(frozen=True, slots=True)
class QuoteRow:
    """One configuration at the last prices; `reason` says why it could not win, None that it could.

    `price_micros_per_hour` has GPUs and predicted egress; `total_micros` is for all samples left.
    """

    configuration: Configuration
    samples_per_s: float
    hours_to_finish: float
    price_micros_per_hour: int
    total_micros: int
    value_micros_per_hour: int
    reason: str | None


def quote(snapshot: Snapshot, job: JobState) -> list[QuoteRow]:
    """Return the candidate table of a job, those that could win first, then by total price."""
    market = open_market(snapshot)
    rows = [_row(market, job, candidate) for candidate in candidates(market, job)]
    return sorted(rows, key=lambda row: (row.reason is not None, row.total_micros, row.configuration.key))


def never_possible(
    job: JobState, pools: Sequence[PoolState], sites: Sequence[SiteState], links: Sequence[LinkState]
) -> str | None:
    """Return why no round could ever place a job, None where one could; pools at full capacity."""
    allowed = [pool for pool in pools if job.sites_allowed is None or pool.site_id in job.sites_allowed]
    types = {request.gpu_type for request in job.accelerators}
    if not any(pool.gpu_type in types and pool.capacity_gpus > 0 for pool in allowed):
        where = "no site that the job allows" if job.sites_allowed is not None else "no site of this federation"
        return f"no federation could ever hold this job: {where} offers {' or '.join(sorted(types))}"
    sentences = []
    for request in job.accelerators:
        most = sorted((pool.capacity_gpus for pool in allowed if pool.gpu_type == request.gpu_type), reverse=True)
        within = min(job.sites_max, len(most))
        if sum(most[:within]) < request.count_min:
            largest = "the largest site has" if within <= 1 else f"the largest {_number(within)} sites have"
            sentences.append(
                f"it asks for {request.count_min} {request.gpu_type} within {job.sites_max} "
                f"site{'s' if job.sites_max > 1 else ''}; {largest} {sum(most[:within])}"
            )
    if len(sentences) == len(job.accelerators):
        return "no federation could ever hold this job: " + ", and ".join(sentences)
    return _unreachable(job, allowed, sites, links)


def _unreachable(
    job: JobState, allowed: Sequence[PoolState], sites: Sequence[SiteState], links: Sequence[LinkState]
) -> str | None:
    """Explain a job that only fits across sites, where none of them can be a hub."""
    largest = {
        request.gpu_type: max((p.capacity_gpus for p in allowed if p.gpu_type == request.gpu_type), default=0)
        for request in job.accelerators
    }
    if any(largest[request.gpu_type] >= request.count_min for request in job.accelerators):
        return None
    pairs = {(link.from_site, link.to_site) for link in links}
    reach = {pool.site_id for pool in allowed}
    hubs = {site.site_id for site in sites if site.listens} & reach
    if any((hub, site) in pairs and (site, hub) in pairs for hub in hubs for site in reach):
        return None
    return (
        "no federation could ever hold this job: it only fits across sites, and none of them listens with links "
        "both ways to another; ask an operator to set `listen`, or ask for fewer GPUs"
    )


def _row(market: Market, job: JobState, candidate: Candidate) -> QuoteRow:
    sold = candidate.configuration
    last = market.snapshot.last_prices
    gpus = sum(
        max(last.get(part.pool_id, 0), market.pools[part.pool_id].ask_micros_per_gpu_hour) * part.gpus
        for part in sold.parts
    )
    price = gpus + market.egress_micros_per_hour(sold)
    value = value_micros_per_hour(job.bid_micros_per_million_samples, sold.samples_per_s)
    seconds = job.samples_left / sold.samples_per_s
    return QuoteRow(
        configuration=sold,
        samples_per_s=sold.samples_per_s,
        hours_to_finish=seconds / 3600,
        price_micros_per_hour=price,
        total_micros=divide_up(price * max(1, round(seconds * 1000)), 3_600_000),
        value_micros_per_hour=value,
        reason=candidate.reason or _unaffordable(candidate, price, value),
    )


def _unaffordable(candidate: Candidate, price: int, value: int) -> str | None:
    if value < price:
        return "the bid is worth less than the last price"
    if candidate.column is not None and candidate.column.value < price:
        return f"the budget left cannot reserve a term of {candidate.column.term_s} s at the last price"
    return None


def _number(count: int) -> str:
    return {2: "two", 3: "three", 4: "four"}.get(count, str(count))
