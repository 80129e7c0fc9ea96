"""The best column of every job at given prices, exact over all columns, and the dual function.

Nothing is enumerated. A job's candidate on one site looks for the cheapest pool tier by tier, since
inside one tier its data egress is the same everywhere: the first pool of the tier's price order that
is large enough and allowed is the best one. Spans walk their family's patterns by price, grouped by
number of parts, by the region or continent that holds them and by the quality of the links, and stop
where even the best of the group could not beat what is found.

What bounds a span at a pattern from above:

    speed   batch x gpus / (slowest + sync / H); slowest is at least the compute time of the slowest
            kind and the fastest kind's step at ceil(gpus / parts) GPUs, since some part has as many;
            sync is at least size x a + b of the hub's slowest partner (a: seconds per byte up and
            down, b: two round trips) with the most compressed codec that the job may use
    value   the bid at that speed, and what the hold affords over the shortest term; the longest term
            gives the least restart rate
    toll    what grows with speed (data egress, link egress, link shares at their price) makes every piece
            of the bid less steep; a piece that would then fall counts as flat
    price   a part's GPUs differ from its exact share by less than one, and at most half of the parts
            are above theirs, so a pattern's GPUs cost at least gpus x average - parts // 2 x (dearest
            - cheapest), and never less than gpus x cheapest

All loops work on float64 prices and, in whole numbers without any rounding, on int64 ones. Ties are
broken by `kernel.column_key`, the least first; staying out wins a tie at 0.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from broker.allocation.compiled import compiled, compiled_loop, inlined
from broker.allocation.instance import (
    NONE,
    RATE_MICROS_PER_HOUR_MAX,
    SHARES,
    SPAN_SITES_MAX,
    Index,
    Instance,
    Int,
    Real,
)
from broker.allocation.kernel import (
    CHARGE_MAX,
    CODECS,
    EGRESS,
    PART_FIELDS,
    PARTS,
    SPAN_OUT,
    VALUE,
    affordable_rate,
    budget_shares,
    column_key,
    kind_step_s,
    restart_rate,
    single_column,
    site_allowed,
    span_column,
    split,
    term_seconds,
    tier_of,
)
from training import throughput

# float64 or int64, per row.
Prices = NDArray[Any]

# A fourth form, of the LP only: a single at any pool of a tier. `place` is the tier.
SCOPE: Final = 3
# Pools of one tier at which a job with a site list of its own gets a column in one search.
PLACES_MAX: Final = 6

# Patterns of a family in one group of like links; more groups prune better and cost a comparison each.
_GROUP_PATTERNS: Final = 96
_GROUPS_MAX: Final = 24
_RATIOS: Final = np.array([throughput.CODEC_RATIOS[codec] for codec in CODECS])
_MOST_COMPRESSED: Final = float(max(throughput.CODEC_RATIOS[codec] for codec in throughput.AUTO_CODECS))
_BYTES_PER_PARAMETER: Final = throughput.BYTES_PER_PARAMETER
_ROUND_TRIPS: Final = throughput.ROUND_TRIPS_PER_SYNC
# Bytes/s at a price per GB, per hour.
_HOUR_PER_GB: Final = 3600.0 / 1e9
_LINK_EFFICIENCY: Final = throughput.LINK_EFFICIENCY
# Bounds are computed in floats: this much is added so that rounding never cuts off the best column.
_MARGIN: Final = 1e-9
# A quarter of what floats count exactly.
_WHOLE_MAX: Final = 2.0**51


class Layout(NamedTuple):
    """What the oracle reads of an instance at any prices.

    *Scopes* are sets of sites: every site, then every region, every continent, and the world; the
    first scope of each of the four levels is level_scope[level]. Offers of good g in scope s are
    offer[start[s * goods + g]] up to offer[start[s * goods + g + 1]], in the order of Goods;
    limit_max is the largest of their limits. `sync_s_per_byte` and `delay_s` bound a pattern's sync
    round from below; `link_cost` is what a byte through each of its links costs per hour of bytes/s,
    `gpus_max` what its pools let one job have. Groups of family f are group_start[f] up to
    group_start[f + 1], their patterns pattern[group_end[k]] up to pattern[group_end[k + 1]], all of
    group_parts parts; group_sync, group_delay and group_cost are the least of theirs. A group's patterns
    lie in one region (group_level 1, of which `group_site` is a site), in one continent but no region (2),
    in no continent (3), or where levels say nothing (4). `gpus_min` is the smallest span of each family.
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
    group_level: Int
    group_site: Int
    group_sync: Real
    group_delay: Real
    group_cost: Real
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


