"""What a group of sites could do by itself: the markets behind every claim that sharing pays.

A coalition is some of the sites with the jobs whose data is at home there. Standing alone it has
its own pools, the links among its members, and those jobs; nobody is in the middle of anything.
Its value is the optimum of its LP, so that comparing it with what the federation's prices give the
same sites and jobs is a comparison of like with like (Owen 1975: at optimal duals no coalition
gets less than its value).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, takewhile
from typing import Final

import numpy as np
from numpy.typing import NDArray

from broker.allocation.clearing import Clearing
from broker.allocation.instance import NONE, Flag, Instance, Int
from broker.allocation.relaxation import relax
from broker.allocation.rents import rents
from broker.allocation.solver import best_columns
from broker.allocation.won import Market
from pricing.fairness import shapley_values

# Up to this many sites every coalition is tried, beyond it the ones named in `coalitions_of`.
SITES_EXACT_MAX: Final = 12
# A fixed stride of a full-period generator stands in for chance: the same coalitions every time.
_STRIDE: Final = 2_654_435_761


@dataclass(frozen=True, slots=True)
class CoalitionGain:
    """What a coalition gets in the federation, and what it could get alone, per hour."""

    sites: tuple[int, ...]
    federated_micros_per_hour: int
    alone_micros_per_hour: int

    @property
    def slack_micros_per_hour(self) -> int:
        """How much better off the coalition is in the federation."""
        return self.federated_micros_per_hour - self.alone_micros_per_hour


def gains(
    instance: Instance,
    site_rents: Int,
    job_surplus: Int,
    value_alone: Callable[[Instance], int],
    coalitions: Iterable[Sequence[int]],
) -> list[CoalitionGain]:
    """Return what each coalition gains by being in the federation.

    `site_rents` [sites] and `job_surplus` [jobs] are what the federation's prices give, both in
    micro-credits per hour; `value_alone` returns the optimum of a market's LP.
    """
    found = []
    for coalition in coalitions:
        members = np.zeros(len(instance.sites.region), dtype=np.bool_)
        members[list(coalition)] = True
        jobs = at_home(instance, members)
        federated = int(site_rents[members].sum()) + int(job_surplus[jobs].sum())
        alone = value_alone(standing_alone(instance, members, jobs))
        found.append(CoalitionGain(tuple(sorted(coalition)), federated, alone))
    return found


def coalitions_of(sites: int, sampled: int) -> list[tuple[int, ...]]:
    """Return every coalition but the empty and the grand one up to SITES_EXACT_MAX sites, else a sample.

    A sample holds every site alone, every all-but-one, and `sampled` others of every size.
    """
    if sites <= SITES_EXACT_MAX:
        return [tuple(members) for size in range(1, sites) for members in combinations(range(sites), size)]
    found: list[tuple[int, ...]] = [(site,) for site in range(sites)]
    found += [tuple(other for other in range(sites) if other != site) for site in range(sites)]
    for number in range(sampled):
        size = 2 + number * (sites - 3) // max(1, sampled)
        order = sorted(range(sites), key=lambda site: ((site + 1) * _STRIDE * (number + 1)) % (2**32))
        found.append(tuple(sorted(order[:size])))
    return found


def at_home(instance: Instance, members: Flag) -> Flag:
    """Return which jobs are at home at one of the sites `members` [sites]."""
    home = instance.jobs.home
    return (home >= 0) & members[np.maximum(home, 0)]


def standing_alone(instance: Instance, members: Flag, kept_jobs: Flag) -> Instance:
    """Return the market of some sites and some jobs: nothing else has capacity, nothing runs yet."""
    rows = instance.rows
    pool_in = members[instance.pools.site]
    row_in = np.ones(instance.row_count, dtype=np.bool_)
    pools = instance.pool_count
    for slot in range(instance.slots):
        row_in[slot * pools : (slot + 1) * pools] = pool_in
    first, count = instance.links.first_row, len(instance.links.from_site)
    row_in[first : first + count] = members[instance.links.from_site] & members[instance.links.to_site]
    owner = np.repeat(np.arange(instance.row_count), np.diff(rows.step_start))
    units = np.where(row_in[owner], rows.step_units, 0)
    job_max = np.where(pool_in, instance.pools.job_max, 0)
    goods = instance.goods
    limit = np.where(pool_in[goods.offer_pool], goods.offer_limit, 0)
    return _jobs_only(
        instance._replace(
            rows=rows._replace(step_units=units),
            pools=instance.pools._replace(job_max=job_max),
            goods=goods._replace(offer_limit=limit),
        ),
        kept_jobs,
    )


def _jobs_only(instance: Instance, kept: Flag) -> Instance:
    """Return the market with some of the jobs, as if none of them ran yet."""
    jobs, singles, spans, bundles = instance.jobs, instance.singles, instance.spans, instance.bundles
    chosen = np.flatnonzero(kept)
    single_start, single_items = _rows_of(singles.start, chosen)
    span_start, span_items = _rows_of(spans.start, chosen)
    none = np.zeros(0, dtype=np.int64)
    by_job = {
        name: value[chosen]
        for name, value in jobs._asdict().items()
        if name not in {"barred", "barred_start", "must", "own", "locked", "restart"}
    }
    count = len(chosen)
    return instance._replace(
        jobs=jobs._replace(
            **by_job,
            must=np.zeros(count, dtype=np.bool_),
            own=np.full(count, NONE, dtype=np.int32),
            locked=np.zeros(count, dtype=np.int64),
            restart=np.zeros(count, dtype=np.int64),
            # The numbers of singles and spans change, and so would the keys.
            barred_start=np.zeros(count + 1, dtype=np.int64),
            barred=none,
        ),
        singles=singles._replace(
            start=single_start,
            **{name: getattr(singles, name)[single_items] for name in singles._fields if name != "start"},
        ),
        spans=spans._replace(
            start=span_start, **{name: getattr(spans, name)[span_items] for name in spans._fields if name != "start"}
        ),
        bundles=bundles._replace(
            start=np.zeros(count + 1, dtype=np.int64),
            value=none,
            charge_max=none,
            entry_start=np.zeros(1, dtype=np.int64),
            entry_row=np.zeros(0, dtype=np.int32),
            entry_use=none,
        ),
    )


def _rows_of(start: Int, chosen: NDArray[np.int64]) -> tuple[Int, Int]:
    """Return the starts and the items of some rows of a ragged table, in their order."""
    lengths = start[chosen + 1] - start[chosen]
    starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    items = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths) + np.repeat(start[chosen], lengths)
    return starts, items.astype(np.int64)


@dataclass(frozen=True, slots=True)
class Standing:
    """Whether sharing pays at a round's prices: each site against alone, and the worst coalition.

    `shapley` [sites] is another way to divide the same whole, where every coalition was tried: a
    site's average contribution, whoever came before it.

    `complete` says that every coalition was tried. Payoffs are those of the LP (rent of capacity, and
    the best surplus of the jobs at home there), so the core's slack is at least minus the proved gap.
    """

    gains: tuple[CoalitionGain, ...]
    complete: bool
    shapley: tuple[int, ...] | None

    @property
    def alone(self) -> tuple[CoalitionGain, ...]:
        """Every site by itself, in order."""
        return tuple(sorted((gain for gain in self.gains if len(gain.sites) == 1), key=lambda gain: gain.sites))

    @property
    def core_slack_micros_per_hour(self) -> int:
        """The least that any coalition gains by staying."""
        return min((gain.slack_micros_per_hour for gain in self.gains), default=0)


def standing(
    market: Market, clearing: Clearing, *, sampled: int = 64, stop: Callable[[], bool] = lambda: False
) -> Standing:
    """Return how every site and coalition stands at the prices of a clearing of this market.

    `stop` is asked before each coalition: once it says so, the rest is left out, and the answer is not complete.
    Sites by themselves come first.
    """
    instance = market.instance
    prices = published(market, clearing)
    earned = rents(instance, prices)
    sites = len(instance.sites.region)
    by_site = np.zeros(sites, np.int64)
    pools, links = instance.pool_count, len(instance.links.from_site)
    for slot in range(instance.slots):
        np.add.at(by_site, instance.pools.site, earned[slot * pools : (slot + 1) * pools])
    first = instance.links.first_row
    np.add.at(by_site, instance.links.from_site, earned[first : first + links])
    surplus = np.asarray(best_columns(instance, prices).surplus, dtype=np.int64)
    wanted = coalitions_of(sites, sampled)
    found = gains(instance, by_site, surplus, _optimum, takewhile(lambda _coalition: not stop(), wanted))
    complete = sites <= SITES_EXACT_MAX and len(found) == len(wanted)
    everyone = gains(instance, by_site, surplus, _optimum, [range(sites)])[0].alone_micros_per_hour if complete else 0
    return Standing(tuple(found), complete, _shapley(found, everyone, sites) if complete else None)


def marginal_values(
    market: Market, jobs: Sequence[int], *, stop: Callable[[], bool] = lambda: False
) -> dict[int, int] | None:
    """Return what the optimum of the LP would lose without each of some jobs; None where `stop` cut it short.

    Both optima are those of a market in which nothing runs yet, so that they differ by the job alone.
    """
    instance = market.instance
    everyone = np.ones(instance.job_count, dtype=np.bool_)
    whole, lost = _optimum(_jobs_only(instance, everyone)), {}
    for job in jobs:
        if stop():
            return None
        others = everyone.copy()
        others[job] = False
        lost[job] = max(0, whole - _optimum(_jobs_only(instance, others)))
    return lost


def _shapley(found: Sequence[CoalitionGain], everyone: int, sites: int) -> tuple[int, ...]:
    """Return the Shapley value of each site, rounded down."""
    values = [0.0] * (1 << sites)
    for gain in found:
        values[sum(1 << site for site in gain.sites)] = float(gain.alone_micros_per_hour)
    values[-1] = float(everyone)
    return tuple(int(value) for value in shapley_values(values))


def published(market: Market, clearing: Clearing) -> Int:
    """Return a clearing's prices as a vector of rows."""
    named: dict[tuple[str, ...], int] = {}
    for slot, by_pool in enumerate((clearing.prices, *clearing.later_prices)):
        named.update({("pool", pool_id, str(slot)): price for pool_id, price in by_pool.items()})
    named.update(
        {("link", row.from_site, row.to_site): row.price_micros_per_share_hour for row in clearing.link_prices}
    )
    for row in clearing.tenant_prices:
        named["budget", row.tenant_id] = row.budget_price_micros_per_share_hour
        named["floor", row.tenant_id] = row.floor_price_micros_per_gpu_hour
    return np.array([named.get(name, 0) for name in market.row_names()], dtype=np.int64)


def _optimum(instance: Instance) -> int:
    """Return the optimum of a market's LP, rounded down."""
    if instance.job_count == 0 or instance.row_count == 0:
        return 0
    return int(relax(instance).lp_objective)
