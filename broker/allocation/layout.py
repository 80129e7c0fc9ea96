"""What the oracle reads of a market before it looks at a job: who offers what where, and spans' patterns in groups.

`prepare` knows no prices: scopes (a site, a region, a continent, the world) with their offers, and groups of
patterns that are alike. `order` ranks both at given prices. A group says the best that any of its patterns can
do in price, in sync and in how much of a job is near its data, so that a search can leave out a whole group.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from broker.allocation.compiled import compiled, compiled_loop, inlined
from broker.allocation.instance import SHARES, SPAN_SITES_MAX, Index, Instance, Int, Real
from training import throughput

# float64 or int64, per row.
Prices = NDArray[Any]

# Patterns of a family in one group of like ones; more groups prune better and cost a comparison each.
_GROUP_PATTERNS: Final = 96
_ROUND_TRIPS: Final = throughput.ROUND_TRIPS_PER_SYNC
_LINK_EFFICIENCY: Final = throughput.LINK_EFFICIENCY
# The most that parts can have together where another part has something.
_SHARE_MAX: Final = 1 - 1e-9
# Bytes/s at a price per GB, per hour.
HOUR_PER_GB: Final = 3600.0 / 1e9


class Layout(NamedTuple):
    """What the oracle reads of an instance at any prices.

    *Scopes* are sets of sites: every site, then every region, every continent, and the world; the
    first scope of each of the four levels is level_scope[level]. Offers of good g in scope s are
    offer[start[s * goods + g]] up to offer[start[s * goods + g + 1]], in the order of Goods;
    limit_max is the largest of their limits. `sync_s_per_byte` and `delay_s` bound a pattern's sync
    round from below; `link_cost` is what a byte through each of its links costs per hour of bytes/s,
    `gpus_max` what its pools let one job have. Groups of family f are group_start[f] up to
    group_start[f + 1], their patterns pattern[group_end[k]] up to pattern[group_end[k + 1]], all of
    group_parts parts; group_sync and group_delay are the least of theirs.

    Homes are alike, of one *home class*, where their region and continent are; the last class is no home.
    Of a pattern's GPUs the share within_region[h, k] lies in the region of class h at most, and
    within_continent[h, k] in either, for any pattern of group k. `nearest_first[h]` are each family's groups,
    those first that may lie wholly in the region (home_tier[h, k] 1), then in the continent (2), then the others (3).
    `gpus_min` is the smallest span of each family.
    """

    level_scope: Int
    start: Int
    offer: Index
    limit_max: Int
    sync_s_per_byte: Real
    delay_s: Real
    group_start: Int
    group_end: Int
    group_parts: Int
    group_sync: Real
    group_delay: Real
    home_class: Index
    within_region: Real
    within_continent: Real
    home_tier: NDArray[np.int8]
    nearest_first: Index
    link_cost: Real
    gpus_max: Int
    pattern: Index
    pattern_group: Index
    gpus_min: Int


class Order(NamedTuple):
    """Offers of every (scope, good) and patterns of every group by price.

    `price` is what a GPU of offer o costs over the good's slots, `pool_price[s - 1, p]` the same in
    pool p from now for s slots. `terms[s - 1, k]` are of the pattern in place k: a lower bound of that price over
    it, its sync seconds per byte, its delay, and what a byte/s through its links costs in all over s slots;
    `group_toll` is the least of the latter in each group.
    """

    offer: Index
    price: NDArray[Any]
    pool_price: NDArray[Any]
    pattern: Index
    terms: Real
    group_toll: Real


def prepare(instance: Instance) -> Layout:
    """Return what does not depend on prices; worth keeping for several calls on one instance."""
    goods, sites = instance.goods, instance.sites
    site_count, good_count = len(sites.region), len(goods.kind)
    regions = int(sites.region.max(initial=-1)) + 1
    continents = int(sites.continent.max(initial=-1)) + 1
    level_scope = np.array([0, site_count, site_count + regions, site_count + regions + continents], np.int64)
    offer_site = instance.pools.site[goods.offer_pool]
    offer_good = np.repeat(np.arange(good_count), np.diff(goods.offer_start))
    offers = np.arange(len(offer_site))
    scopes = []
    everywhere = np.zeros(len(offer_site), np.int32)
    by_level: list[Index] = [offer_site, sites.region[offer_site], sites.continent[offer_site], everywhere]
    for level, scope in enumerate(by_level):
        inside = scope >= 0
        scopes.append(np.stack([level_scope[level] + scope[inside], offer_good[inside], offers[inside]]))
    scopes_of, good_of, offer = np.concatenate(scopes, axis=1).astype(np.int64)
    cell = scopes_of * good_count + good_of
    order = np.argsort(cell, kind="stable")
    cells = (int(level_scope[3]) + 1) * good_count
    start = np.concatenate([[0], np.cumsum(np.bincount(cell, minlength=cells))]).astype(np.int64)
    limit_max = np.zeros(cells, np.int64)
    np.maximum.at(limit_max, cell, goods.offer_limit[offer])
    sync, delay = _pattern_sync(instance)
    families = len(instance.patterns.family_start) - 1
    gpus_min = np.full(families, 2**31, np.int64)
    np.minimum.at(gpus_min, instance.spans.family, instance.spans.gpus)
    groups = _groups(instance, sync, delay)
    return Layout(
        level_scope=level_scope,
        start=start,
        offer=offer[order].astype(np.int32),
        limit_max=limit_max,
        sync_s_per_byte=sync,
        delay_s=delay,
        gpus_min=gpus_min,
        **groups,
    )


def _groups(instance: Instance, sync: Real, delay: Real) -> dict[str, NDArray[Any]]:
    """Return the part of Layout that groups patterns."""
    patterns, sites, links = instance.patterns, instance.sites, instance.links
    count, families = len(patterns.parts), len(patterns.family_start) - 1
    used = np.arange(SPAN_SITES_MAX) < patterns.parts[:, None]
    pool = np.where(used, patterns.pool, patterns.pool[:, :1])
    site = instance.pools.site[pool]
    region, continent = np.sort(sites.region[site], axis=1), np.sort(sites.continent[site], axis=1)
    level = np.where(region[:, 0] == region[:, -1], 1, np.where(continent[:, 0] == continent[:, -1], 2, 3))
    joined = patterns.up >= 0
    egress = links.egress_micros_per_gb.astype(np.float64) * HOUR_PER_GB
    link_cost = np.zeros(count)
    if len(egress):
        others = (patterns.parts - 1)[:, None]
        both = egress[np.maximum(patterns.up, 0)] + others * egress[np.maximum(patterns.down, 0)]
        link_cost = np.where(joined, both, 0.0).sum(axis=1)
    family = np.repeat(np.arange(families), np.diff(patterns.family_start))
    dearness = np.floor(np.log2(1e-3 + link_cost))
    ranked = np.lexsort((sync, dearness, *region.T[::-1], *continent.T[::-1], level, patterns.parts, family))
    alike = np.stack([part[ranked] for part in (family, patterns.parts, level)])
    heads = np.flatnonzero(np.concatenate([[True] * bool(count), (np.diff(alike, axis=1) != 0).any(axis=0)]))
    ends = np.append(heads[1:], count)
    edges = [
        edge
        for first, end in zip(heads.tolist(), ends.tolist(), strict=bool(count))
        for edge in range(first, end, -(-(end - first) // -(-(end - first) // _GROUP_PATTERNS)))
    ]
    first = np.array(edges, np.int64)
    lead = ranked[first]
    pattern_group = np.empty(count, np.int32)
    pattern_group[ranked] = np.repeat(np.arange(len(first)), np.diff(np.append(first, count)))
    least = [np.minimum.reduceat(part[ranked], first) if count else part for part in (sync, delay)]
    group_start = np.searchsorted(family[lead], np.arange(families + 1)).astype(np.int64)
    return {
        "group_start": group_start,
        "group_end": np.append(first, count).astype(np.int64),
        "group_parts": patterns.parts[lead].astype(np.int64),
        "group_sync": least[0],
        "group_delay": least[1],
        **_homes(instance, np.where(used, patterns.weight, 0), site, ranked, first, family[lead]),
        "link_cost": link_cost,
        "gpus_max": np.where(used, instance.pools.job_max[pool], 0).sum(axis=1).astype(np.int64),
        "pattern": ranked.astype(np.int32),
        "pattern_group": pattern_group,
    }


def _homes(
    instance: Instance, weight: Int, site: Index, ranked: Int, first: Int, family: Int
) -> dict[str, NDArray[Any]]:
    """Return the part of Layout that says how near groups are to every class of homes."""
    sites = instance.sites
    places, home_class = np.unique(np.stack([sites.region, sites.continent]), axis=1, return_inverse=True)
    share = weight / np.maximum(1, weight.sum(axis=1, keepdims=True))
    within = np.zeros((2, places.shape[1] + 1, len(first)))
    within[:, -1] = 1.0
    ends = np.append(first[1:], len(ranked))
    _share_within(sites.region, sites.continent, site, share, ranked, ends, places.astype(np.int64), within)
    tier = np.where(within[0] == 1.0, 1, np.where(within[1] == 1.0, 2, 3)).astype(np.int8)
    return {
        "home_class": home_class.reshape(-1).astype(np.int32),
        "within_region": within[0],
        "within_continent": within[1],
        "home_tier": tier,
        "nearest_first": np.stack([np.lexsort((row, family)) for row in tier]).astype(np.int32),
    }


@compiled_loop
def _share_within(
    region: np.ndarray,
    continent: np.ndarray,
    site: np.ndarray,
    share: np.ndarray,
    ranked: np.ndarray,
    ends: np.ndarray,
    places: np.ndarray,
    within: np.ndarray,
) -> None:
    """Fill within[reach, class, group]: the largest share of a pattern in a class's region, and in either."""
    at = 0
    for group in range(len(ends)):
        while at < ends[group]:
            pattern = ranked[at]
            at += 1
            for alike in range(places.shape[1]):
                near, around, all_near, all_around = 0.0, 0.0, True, True
                for part in range(share.shape[1]):
                    if share[pattern, part] <= 0:
                        continue
                    place = site[pattern, part]
                    if region[place] >= 0 and region[place] == places[0, alike]:
                        near += share[pattern, part]
                        around += share[pattern, part]
                        continue
                    all_near = False
                    if continent[place] >= 0 and continent[place] == places[1, alike]:
                        around += share[pattern, part]
                    else:
                        all_around = False
                # Exactly 1 where all parts are inside, and only there: sums of floats may miss it.
                near = 1.0 if all_near else min(near, _SHARE_MAX)
                around = 1.0 if all_around else min(around, _SHARE_MAX)
                within[0, alike, group] = max(within[0, alike, group], near)
                within[1, alike, group] = max(within[1, alike, group], around)