class Best(NamedTuple):
    """The best column of each job; form -1 and surplus 0 where staying out is best."""

    form: NDArray[np.int8]
    item: Index
    place: Index
    surplus: NDArray[Any]


class Near(NamedTuple):
    """Columns close to their job's best: `room` and `room_spans` [jobs] are how close; the rest is filled, row by row."""

    room: NDArray[Any]
    room_spans: NDArray[Any]
    job: Index
    form: NDArray[np.int8]
    item: Index
    place: Index
    surplus: NDArray[Any]


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
    region, continent = sites.region[site], sites.continent[site]
    one_region = (region == region[:, :1]).all(axis=1) & (region[:, 0] >= 0)
    one_continent = (continent == continent[:, :1]).all(axis=1) & (continent[:, 0] >= 0)
    straddling = ((region >= 0) & ~inside_one(sites.region, sites.continent)[region]).any(axis=1)
    level = np.where(straddling, 4, np.where(one_region, 1, np.where(one_continent, 2, 3)))
    scope = np.where(level == 1, region[:, 0], np.where(level == 2, continent[:, 0], 0))
    joined = patterns.up >= 0
    egress = links.egress_micros_per_gb.astype(np.float64) * _HOUR_PER_GB
    link_cost = np.zeros(count)
    if len(egress):
        others = (patterns.parts - 1)[:, None]
        both = egress[np.maximum(patterns.up, 0)] + others * egress[np.maximum(patterns.down, 0)]
        link_cost = np.where(joined, both, 0.0).sum(axis=1)
    family = np.repeat(np.arange(families), np.diff(patterns.family_start))
    dearness = np.floor(np.log2(1e-3 + link_cost))
    ranked = np.lexsort((sync, dearness, scope, level, patterns.parts, family))
    alike = np.stack([part[ranked] for part in (family, patterns.parts, level, scope)])
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
    least = [np.minimum.reduceat(part[ranked], first) if count else part for part in (sync, delay, link_cost)]
    return {
        "group_start": np.searchsorted(family[lead], np.arange(families + 1)).astype(np.int64),
        "group_end": np.append(first, count).astype(np.int64),
        "group_parts": patterns.parts[lead].astype(np.int64),
        "group_level": level[lead].astype(np.int64),
        "group_site": site[lead, 0].astype(np.int64),
        "group_sync": least[0],
        "group_delay": least[1],
        "group_cost": least[2],
        "link_cost": link_cost,
        "gpus_max": np.where(used, instance.pools.job_max[pool], 0).sum(axis=1).astype(np.int64),
        "pattern": ranked.astype(np.int32),
        "pattern_group": pattern_group,
    }


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


