"""Why a job stands where it stands, in one sentence each, from the prices.

For a placed job: what it gets and what it keeps. For one left out: the constraint that binds and
what would change it at this round's prices; prices move with bids, and `counterfactuals` checks by solving again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from broker.allocation import kernel
from broker.allocation.clearing import Unplaced, UnplacedCode
from broker.allocation.configuration import TERM_MARGIN, TERM_S_MIN
from broker.allocation.instance import NONE, RATE_MICROS_PER_HOUR_MAX, SHARES, Flag, Int
from broker.allocation.rents import supplied
from broker.allocation.singles import next_count
from broker.allocation.solver import Outcome, best_columns, used_rows
from broker.allocation.won import Market, Won
from pricing.money import SECONDS_PER_HOUR, divide_up, format_credits
from pricing.value import bid_for_value
from training.throughput import all_reduce_s, compute_s

_NO_POOLS: Final = np.zeros(0, np.int64)


def why_placed(market: Market, prices: Int, column: Won) -> str:
    """Return why a job won this configuration."""
    where = " and ".join(f"{part.gpus} {part.gpu_type} at {part.site_id}" for part in column.configuration.parts)
    if column.action == "keep":
        return f"{where}: inside its term, so place and price stay as agreed"
    gross, uplift = column.gross(market, prices), column.uplift(market, prices)
    rows = market.instance.rows
    scarce = [
        part.pool_id
        for part, (pool, _) in zip(column.configuration.parts, column.pools, strict=True)
        if prices[pool] > rows.step_cost[rows.step_start[pool]]
    ]
    price = f"{' and '.join(scarce)} above ask, as others want it too" if scarce else "at the sites' asks"
    kept = format_credits(max(0, column.value - column.egress - gross + uplift))
    discount = f", {format_credits(uplift)} of it borne by the market" if uplift else ""
    plan = ""
    if column.action != "renew" and len(column.configuration.parts) > 1 and market.instance.jobs.sync_open[column.job]:
        reasons = market.names.plan_reasons(column.job, column.configuration)
        plan = f". Between its sites: {'; '.join(reversed(reasons))}"
    return (
        f"{where}: worth {format_credits(column.value)} credits an hour, costs {format_credits(gross)}"
        f"{discount} ({price}), and leaves {kept}{plan}"
    )


def unplaced(market: Market, outcome: Outcome, now: Sequence[Won], later: Sequence[Won]) -> list[Unplaced]:
    """Return one row for every job that gets nothing now."""
    explained = _Explained(market, outcome, now)
    planned = {column.job: column for column in later}
    placed = {column.job for column in now}
    return [
        explained.planned(planned[job]) if job in planned else explained.why_not(job)
        for job in range(market.instance.job_count)
        if job not in placed
    ]


@dataclass(frozen=True, slots=True)
class _Sketch:
    """A place on one site that was not worth a column: `late_h` above 0 where the deadline would pass."""

    name: str
    speed: float
    linear: int
    affordable: int
    term_s: int
    asks: int
    late_h: float


class _Explained:
    """What is free, and the column nearest to winning of every job, at the round's prices."""

    def __init__(self, market: Market, outcome: Outcome, now: Sequence[Won]) -> None:
        self.market, self.prices = market, outcome.prices
        instance = market.instance
        left_out = outcome.choice.form == NONE
        wanting = instance._replace(jobs=instance.jobs._replace(must=instance.jobs.must | left_out))
        used = used_rows(instance, outcome.choice)
        self.free = supplied(instance, self.prices) - used
        self.nearest = best_columns(wanting, self.prices)
        goods, pools = instance.goods, instance.pools
        windows = [self.free[t * instance.pool_count : (t + 1) * instance.pool_count] for t in range(instance.slots)]
        open_pools = np.maximum(0, windows[0])
        room = np.maximum(0, np.minimum.reduce(windows)) if instance.slots > 1 else open_pools
        self.open = best_columns(
            wanting._replace(
                pools=pools._replace(job_max=np.minimum(pools.job_max, open_pools)),
                goods=goods._replace(offer_limit=np.minimum(goods.offer_limit, room[goods.offer_pool])),
            ),
            self.prices,
        )
        asks = instance.rows.step_cost[instance.rows.step_start[: instance.pool_count]]
        cheapest = np.argsort(asks, kind="stable")
        kinds = np.array([kind for _, kind in market.names.pool_parts])
        self._by_ask = {str(kind): cheapest[kinds[cheapest] == kind] for kind in np.unique(kinds)}
        drawn = sum(
            divide_up(column.uplift(market, self.prices) * column.term_s, SECONDS_PER_HOUR)
            for column in now
            if column.action != "keep"
        )
        self.equity = int(market.tables.market("market_equity_micros")) - drawn

    def planned(self, column: Won) -> Unplaced:
        """Explain a job that waits for a later slot."""
        market = self.market
        starts_at_ms = int(market.tables.market("taken_at_ms")) + column.first_slot * 1000 * int(
            market.tables.market("slot_s")
        )
        wait_h = column.first_slot * int(market.tables.market("slot_s")) / SECONDS_PER_HOUR
        sentence = (
            f"it is worth more in {wait_h:.1f} hours, at {column.configuration.key}, than now at these prices; "
            "planned, not promised"
        )
        return Unplaced(
            job_id=market.names.jobs[column.job],
            code="later",
            sentence=sentence,
            starts_at_ms=starts_at_ms,
            planned=column.configuration,
        )

    def why_not(self, job: int) -> Unplaced:
        """Explain a job that has nothing."""
        if self.market.instance.jobs.samples_left[job] <= 0:
            return self._row(job, "finished", "all its samples are done; it needs no GPUs")
        if self.nearest.form[job] == NONE:
            return self._nothing(job)
        column = self._told(job, self.nearest)
        if self._is_beyond_tenants_budget(job, column):
            return self._tenant_budget(job, column)
        if self.nearest.surplus[job] >= 0:
            return self._fragmented(job, column)
        return self._priced_out(job, column)

    def _is_beyond_tenants_budget(self, job: int, column: Won) -> bool:
        """Return whether the tenant's other placements leave too little of its hourly budget."""
        jobs = self.market.instance.jobs
        row = int(jobs.budget_row[job])
        shares = int(kernel.budget_shares(jobs, job, max(0, column.charge_max + column.egress)))
        return row >= 0 and shares > int(self.free[row])

    def _tenant_budget(self, job: int, column: Won) -> Unplaced:
        jobs = self.market.instance.jobs
        budget = int(jobs.budget[job])
        left = max(0, int(self.free[int(jobs.budget_row[job])])) * budget // SHARES
        sentence = (
            f"the tenant's hourly budget is the limit: {format_credits(left)} of its {format_credits(budget)} credits an "
            f"hour are left, and {column.configuration.key} may cost {format_credits(column.charge_max + column.egress)}; "
            "raise it (hansa budget), bid less, or wait until another job ends"
        )
        return self._row(job, "tenant_budget", sentence)

    def _told(self, job: int, found: object) -> Won:
        form, item, place = (int(getattr(found, name)[job]) for name in ("form", "item", "place"))
        return self.market.told(job, form, item, place)

    def _fragmented(self, job: int, column: Won) -> Unplaced:
        most = max((int(self.free[pool]) for pool in range(self.market.instance.pool_count)), default=0)
        sentence = (
            f"the bid covers the price of {column.configuration.key}, but the GPUs left do not fit it: the most in any "
            f"one pool is {most}; a smaller count_min, one more GPU type or one more site would help, or the next "
            "round may"
        )
        return self._row(job, "fragmented", sentence)

    def _priced_out(self, job: int, nearest: Won) -> Unplaced:
        """Explain a job whose every column costs more than it is worth, by the one nearest to winning.

        GPUs that are free come first: a bid that covers their price wins them without taking a place
        from a rival, who would push the price up.
        """
        is_open = self.open.form[job] != NONE
        column = self._told(job, self.open) if is_open else nearest
        market, prices = self.market, self.prices
        speed = column.configuration.samples_per_s
        linear = int(kernel.value_rate(market.instance.jobs, job, speed))
        gross = column.gross(market, prices)
        missing = 1 - (column.value - column.egress - gross)
        if column.action == "start" and column.value < linear:
            needed = divide_up((gross + column.egress) * column.term_s, SECONDS_PER_HOUR)
            return self._short_of_budget(job, column.configuration.key, column.term_s, needed)
        bid = _told(bid_for_value(max(linear, 0) + missing, speed))
        remedy = self._remedy(bid)
        name, cost = column.configuration.key, format_credits(gross + column.egress)
        worth = format_credits(max(0, column.value))
        if is_open:
            left = format_credits(max(0, self.equity))
            sentence = (
                f"{name} is free at {cost} credits an hour, the bid is worth {worth} there, and the market's own {left} "
                f"credits cannot bridge that; {remedy}"
            )
            return self._row(job, "uplift_short", sentence, bid)
        sentence = f"others bid more: {name} costs {cost} credits an hour, the bid is worth {worth} there; {remedy}"
        return self._row(job, "outbid", sentence, bid)

    def _nothing(self, job: int) -> Unplaced:
        """Explain a job without any column: too large, too late, vetoed, or below the asks everywhere."""
        sketches = self._sketches(job)
        if not sketches:
            return self._row(job, "no_pool", self._no_pool(job))
        in_time = [sketch for sketch in sketches if sketch.late_h <= 0]
        if not in_time:
            fastest = max(sketches, key=lambda sketch: sketch.speed)
            sentence = (
                f"none of its configurations will do; the fastest, {fastest.name}: it would finish "
                f"{fastest.late_h:.2f} hours after the deadline"
            )
            return self._row(job, "deadline", sentence)
        jobs = self.market.instance.jobs
        worthy = [sketch for sketch in in_time if min(sketch.linear, sketch.affordable) > sketch.asks]
        if worthy and jobs.barred_start[job] < jobs.barred_start[job + 1]:
            sentence = f"none of its configurations will do; {worthy[0].name}: a site declined this configuration a short while ago"
            return self._row(job, "barred", sentence)
        capped = [sketch for sketch in in_time if sketch.linear > sketch.asks]
        if capped:
            least = min(capped, key=lambda sketch: sketch.asks * sketch.term_s)
            needed = divide_up(least.asks * least.term_s, SECONDS_PER_HOUR)
            return self._short_of_budget(job, least.name, least.term_s, needed)
        closest = min(in_time, key=lambda sketch: (bid_for_value(sketch.asks + 1, sketch.speed), sketch.name))
        bid = _told(bid_for_value(closest.asks + 1, closest.speed))
        sentence = (
            f"for {closest.name} the sites ask {format_credits(closest.asks)} credits an hour, the bid is worth "
            f"{format_credits(closest.linear)} there; {self._remedy(bid)}"
        )
        return self._row(job, "bid_below_ask", sentence, bid)

    def _sketches(self, job: int) -> list[_Sketch]:
        """Return the job's places at the cheapest pool with room for each count, by GPU type; free GPUs first."""
        market, instance = self.market, self.market.instance
        pools = instance.pools
        allowed = self._allowed_sites(job)[pools.site]
        found = []
        for kind_name, low, high in market.requests(job):
            mine = self._by_ask.get(kind_name, _NO_POOLS)
            mine = mine[allowed[mine]]
            count = low
            while True:
                wide = mine[pools.job_max[mine] >= count]
                if len(wide):
                    free = wide[self.free[wide] >= count]
                    found.append(self._sketch(job, int(free[0] if len(free) else wide[0]), count))
                if count >= high:
                    break
                count = min(high, int(next_count(count)))
        return found

    def _sketch(self, job: int, pool: int, count: int) -> _Sketch:
        instance, jobs = self.market.instance, self.market.instance.jobs
        speed = float(jobs.batch_per_gpu[job]) * count / self._step_s(job, pool, count)
        left = math.ceil(TERM_MARGIN * float(jobs.samples_left[job]) / speed)
        term_s = int(min(instance.term_s, max(float(TERM_S_MIN), left)))
        late_s = float(jobs.samples_left[job]) / speed - float(jobs.deadline_s[job])
        ask = int(instance.rows.step_cost[instance.rows.step_start[pool]])
        return _Sketch(
            name=f"{self.market.names.pools[pool]}:{count}",
            speed=speed,
            linear=self._value_rate(job, speed),
            affordable=max(0, int(jobs.hold_left[job]) - 1) * SECONDS_PER_HOUR // term_s,
            term_s=term_s,
            asks=ask * count,
            late_h=0.0 if math.isinf(late_s) else late_s / SECONDS_PER_HOUR,
        )

    # The compiled rules cost more to call one by one than to compute; a test holds these against them.

    def _allowed_sites(self, job: int) -> Flag:
        """Return where a job may be [sites]: `kernel.site_allowed` for every site at once."""
        sites, jobs = self.market.instance.sites, self.market.instance.jobs
        home, count = int(jobs.home[job]), len(sites.region)
        tier = np.zeros(count, np.int64)
        if home >= 0:
            tier[:] = 3
            tier[(sites.continent == sites.continent[home]) & (sites.continent[home] >= 0)] = 2
            tier[(sites.region == sites.region[home]) & (sites.region[home] >= 0)] = 1
            tier[home] = 0
        allowed: Flag = jobs.tier_price[job, tier] >= 0
        if jobs.site_set[job] >= 0:
            words = self.market.instance.site_sets[jobs.site_set[job]]
            at = np.arange(count)
            allowed &= ((words[at >> 6] >> (at & 63).astype(np.uint64)) & np.uint64(1)).astype(np.bool_)
        return allowed

    def _step_s(self, job: int, pool: int, count: int) -> float:
        """Return one inner step on a pool's GPUs: `kernel.site_step_s`, by the throughput model itself."""
        instance, jobs, kinds = self.market.instance, self.market.instance.jobs, self.market.instance.kinds
        kind = instance.pools.kind[pool]
        flops, ring = jobs.flops_per_s[job, kinds.gpu_type[kind]], jobs.ring_bits_per_s[job, kinds.gpu_type[kind]]
        flops = kinds.flops_per_s[kind] if np.isnan(flops) else flops
        ring = kinds.ring_bits_per_s[kind] if np.isnan(ring) else ring
        computing_s = compute_s(float(jobs.batch_per_gpu[job]), float(jobs.flops_per_sample[job]), float(flops))
        return computing_s + all_reduce_s(float(jobs.parameters[job]), count, float(ring))

    def _value_rate(self, job: int, speed: float) -> int:
        """Return what an hour at a speed is worth: `kernel.value_rate`."""
        jobs = self.market.instance.jobs
        least = float((jobs.value_base[job] + jobs.value_slope[job] * speed).min())
        return int(min(max(0.0, math.floor(least)), float(RATE_MICROS_PER_HOUR_MAX)))

    def _no_pool(self, job: int) -> str:
        types = sorted({kind for kind, _, _ in self.market.requests(job)})
        return (
            f"no pool of {' or '.join(types)} that it may use has enough GPUs this round; wait, or accept other types, "
            "sites or counts"
        )

    def _short_of_budget(self, job: int, name: str, term_s: int, needed_micros: int) -> Unplaced:
        left = int(self.market.instance.jobs.hold_left[job])
        sentence = (
            f"its budget is the limit: {format_credits(left)} credits are left, and {term_s} s of {name} need "
            f"{format_credits(needed_micros)}; raise the budget"
        )
        return self._row(job, "budget_short", sentence)

    def _remedy(self, bid: int) -> str:
        return f"at these prices a bid of {format_credits(bid)} credits per million samples would reach it"

    def _row(self, job: int, code: UnplacedCode, sentence: str, bid: int | None = None) -> Unplaced:
        return Unplaced(
            job_id=self.market.names.jobs[job],
            code=code,
            sentence=sentence,
            bid_needed_micros_per_million_samples=bid,
        )


def _told(bid: int) -> int:
    """Return the bid to name: a thousandth above the least, which a search within 1e-4 of the best may pass over."""
    return bid + divide_up(bid, 1000)