def inside_one(region: Index, continent: Index) -> NDArray[np.bool_]:
    """Return for every region whether its sites lie in one continent; at the end False, for index -1."""
    most = np.full(int(region.max(initial=-1)) + 2, -1, np.int64)
    least = np.full(len(most), 2**31, np.int64)
    np.maximum.at(most, region, continent)
    np.minimum.at(least, region, continent)
    inside: NDArray[np.bool_] = (most == least) & (least >= 0)
    inside[-1] = False
    return inside


def order(instance: Instance, layout: Layout, y: Prices) -> Order:
    """Return offers and patterns by price at `y` [rows]."""
    pool_count, slots = instance.pool_count, instance.slots
    goods, patterns = instance.goods, instance.patterns
    by_slot = y[: pool_count * slots].reshape(slots, pool_count)
    pool_price = np.cumsum(by_slot, axis=0, dtype=y.dtype)
    good = np.repeat(np.arange(len(goods.kind)), np.diff(goods.offer_start))
    price = np.zeros(len(goods.offer_pool), y.dtype)
    for slot in range(slots):
        inside = (goods.first[good] <= slot) & (slot < goods.end[good])
        price[inside] += by_slot[slot, goods.offer_pool[inside]]
    ranked = _rank_offers(np.lexsort((goods.offer_pool, price)), layout, np.zeros(len(price), np.int64))
    families = len(patterns.family_start) - 1
    family = np.repeat(np.arange(families), np.diff(patterns.family_start))
    used = int(instance.spans.slots.max(initial=0))
    rent = _link_rent(instance, y)
    bound = np.zeros(len(family), np.float64)
    sorted_patterns = np.zeros((used, len(family)), np.int32)
    terms, group_toll = np.zeros((used, len(family), 4)), np.zeros((used, len(layout.group_sync)))
    for index in range(used):
        _bound_patterns(instance, pool_price[index], layout.gpus_min, family, bound)
        by_price = np.lexsort((bound, layout.pattern_group))
        sorted_patterns[index] = by_price
        toll = layout.link_cost * (index + 1) + rent
        for place, term in enumerate((bound, layout.sync_s_per_byte, layout.delay_s, toll)):
            terms[index, :, place] = term[by_price]
        if len(family):
            group_toll[index] = np.minimum.reduceat(toll[layout.pattern], layout.group_end[:-1])
    return Order(ranked, price, pool_price, sorted_patterns, terms, group_toll)