def best(instance: Instance, y: Prices, *, layout: Layout | None = None, hint: Best | None = None) -> Best:
    """Return each job's best column at `y` [rows], int64 or float64.

    `hint` are columns of this instance that were good at other prices: they make the search shorter, and change
    nothing. Integer prices give exact integer surpluses.
    """
    layout = prepare(instance) if layout is None else layout
    count = instance.job_count
    found = Best(
        np.full(count, NONE, np.int8),
        np.full(count, NONE, np.int32),
        np.full(count, NONE, np.int32),
        np.zeros(count, y.dtype),
    )
    if y.dtype == np.int64 and _whole_in_floats(instance, y):
        # Whole numbers below 2^53 are exact as floats: the loop is compiled once, not twice.
        real = y.astype(np.float64)
        nearly = Best(found.form.copy(), found.item.copy(), found.place.copy(), np.zeros(count))
        search(instance, layout, real, nearly, hint, no_room(instance, real))
        if float(nearly.surplus.min(initial=0.0)) > -_WHOLE_MAX:
            return nearly._replace(surplus=nearly.surplus.astype(np.int64))
    search(instance, layout, y, found, hint, no_room(instance, y))
    return found


def _whole_in_floats(instance: Instance, y: Int) -> bool:
    """Return whether a float search at whole prices is exact for every column that can be a job's best.

    What a column gives, value and floor's credit, stays below _WHOLE_MAX. What it pays only falls from
    there, and a sum that falls so far that it is rounded ends at -2^53 or below, where it is no job's
    best: the caller checks that the best are above -_WHOLE_MAX.
    """
    gpus = int(max(instance.singles.gpus.max(initial=0), instance.spans.gpus.max(initial=0)))
    floors = instance.jobs.floor_row[instance.jobs.floor_row >= 0]
    given = int(max(instance.singles.value.max(initial=0), instance.bundles.value.max(initial=0)))
    given = max(given, RATE_MICROS_PER_HOUR_MAX * int(instance.spans.slots.max(initial=0)))
    uses = instance.bundles.entry_use
    credit = max(gpus, -int(uses.min(initial=0)) * len(floors)) * int(y[floors].max(initial=0))
    return given + credit < _WHOLE_MAX and int(y.max(initial=0)) < _WHOLE_MAX


def search(instance: Instance, layout: Layout, y: Prices, found: Best, hint: Best | None, near: Near) -> int:
    """Fill `found` with each job's best column and `near` with others close to it; return how many those are.

    Of unrestricted jobs' singles, `near` holds one column for all pools of a tier: form SCOPE, place
    the tier. Of other singles it holds the PLACES_MAX best places in each tier. What was kept before
    a job's best was known may be further from it than `room`: the caller sifts.
    """
    ranked = order(instance, layout, y)
    out, counts = np.zeros(SPAN_OUT, np.int64), np.zeros(SPAN_SITES_MAX, np.int64)
    if hint is not None:
        found.form[:], found.item[:], found.place[:] = hint.form, hint.item, hint.place
        _reprice(instance, y, ranked.pool_price, found, out)
    return int(_best_of_all(instance, layout, ranked, y, found, near, out, counts))


def no_room(instance: Instance, y: Prices) -> Near:
    """Return a `Near` that keeps nothing."""
    none = np.zeros(0, np.int32)
    room = np.zeros(instance.job_count, y.dtype)
    return Near(room, room, none, np.zeros(0, np.int8), none, none, np.zeros(0, y.dtype))


def supply_rent(instance: Instance, y: Real) -> float:
    """Return what the rows earn at `y`: base y + sum over steps of max(0, y - cost) units."""
    rows = instance.rows
    step_row = np.repeat(np.arange(len(rows.base)), np.diff(rows.step_start))
    return float(rows.base @ y + rows.step_units @ np.maximum(0.0, y[step_row] - rows.step_cost))


def dual(instance: Instance, y: Real, found: Best) -> float:
    """Return the dual function at float prices: no choice of columns is worth more (up to rounding)."""
    return float(found.surplus.sum()) + supply_rent(instance, y)


def dual_exact(instance: Instance, prices: Int, found: Best | None = None) -> int:
    """Return the dual function at whole prices, in exact micro-credits per hour.

    `found` are the best columns at the same prices, int64.
    """
    found = best(instance, prices) if found is None else found
    assert found.surplus.dtype == np.int64
    rows = instance.rows
    step_row = np.repeat(np.arange(len(rows.base)), np.diff(rows.step_start))
    margins = np.maximum(0, prices[step_row] - rows.step_cost)
    ones = np.ones(instance.job_count, np.int64)
    return exact_dot(found.surplus, ones) + exact_dot(prices, rows.base) + exact_dot(margins, rows.step_units)


