"""Why a job stands where it stands, in one sentence each, from the prices.

For a placed job: what it gets and what it keeps. For one left out: the constraint that binds and
what would change it, a bid or a relaxed request, true at this round's prices.
"""

from __future__ import annotations

from collections.abc import Sequence

from broker.allocation.candidates import Candidate, Column, candidates
from broker.allocation.clearing import Unplaced, UnplacedCode
from broker.allocation.market import Market
from broker.allocation.prices import Prices
from broker.allocation.quote import never_possible
from broker.allocation.repair import uplift_cost
from broker.allocation.snapshot import JobState
from pricing.money import SECONDS_PER_HOUR, divide_up, format_credits
from pricing.value import bid_for_value, value_micros_per_hour


def why_placed(market: Market, prices: Prices, column: Column) -> str:
    """Return why a job won this configuration."""
    sold = column.configuration
    where = " and ".join(f"{part.gpus} {part.gpu_type} at {part.site_id}" for part in sold.parts)
    if column.action == "keep":
        return f"{where}: inside its term, so place and price stay as agreed"
    gross, uplift = prices.gross(column), prices.uplift(column)
    scarce = [
        part.pool_id
        for part in sold.parts
        if prices.pools[part.pool_id] > market.pools[part.pool_id].ask_micros_per_gpu_hour
    ]
    price = f"{' and '.join(scarce)} above ask, as others want it too" if scarce else "at the sites' asks"
    kept = format_credits(max(0, column.value - column.egress - gross + uplift))
    discount = f", {format_credits(uplift)} of it borne by the market" if uplift else ""
    return (
        f"{where}: worth {format_credits(column.value)} credits an hour, costs {format_credits(gross)}"
        f"{discount} ({price}), and leaves {kept}"
    )


def unplaced(market: Market, every: Sequence[Column], prices: Prices, placed: Sequence[Column]) -> list[Unplaced]:
    """Return one row for every job that has no placement."""
    holders = {column.job.job_id for column in placed}
    mine: dict[str, list[Column]] = {}
    for column in every:
        mine.setdefault(column.job.job_id, []).append(column)
    free = {pool_id: pool.capacity_gpus for pool_id, pool in market.pools.items()}
    for column in placed:
        for part in column.configuration.parts:
            free[part.pool_id] -= part.gpus
    equity = market.snapshot.market_equity_micros - sum(uplift_cost(prices, column) for column in placed)
    return [
        _outbid(market, job, mine[job.job_id], prices, free=free, equity=equity)
        if job.job_id in mine
        else _without_columns(market, job)
        for job in market.jobs
        if job.job_id not in holders
    ]


def _outbid(
    market: Market, job: JobState, mine: Sequence[Column], prices: Prices, *, free: dict[str, int], equity: int
) -> Unplaced:
    """Explain a job that had configurations worth their ask, and got none."""
    closest = max(mine, key=lambda column: (prices.surplus(column), -column.configuration.gpus))
    name = closest.configuration.key
    missing = -prices.surplus(closest)
    if missing > 0 and not _free(closest, free):
        bid = _bid_for(job, closest, missing)
        sentence = (
            f"at this round's prices {name} costs {format_credits(prices.gross(closest))} credits an hour, "
            f"{format_credits(missing)} more than the bid is worth there; "
            f"{_remedy(market, job, closest, bid)}"
        )
        return _row(job, "outbid", sentence, bid)
    if missing > 0:
        bid = _bid_for(job, closest, missing)
        sentence = (
            f"{name} is free but priced {format_credits(missing)} credits an hour above the bid's worth, and the market "
            f"has {format_credits(max(0, equity))} credits to bridge that; {_remedy(market, job, closest, bid)}"
        )
        return _row(job, "uplift_short", sentence, bid)
    smallest = min(column.configuration.gpus for column in mine)
    most = max((count for pool_id, count in free.items() if any(_names(column, pool_id) for column in mine)), default=0)
    sentence = (
        f"the bid covers the price, but no whole {smallest} GPUs are left together (at most {most} in one pool); "
        "a smaller count_min, one more GPU type or one more site would help, or wait for the next round"
    )
    return _row(job, "fragmented", sentence, None)


