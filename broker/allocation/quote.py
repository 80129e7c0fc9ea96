"""Quotes: what a job could get, before it is submitted, without any effect.

`quote` prices configurations at the last published prices; `never_possible` says at submit that
no federation of these sites could ever hold the job, however little else ran.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Final

from broker.allocation.configuration import Configuration, configuration_of
from broker.allocation.groups import divided
from broker.allocation.rules import SPAN_SITES_MAX, WEIGHTS, Rules, ladder
from broker.allocation.snapshot import JobState, LinkState, PoolState, SiteState, Snapshot
from pricing.money import divide_up
from training.catalogue import GPU_TYPES
from training.spec import SyncPlan
from training.throughput import SitePart, predict

# A quote is for a person: the cheapest spans are enough, and looking further has an end.
SPANS_QUOTED_MAX: Final = 64
SPANS_TRIED_MAX: Final = 1024
# Of each GPU type, the sites whose GPUs cost least for what they do; at 200 sites the rest is no news.
SITES_QUOTED_MAX: Final = 48


@dataclass(frozen=True, slots=True)
class QuoteRow:
    """One configuration at the last prices; `reason` says why it could not win, None that it could.

    `possible` says whether the rules allow it at all, whatever is bid. `price_micros_per_hour` has GPUs and predicted egress; `total_micros` is for all samples left.
    """

    configuration: Configuration
    samples_per_s: float
    hours_to_finish: float
    price_micros_per_hour: int
    total_micros: int
    value_micros_per_hour: int
    possible: bool
    reason: str | None


def quote(snapshot: Snapshot, job: JobState) -> list[QuoteRow]:
    """Return the table of what a job could get, those that could win first, then by total price.

    Every place on one site is listed, on up to SITES_QUOTED_MAX sites of a GPU type, and up to SPANS_QUOTED_MAX across sites, cheapest sites first.
    """
    rules = Rules(snapshot)
    if rules.left(job) == 0:
        return []
    rows = [_row(rules, job, parts, plan, hub) for parts, plan, hub in _places(rules, job)]
    return sorted(rows, key=lambda row: (row.reason is not None, row.total_micros, row.configuration.key))


Place = tuple[list[SitePart], SyncPlan, str | None]


def _places(rules: Rules, job: JobState) -> Iterator[Place]:
    """Yield what the job could be given: on one site, then across sites."""
    for request in sorted(job.accelerators, key=lambda request: request.gpu_type):
        pools = _pools(rules, job, request.gpu_type)
        for pool in sorted(pools, key=lambda pool: _cost_per_flop(rules, job, pool))[:SITES_QUOTED_MAX]:
            for count in ladder(request):
                parts = [rules.part(job, pool, count)]
                plan = rules.resolved(job, parts, None)
                if plan is not None and count <= rules.most(pool):
                    yield parts, plan, None
    yield from islice(_spans(rules, job), SPANS_QUOTED_MAX)


def _pools(rules: Rules, job: JobState, gpu_type: str) -> list[PoolState]:
    """Return the pools that a job may use, in ascending order of what they cost."""
    last = rules.snapshot.last_prices
    allowed = (
        pool
        for pool in rules.pools.values()
        if pool.gpu_type == gpu_type and rules.most(pool) > 0 and rules.may_be_at(job, pool.site_id)
    )
    return sorted(allowed, key=lambda p: (max(last.get(p.pool_id, 0), p.ask_micros_per_gpu_hour), p.site_id))


def _cost_per_flop(rules: Rules, job: JobState, pool: PoolState) -> float:
    last = rules.snapshot.last_prices.get(pool.pool_id, 0)
    flops_per_s = rules.part(job, pool, 1).flops_per_s
    gpu = GPU_TYPES[pool.gpu_type]
    return max(last, pool.ask_micros_per_gpu_hour) / (flops_per_s or gpu.peak_flops_per_s * gpu.achieved_share)


def _spans(rules: Rules, job: JobState) -> Iterator[Place]:
    for request in sorted(job.accelerators, key=lambda request: request.gpu_type):
        pools = _pools(rules, job, request.gpu_type)
        for sites in range(2, min(job.sites_max, SPAN_SITES_MAX, len(pools)) + 1):
            for chosen in islice(combinations(pools, sites), SPANS_TRIED_MAX):
                group = sorted(chosen, key=lambda pool: pool.site_id)
                hubs = rules.hubs([pool.site_id for pool in group])
                for hub in hubs[:1] if sites == 2 else hubs:  # noqa: PLR2004  with two sites either hub is alike
                    yield from _divided(rules, job, group, hub, ladder(request))


def _divided(rules: Rules, job: JobState, group: list[PoolState], hub: str, totals: list[int]) -> Iterator[Place]:
    seen = set()
    given = tuple(rules.most(pool) for pool in group)
    for total in totals:
        for weights in (*WEIGHTS[len(group)], given):
            counts = tuple(divided(total, weights))
            fits = all(1 <= n <= rules.most(pool) for n, pool in zip(counts, group, strict=True))
            if not fits or counts in seen:
                continue
            seen.add(counts)
            parts = [rules.part(job, pool, n) for pool, n in zip(group, counts, strict=True)]
            plan = rules.resolved(job, parts, hub)
            if plan is not None:
                yield parts, plan, hub


def _row(rules: Rules, job: JobState, parts: list[SitePart], plan: SyncPlan, hub: str | None) -> QuoteRow:
    prediction = predict(job.workload, plan, parts, rules.speeds, hub)
    sold = configuration_of(parts, plan, hub, prediction)
    last = rules.snapshot.last_prices
    gpus = sum(
        max(last.get(part.pool_id, 0), rules.pools[part.pool_id].ask_micros_per_gpu_hour) * part.gpus
        for part in sold.parts
    )
    option = rules.option(job, parts, plan, hub, action="start")
    price = gpus + (option.egress if option is not None else 0)
    value = rules.value_rate(job, sold.samples_per_s)
    if option is not None and rules.snapshot.payment_rule == "pay_as_bid":
        price = max(price, option.value)
    seconds = rules.left(job) / sold.samples_per_s
    if sold.key in job.barred:
        reason: str | None = "a site declined this configuration a short while ago"
    elif option is None:
        reason = _obstacle(rules, job, sold)
    elif value < price:
        reason = "the bid is worth less than the last price"
    elif option.value < price:
        reason = f"the budget left cannot reserve a term of {option.term_s} s at the last price"
    else:
        reason = None
    return QuoteRow(
        configuration=sold,
        samples_per_s=sold.samples_per_s,
        hours_to_finish=seconds / 3600,
        price_micros_per_hour=price,
        total_micros=divide_up(price * max(1, round(seconds * 1000)), 3_600_000),
        value_micros_per_hour=value,
        possible=option is not None and sold.key not in job.barred,
        reason=reason,
    )


def _obstacle(rules: Rules, job: JobState, sold: Configuration) -> str:
    """Return why the rules do not allow a configuration: its traffic, or the deadline."""
    for row in sold.traffic:
        pair = (row.from_site, row.to_site)
        if rules.shares(pair, row.bytes_per_s) > 10_000:  # noqa: PLR2004  all of the link
            return f"its own traffic exceeds the link from {pair[0]} to {pair[1]}"
    finish_ms = rules.snapshot.taken_at_ms + 1000 * rules.left(job) / sold.samples_per_s
    late_h = (finish_ms - (job.deadline_ms or 0)) / 3_600_000
    return f"it would finish {late_h:.2f} hours after the deadline"


def never_possible(
    job: JobState, pools: Sequence[PoolState], sites: Sequence[SiteState], links: Sequence[LinkState]
) -> str | None:
    """Return why no round could ever place a job, None where one could; pools at full capacity."""
    allowed = [pool for pool in pools if job.sites_allowed is None or pool.site_id in job.sites_allowed]
    types = {request.gpu_type for request in job.accelerators}
    if not any(pool.gpu_type in types and pool.capacity_gpus > 0 for pool in allowed):
        where = "no site that the job allows" if job.sites_allowed is not None else "no site of this federation"
        return f"no federation could ever hold this job: {where} offers {' or '.join(sorted(types))}"
    if job.mixed_types:
        return None  # types may complete one another; what that comes to is a round's to find out
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


def _number(count: int) -> str:
    return {2: "two", 3: "three", 4: "four"}.get(count, str(count))