def exact_dot(left: Int, right: Int) -> int:
    """Return the sum of products as one Python integer; |left| < 2^62, |right| and the count < 2^31."""
    high, low = left >> 24, left & 0xFFFFFF
    # 24 bits x 31 bits x a share of the count stays below 2^63 in blocks of 128.
    total = 0
    for first in range(0, len(left), 128 * 1024):
        part = slice(first, first + 128 * 1024)
        total += _dot(high[part], right[part]) << 24
        total += _dot(low[part], right[part])
    return total


def _dot(left: Int, right: Int) -> int:
    if float(np.abs(left).max(initial=0)) * float(np.abs(right).max(initial=0)) * max(1, len(left)) < 2.0**62:
        return int(left @ right)
    return sum(a * b for a, b in zip(left.tolist(), right.tolist(), strict=True))


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


@inlined
def single_surplus(instance: Instance, y: np.ndarray, job: int, single: int, price: float, out: Int) -> float:
    """Return a single's surplus from `out` of `single_column` and the price of a GPU over its slots."""
    gpus, good = instance.singles.gpus[single], instance.singles.good[single]
    slots = np.int64(instance.goods.end[good] - instance.goods.first[good])
    worth = out[VALUE] + side_surplus(instance, y, job, gpus, slots, out)
    return worth - gpus * price