def _without_columns(market: Market, job: JobState) -> Unplaced:
    """Explain a job that no configuration was worth placing for."""
    if job.samples_left == 0:
        return _row(job, "finished", "all its samples are done; it needs no GPUs", None)
    looked_at = candidates(market, job)
    if not looked_at:
        sentence = never_possible(job, market.snapshot.pools, market.snapshot.sites, market.snapshot.links)
        return _row(
            job, "no_pool", sentence or "no pool that it accepts has GPUs this round; wait, or accept others", None
        )
    priced = [candidate.column for candidate in looked_at if candidate.column is not None]
    if not priced:
        return _obstacles(job, looked_at)
    closest = max(priced, key=lambda column: column.worth)
    missing = 1 - closest.worth
    bid = _bid_for(job, closest, missing)
    sentence = (
        f"{closest.configuration.key} is the closest: the sites ask {format_credits(closest.asks + closest.egress)} credits "
        f"an hour, the bid is worth {format_credits(max(0, closest.value))}; {_remedy(market, job, closest, bid)}"
    )
    return _row(job, "budget_short" if _capped(job, closest) else "bid_below_ask", sentence, bid)


def _obstacles(job: JobState, looked_at: Sequence[Candidate]) -> Unplaced:
    fastest = max(looked_at, key=lambda candidate: candidate.configuration.samples_per_s)
    reasons = {candidate.reason or "" for candidate in looked_at}
    code: UnplacedCode = "no_pool"
    if any("deadline" in reason for reason in reasons):
        code = "deadline"
    elif any("declined" in reason for reason in reasons):
        code = "barred"
    sentence = (
        f"none of {len(looked_at)} configurations will do; the fastest, {fastest.configuration.key}: {fastest.reason}"
    )
    return _row(job, code, sentence, None)


def _bid_for(job: JobState, column: Column, missing: int) -> int:
    """Return the bid at which a column's value rises by `missing` per hour."""
    speed = column.configuration.samples_per_s
    linear = value_micros_per_hour(job.bid_micros_per_million_samples, speed)
    return bid_for_value(max(linear, 0) + missing, speed)


def _capped(job: JobState, column: Column) -> bool:
    """Return whether the hold, not the bid, limits what a column is worth."""
    linear = value_micros_per_hour(job.bid_micros_per_million_samples, column.configuration.samples_per_s)
    return column.action == "start" and column.value < linear


def _remedy(market: Market, job: JobState, column: Column, bid: int) -> str:
    if _capped(job, column):
        needed = format_credits(divide_up((column.asks + column.egress) * column.term_s, SECONDS_PER_HOUR))
        return (
            f"its budget is the limit: {format_credits(job.hold_left_micros)} credits are left and a term of {column.term_s} s "
            f"needs at least {needed}; raise the budget"
        )
    others = sorted({pool.site_id for pool in market.pools.values()} - set(job.sites_allowed or ()))
    wider = f", or allow another site ({others[0]})" if job.sites_allowed is not None and others else ""
    return f"a bid of {format_credits(bid)} credits per million samples would reach it{wider}"


def _free(column: Column, free: dict[str, int]) -> bool:
    return all(free[part.pool_id] >= part.gpus for part in column.configuration.parts)


def _names(column: Column, pool_id: str) -> bool:
    return any(part.pool_id == pool_id for part in column.configuration.parts)


def _row(job: JobState, code: UnplacedCode, sentence: str, bid: int | None) -> Unplaced:
    return Unplaced(job_id=job.job_id, code=code, sentence=sentence, bid_needed_micros_per_million_samples=bid)