def _link_rent(instance: Instance, y: Prices) -> Real:
    """Return per pattern what a byte/s through each of its links pays for their shares."""
    patterns, links = instance.patterns, instance.links
    if not len(links.bits_per_s):
        return np.zeros(len(patterns.parts))
    rate = 8.0 * SHARES / links.bits_per_s * y[links.first_row : links.first_row + len(links.bits_per_s)]
    others = (patterns.parts - 1)[:, None]
    both = rate[np.maximum(patterns.up, 0)] + others * rate[np.maximum(patterns.down, 0)]
    return np.where(patterns.up >= 0, both, 0.0).sum(axis=1)


def _pattern_sync(instance: Instance) -> tuple[Real, Real]:
    """Return per pattern the seconds per byte and the delay of the hub's slowest partner by bandwidth."""
    patterns, links = instance.patterns, instance.links
    others = np.maximum(patterns.parts - 1, 1)[:, None]
    joined = patterns.up >= 0
    if not joined.any():
        return np.zeros(len(patterns.parts)), np.zeros(len(patterns.parts))
    rate = links.bits_per_s * _LINK_EFFICIENCY * (1 - links.loss) / 8
    up, down = np.maximum(patterns.up, 0), np.maximum(patterns.down, 0)
    seconds = np.where(joined, 1 / rate[up] + others / rate[down], -1.0)
    delay = _ROUND_TRIPS * (links.delay_s[up] + links.delay_s[down])
    slowest = seconds.argmax(axis=1)[:, None]
    return (
        np.maximum(0.0, np.take_along_axis(seconds, slowest, axis=1)[:, 0]),
        np.take_along_axis(delay, slowest, axis=1)[:, 0],
    )