@inlined
def side_surplus(instance: Instance, y: np.ndarray, job: int, gpus: int, slots: np.int64, out: Int) -> float:
    """Return the credit of a job's fairness floor less the price of its budget, for singles and spans."""
    jobs = instance.jobs
    extra = y[0] * 0
    if jobs.floor_row[job] >= 0:
        extra += gpus * y[jobs.floor_row[job]]
    if jobs.budget_row[job] >= 0:
        rate = max(np.int64(0), out[CHARGE_MAX] + out[EGRESS] // slots)
        extra -= budget_shares(jobs, job, rate) * y[jobs.budget_row[job]]
    return extra


@inlined
def span_surplus(
    instance: Instance, y: np.ndarray, job: int, span: int, pattern: int, prices: np.ndarray, out: Int
) -> float:
    """Return a span's surplus from `out` of `span_column` and the pools' prices over its slots."""
    patterns = instance.patterns
    first_row = instance.links.first_row
    slots = np.int64(instance.spans.slots[span])
    surplus = out[VALUE] + side_surplus(instance, y, job, instance.spans.gpus[span], slots, out)
    for part in range(patterns.parts[pattern]):
        field = PARTS + part * PART_FIELDS
        surplus -= out[field] * prices[patterns.pool[pattern, part]]
        if patterns.up[pattern, part] >= 0:
            surplus -= out[field + 2] * y[first_row + patterns.up[pattern, part]]
            surplus -= out[field + 4] * y[first_row + patterns.down[pattern, part]]
    return surplus


@inlined
def bundle_surplus(instance: Instance, y: np.ndarray, bundle: int) -> float:
    """Return a bundle's value less the price of what it uses."""
    bundles = instance.bundles
    surplus = bundles.value[bundle] + y[0] * 0
    for entry in range(bundles.entry_start[bundle], bundles.entry_start[bundle + 1]):
        surplus -= bundles.entry_use[entry] * y[bundles.entry_row[entry]]
    return surplus


@inlined
def value_bound(instance: Instance, job: int, slots: np.int64, speed: float, afford: float, toll: float) -> float:
    """Return what no span of a job at most this fast is worth over its slots, paying `toll` per sample/s."""
    jobs = instance.jobs
    least = afford * slots
    for piece in range(jobs.value_slope.shape[1]):
        slope = jobs.value_slope[job, piece] * slots - toll * (1 - _MARGIN)
        least = min(least, jobs.value_base[job, piece] * slots + max(0.0, slope) * speed)
    return least + 1 + abs(least) * _MARGIN


@inlined
def group_tier(instance: Instance, layout: Layout, group: int, home: int) -> int:
    """Return a tier in which every pattern of a group has a part; -1 where that is not known."""
    level = layout.group_level[group]
    if home < 0 or level == 4:
        return -1
    sites, site = instance.sites, layout.group_site[group]
    if level == 1 and sites.region[home] == sites.region[site]:
        return 1
    if level <= 2 and sites.continent[home] == sites.continent[site]:
        return 2
    return 3


@inlined
def least_sync_bytes(instance: Instance, job: int) -> float:
    """Return the bytes of a job's smallest contribution to a sync round."""
    codec = instance.jobs.codec[job]
    ratio = _RATIOS[codec] if codec >= 0 else _MOST_COMPRESSED
    return instance.jobs.parameters[job] * _BYTES_PER_PARAMETER / ratio


@inlined
def least_step_s(instance: Instance, job: int, span: int, pattern: int) -> float:
    """Return a lower bound of a span's inner step over the patterns of its family, sync left out."""
    patterns = instance.patterns
    parts = patterns.parts[pattern]
    largest = -(-instance.spans.gpus[span] // parts)
    slowest, fastest_full = 0.0, np.inf
    for part in range(parts):
        kind = instance.pools.kind[patterns.pool[pattern, part]]
        slowest = max(slowest, kind_step_s(instance, job, kind, 1))
        fastest_full = min(fastest_full, kind_step_s(instance, job, kind, largest))
    return max(slowest, fastest_full)


@compiled_loop
def _reprice(instance: Instance, y: np.ndarray, pool_price: np.ndarray, found: Best, out: np.ndarray) -> None:
    """Fill the surplus of the columns in `found` at y."""
    goods = instance.goods
    for job in range(len(found.form)):
        form, item, place = found.form[job], found.item[job], found.place[job]
        if form == 0:
            price = y[0] * 0
            good = instance.singles.good[item]
            for slot in range(goods.first[good], goods.end[good]):
                price += y[slot * len(instance.pools.site) + place]
            single_column(instance, job, item, place, out)
            found.surplus[job] = single_surplus(instance, y, job, item, price, out)
        elif form == 1:
            span_column(instance, job, item, place, out)
            prices = pool_price[instance.spans.slots[item] - 1]
            found.surplus[job] = span_surplus(instance, y, job, item, place, prices, out)
        elif form == 2:
            found.surplus[job] = bundle_surplus(instance, y, item)


@compiled_loop
def _best_of_all(
    instance: Instance,
    layout: Layout,
    ranked: Order,
    y: np.ndarray,
    found: Best,
    near: Near,
    out: np.ndarray,
    counts: np.ndarray,
) -> int:
    """Improve `found`, which holds hints with their surplus at y, to the best column of each job.

    Fill `near` with columns met on the way that are within `room` of the best so far; return how many.
    """
    kept, kept_max = 0, len(near.job)
    jobs, goods, singles, spans, patterns = (
        instance.jobs,
        instance.goods,
        instance.singles,
        instance.spans,
        instance.patterns,
    )
    zero = y[0] * 0
    for job in range(len(found.form)):
        top, top_key = zero, column_key(0, 0, 0)
        top_form, top_item, top_place = -1, -1, -1
        any_found = not jobs.must[job]
        room = near.room[job]
        together = jobs.site_set[job] < 0 and jobs.barred_start[job] == jobs.barred_start[job + 1]
        # The hint only raises what must be beaten; the search below meets the column again.
        if found.form[job] >= 0 and (found.surplus[job] > zero or not any_found):
            top_form, top_item, top_place = int(found.form[job]), int(found.item[job]), int(found.place[job])
            top, top_key, any_found = found.surplus[job], column_key(top_form, top_item, top_place), True
        for bundle in range(instance.bundles.start[job], instance.bundles.start[job + 1]):
            surplus = bundle_surplus(instance, y, bundle)
            key = column_key(2, bundle, 0)
            if kept < kept_max and (not any_found or surplus >= top - room):
                near.job[kept], near.form[kept], near.item[kept], near.place[kept] = job, 2, bundle, 0
                near.surplus[kept] = surplus
                kept += 1
            if not any_found or surplus > top or (surplus == top and top_form >= 0 and key < top_key):
                top, top_key, any_found = surplus, key, True
                top_form, top_item, top_place = 2, bundle, 0
        credit = zero
        if jobs.floor_row[job] >= 0:
            credit = y[jobs.floor_row[job]]
        home = jobs.home[job]
        for single in range(singles.start[job], singles.start[job + 1]):
            good, gpus = singles.good[single], singles.gpus[single]
            slots = np.int64(goods.end[good] - goods.first[good])
            for tier in range(4):
                if jobs.tier_price[job, tier] < 0:
                    continue
                scope = scope_of(instance, layout, home, tier)
                if scope < 0:
                    continue
                cell = scope * len(goods.kind) + good
                if layout.limit_max[cell] < gpus:
                    continue
                first, end = layout.start[cell], layout.start[cell + 1]
                # No pool of the tier is cheaper than the scope's first: often that says enough.
                worth = singles.value[single] + gpus * credit
                if any_found and worth - gpus * ranked.price[ranked.offer[first]] < top - room:
                    continue
                if singles.data_bytes_per_s[single] > 0 and jobs.tier_price[job, tier] > 0:
                    egress = float(singles.data_bytes_per_s[single]) * 3600.0 * float(jobs.tier_price[job, tier]) / 1e9
                    worth -= np.int64(math.ceil(min(egress, 2.0**45))) * slots
                here, met = zero, 0
                for at in range(first, end):
                    offer = ranked.offer[at]
                    price = ranked.price[offer]
                    if any_found and worth - gpus * price < top - room:
                        break
                    if goods.offer_limit[offer] < gpus:
                        continue
                    pool = goods.offer_pool[offer]
                    if home >= 0 and tier_of(instance, job, instance.pools.site[pool]) != tier:
                        continue
                    if not single_column(instance, job, single, pool, out):
                        continue
                    surplus = single_surplus(instance, y, job, single, price, out)
                    key = column_key(0, single, pool)
                    # Inside a tier prices rise: what follows is at best a tie of the first met.
                    if met == 0:
                        here = surplus
                    elif surplus < here and (together or met >= PLACES_MAX or kept_max == 0):
                        break
                    grouped = together and (tier > 0 or home < 0)
                    if kept < kept_max and (met == 0 or (met < PLACES_MAX and not grouped)):
                        near.job[kept], near.item[kept], near.surplus[kept] = job, single, surplus
                        near.form[kept], near.place[kept] = (SCOPE, tier) if grouped else (0, pool)
                        kept += 1
                    met += 1
                    if not any_found or surplus > top or (surplus == top and top_form >= 0 and key < top_key):
                        top, top_key, any_found = surplus, key, True
                        top_form, top_item, top_place = 0, single, pool
        if spans.start[job] < spans.start[job + 1]:
            size = least_sync_bytes(instance, job)
            steps, batch = jobs.period_steps[job], jobs.batch_per_gpu[job]
            room = near.room_spans[job]
            for span in range(spans.start[job], spans.start[job + 1]):
                family, gpus, slots = spans.family[span], spans.gpus[span], np.int64(spans.slots[span])
                prices = ranked.pool_price[slots - 1]
                destroyed = float(restart_rate(jobs, job, instance.term_s)) * slots if jobs.own[job] >= 0 else 0.0
                fixed = float(gpus * credit) - destroyed
                per_speed = size / (batch * gpus * steps)
                last_parts, least_s, afford = -1, 0.0, 0.0
                for group in range(layout.group_start[family], layout.group_start[family + 1]):
                    parts = layout.group_parts[group]
                    if parts > spans.sites_max[span]:
                        continue
                    tier, reading = group_tier(instance, layout, group, home), 0.0
                    if tier >= 0:
                        price_per_gb = jobs.tier_price[job, tier]
                        if price_per_gb < 0:
                            continue
                        # Further out than the home's own region or continent, all parts are.
                        if layout.group_level[group] < tier:
                            reading = jobs.data_bytes_per_sample[job] * price_per_gb * _HOUR_PER_GB * slots
                    if parts != last_parts:
                        last_parts = parts
                        least_s = least_step_s(instance, job, span, layout.pattern[layout.group_end[group]])
                        fastest = batch * gpus / least_s * (1 + _MARGIN)
                        afford = float(affordable_rate(jobs, job, term_seconds(instance, job, fastest), 1))
                    step_s = least_s + (size * layout.group_sync[group] + layout.group_delay[group]) / steps
                    speed = batch * gpus / step_s
                    if jobs.samples_left[job] / speed > jobs.deadline_s[job] * (1 + _MARGIN):
                        continue
                    toll = reading + per_speed * ranked.group_toll[slots - 1, group]
                    worth = value_bound(instance, job, slots, speed, afford, toll) + fixed
                    for at in range(layout.group_end[group], layout.group_end[group + 1]):
                        dues = gpus * ranked.terms[slots - 1, at, 0] * (1 - _MARGIN)
                        if any_found and worth - dues < top - room:
                            break
                        sync_s = size * ranked.terms[slots - 1, at, 1] + ranked.terms[slots - 1, at, 2]
                        speed = batch * gpus / (least_s + sync_s / steps)
                        toll = reading + per_speed * ranked.terms[slots - 1, at, 3]
                        closer = value_bound(instance, job, slots, speed, afford, toll) + fixed
                        if any_found and closer - dues < top - room:
                            continue
                        pattern = ranked.pattern[slots - 1, at]
                        allowed = gpus <= layout.gpus_max[pattern]
                        for part in range(parts):
                            site = instance.pools.site[patterns.pool[pattern, part]]
                            allowed = allowed and site_allowed(instance, job, site)
                        if not allowed or not split(gpus, patterns.weight[pattern], parts, counts):
                            continue
                        # As before, with the pattern's own shares of GPUs and of data.
                        cost, toll = 0.0, per_speed * ranked.terms[slots - 1, at, 3]
                        for part in range(parts):
                            pool = patterns.pool[pattern, part]
                            cost += counts[part] * prices[pool]
                            allowed = allowed and counts[part] <= instance.pools.job_max[pool]
                            tier = tier_of(instance, job, instance.pools.site[pool])
                            data = jobs.data_bytes_per_sample[job] * counts[part] / gpus
                            toll += data * jobs.tier_price[job, tier] * _HOUR_PER_GB * slots
                        closer = value_bound(instance, job, slots, speed, afford, toll) + fixed
                        if not allowed or (any_found and closer - cost * (1 - _MARGIN) < top - room):
                            continue
                        if span_column(instance, job, span, pattern, out) <= 0:
                            continue
                        surplus = span_surplus(instance, y, job, span, pattern, prices, out)
                        key = column_key(1, span, pattern)
                        if kept < kept_max and (not any_found or surplus >= top - room):
                            near.job[kept], near.form[kept], near.item[kept], near.place[kept] = job, 1, span, pattern
                            near.surplus[kept] = surplus
                            kept += 1
                        if not any_found or surplus > top or (surplus == top and top_form >= 0 and key < top_key):
                            top, top_key, any_found = surplus, key, True
                            top_form, top_item, top_place = 1, span, pattern
        found.form[job], found.item[job], found.place[job], found.surplus[job] = top_form, top_item, top_place, top
    return kept
