"""Why a job stands where it stands, in one sentence each, from the prices.

For a placed job: what it gets and what it keeps. For one left out: the constraint that binds and
what would change it, a bid or a relaxed request, true at this round's prices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from broker.allocation.candidates import Candidate, Column
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


def unplaced(
    market: Market, looked_at: Mapping[str, Sequence[Candidate]], prices: Prices, placed: Sequence[Column]
) -> list[Unplaced]:
    """Return one row for every job that has no placement."""
    holders = {column.job.job_id for column in placed}
    free = {pool_id: pool.capacity_gpus for pool_id, pool in market.pools.items()}
    for column in placed:
        for part in column.configuration.parts:
            free[part.pool_id] -= part.gpus
    equity = market.snapshot.market_equity_micros - sum(uplift_cost(prices, column) for column in placed)
    return [
        _why_not(market, job, looked_at[job.job_id], prices, free=free, equity=equity)
        for job in market.jobs
        if job.job_id not in holders
    ]


def _why_not(
    market: Market,
    job: JobState,
    looked_at: Sequence[Candidate],
    prices: Prices,
    *,
    free: dict[str, int],
    equity: int,
) -> Unplaced:
    if job.samples_left == 0:
        return _row(job, "finished", "all its samples are done; it needs no GPUs", None)
    if not looked_at:
        sentence = never_possible(job, market.snapshot.pools, market.snapshot.sites, market.snapshot.links)
        fallback = "no pool that it accepts has enough GPUs this round; wait, or accept others"
        return _row(job, "no_pool", sentence or fallback, None)
    priced = [candidate.column for candidate in looked_at if candidate.column is not None]
    if not priced:
        return _obstacles(job, looked_at)
    if any(prices.surplus(column) >= 0 for column in priced):
        return _fragmented(job, priced, free)
    return _priced_out(market, job, priced, prices, free=free, equity=equity)


def _priced_out(
    market: Market, job: JobState, priced: Sequence[Column], prices: Prices, *, free: dict[str, int], equity: int
) -> Unplaced:
    """Explain a job whose every configuration costs more than it is worth, by the one nearest to winning.

    GPUs that are free come first: a bid that covers their price wins them without taking a place
    from a rival, who would push the price up.
    """
    open_ones = [column for column in priced if _free(column, free)]
    if all(_capped(job, column) for column in open_ones or priced):
        return _short_of_budget(job, min(open_ones or priced, key=lambda column: _reservation(prices, column)), prices)
    able = [column for column in open_ones or priced if not _capped(job, column)]
    closest = min(
        able, key=lambda column: (_bid_for(job, column, 1 - prices.surplus(column)), column.configuration.key)
    )
    bid = _bid_for(job, closest, 1 - prices.surplus(closest))
    remedy = _remedy(market, job, bid)
    name, cost = closest.configuration.key, format_credits(prices.gross(closest) + closest.egress)
    worth = format_credits(max(0, closest.value))
    if all(column.worth <= 0 for column in priced):
        asks = format_credits(closest.asks + closest.egress)
        sentence = f"for {name} the sites ask {asks} credits an hour, the bid is worth {worth} there; {remedy}"
        return _row(job, "bid_below_ask", sentence, bid)
    if open_ones:
        left = format_credits(max(0, equity))
        sentence = (
            f"{name} is free at {cost} credits an hour, the bid is worth {worth} there, and the market's own {left} "
            f"credits cannot bridge that; {remedy}"
        )
        return _row(job, "uplift_short", sentence, bid)
    sentence = f"others bid more: {name} costs {cost} credits an hour, the bid is worth {worth} there; {remedy}"
    return _row(job, "outbid", sentence, bid)


def _short_of_budget(job: JobState, column: Column, prices: Prices) -> Unplaced:
    sentence = (
        f"its budget is the limit: {format_credits(job.hold_left_micros)} credits are left, and {column.term_s} s of "
        f"{column.configuration.key} need {format_credits(_reservation(prices, column))}; raise the budget"
    )
    return _row(job, "budget_short", sentence, None)


def _fragmented(job: JobState, priced: Sequence[Column], free: dict[str, int]) -> Unplaced:
    smallest = min(column.configuration.gpus for column in priced)
    pools = {part.pool_id for column in priced for part in column.configuration.parts}
    most = max((free[pool_id] for pool_id in pools), default=0)
    sentence = (
        f"the bid covers the price, but its least is {smallest} GPUs and no more than {most} are left in any one pool; "
        "a smaller count_min, one more GPU type or one more site would help, or the next round may"
    )
    return _row(job, "fragmented", sentence, None)


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


def _reservation(prices: Prices, column: Column) -> int:
    return divide_up((prices.gross(column) + column.egress) * column.term_s, SECONDS_PER_HOUR)


def _remedy(market: Market, job: JobState, bid: int) -> str:
    others = sorted({pool.site_id for pool in market.pools.values()} - set(job.sites_allowed or ()))
    wider = f", or allow another site ({others[0]})" if job.sites_allowed is not None and others else ""
    return f"a bid of {format_credits(bid)} credits per million samples would reach it{wider}"


def _free(column: Column, free: dict[str, int]) -> bool:
    return all(free[part.pool_id] >= part.gpus for part in column.configuration.parts)


def _row(job: JobState, code: UnplacedCode, sentence: str, bid: int | None) -> Unplaced:
    return Unplaced(job_id=job.job_id, code=code, sentence=sentence, bid_needed_micros_per_million_samples=bid)