@compiled
def _rank_offers(by_price: np.ndarray, layout: Layout, rank: np.ndarray) -> np.ndarray:
    """Return the offers of every cell by price: each offer, cheapest first, to the end of its cells."""
    # Sorting ranks inside a cell is cheaper than sorting prices: most cells hold a handful.
    for place in range(len(by_price)):
        rank[by_price[place]] = place
    ranked = layout.offer.copy()
    for cell in range(len(layout.start) - 1):
        first, end = layout.start[cell], layout.start[cell + 1]
        if end - first > 1:
            inside = rank[layout.offer[first:end]]
            inside.sort()
            for place in range(end - first):
                ranked[first + place] = by_price[inside[place]]
    return ranked


@compiled
def _bound_patterns(
    instance: Instance, pool_price: np.ndarray, gpus_min: np.ndarray, family: np.ndarray, bound: np.ndarray
) -> None:
    """Fill a lower bound of the price per GPU of every pattern, for spans of at least gpus_min."""
    patterns = instance.patterns
    for pattern in range(len(family)):
        weights, total, least, most = 0.0, 0.0, np.inf, 0.0
        parts = patterns.parts[pattern]
        for part in range(parts):
            price = float(pool_price[patterns.pool[pattern, part]])
            weights += patterns.weight[pattern, part]
            total += price * patterns.weight[pattern, part]
            least, most = min(least, price), max(most, price)
        bound[pattern] = max(least, total / weights - (parts // 2) * (most - least) / gpus_min[family[pattern]])


@inlined
def scope_of(instance: Instance, layout: Layout, home: int, tier: int) -> int:
    """Return the scope that holds every site of a tier around a home (and nearer ones); -1 if none."""
    if home < 0:
        return layout.level_scope[3] if tier == 0 else -1
    if tier == 0:
        return home
    if tier == 1:
        region = instance.sites.region[home]
        return layout.level_scope[1] + region if region >= 0 else -1
    if tier == 2:
        continent = instance.sites.continent[home]
        return layout.level_scope[2] + continent if continent >= 0 else -1
    return layout.level_scope[3]
