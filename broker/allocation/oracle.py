"""The best column of every job at given prices, exact over all columns, and the dual function.

Nothing is enumerated. A job's candidate on one site looks for the cheapest pool tier by tier, since
inside one tier its data egress is the same everywhere: the first pool of the tier's price order that
is large enough and allowed is the best one. Spans walk their family's patterns by price, grouped by
number of parts, by the region or continent that holds them and by the quality of the links, and stop
where even the best of the group could not beat what is found.

All loops work on float64 prices and, in whole numbers without any rounding, on int64 ones. Ties are
broken by `kernel.column_key`, the least first; staying out wins a tie at 0.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from broker.allocation.bounds import (
    MARGIN,
    bundle_surplus,
    data_prices,
    least_step_s,
    least_sync_bytes,
    most_gpus,
    most_period_steps,
    single_surplus,
    span_surplus,
    value_bound,
)
from broker.allocation.compiled import compiled_loop
from broker.allocation.instance import (
    NONE,
    RATE_MICROS_PER_HOUR_MAX,
    SPAN,
    SPAN_SITES_MAX,
    Flag,
    Index,
    Instance,
    Int,
    Real,
)
from broker.allocation.kernel import (
    SPAN_OUT,
    affordable_rate,
    column_key,
    restart_rate,
    single_column,
    site_allowed,
    span_column,
    split,
    term_seconds,
    tier_of,
)
from broker.allocation.layout import HOUR_PER_GB, Order, Prices, order, scope_of

# A search needs what these make: callers have both from here.
from broker.allocation.layout import Layout as Layout  # noqa: PLC0414
from broker.allocation.layout import prepare as prepare  # noqa: PLC0414
from broker.allocation.memory import Memory

# A fourth form, of the LP only: a single at any pool of a tier. `place` is the tier.
SCOPE: Final = 3
# Pools of one tier at which a job with a site list of its own gets a column in one search.
PLACES_MAX: Final = 6

# A quarter of what floats count exactly.
_WHOLE_MAX: Final = 2.0**51


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


def best(
    instance: Instance,
    y: Prices,
    *,
    layout: Layout | None = None,
    hint: Best | None = None,
    memory: Memory | None = None,
) -> Best:
    """Return each job's best column at `y` [rows], int64 or float64.

    `hint` are columns of this instance that were good at other prices, `memory` is of float searches on it: they make
    the search shorter, and change nothing. Integer prices give exact integer surpluses.
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
        search(instance, layout, real, nearly, hint, no_room(instance, real), memory)
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


def search(
    instance: Instance,
    layout: Layout,
    y: Prices,
    found: Best,
    hint: Best | None,
    near: Near,
    memory: Memory | None = None,
) -> int:
    """Fill `found` with each job's best column and `near` with others close to it; return how many those are.

    Of unrestricted jobs' singles, `near` holds one column for all pools of a tier: form SCOPE, place
    the tier. Of other singles it holds the PLACES_MAX best places in each tier. What was kept before
    a job's best was known may be further from it than `room`: the caller sifts. `memory` is of earlier
    searches on this instance and takes this one in: what is found is the same, `near` may have fewer spans.
    """
    ranked = order(instance, layout, y)
    memory = Memory(instance) if memory is None else memory
    out, counts = np.zeros(SPAN_OUT, np.int64), np.zeros(SPAN_SITES_MAX, np.int64)
    everyone = np.arange(instance.job_count)
    if hint is not None:
        found.form[:], found.item[:], found.place[:] = hint.form, hint.item, hint.place
        _reprice(instance, y, ranked.pool_price, everyone, found, out)
    held = Best(np.full(len(memory.job), SPAN, np.int8), memory.item, memory.place, np.zeros(len(memory.job), y.dtype))
    _reprice(instance, y, ranked.pool_price, memory.job, held, out)
    _prefer(instance.jobs.must, found, memory.job, held)
    kept = int(_best_on_one_site(instance, layout, ranked, y, found, near, out))
    lacking = instance.jobs.must & (found.form == NONE)
    doubtful = memory.doubtful(y, np.where(lacking, -np.inf, found.surplus))
    sure = np.flatnonzero(~doubtful[memory.item] & (held.surplus >= (found.surplus - near.room_spans)[memory.job]))
    sure = sure[: len(near.job) - kept]
    now = slice(kept, kept + len(sure))
    near.job[now], near.form[now], near.surplus[now] = memory.job[sure], SPAN, held.surplus[sure]
    near.item[now], near.place[now] = held.item[sure], held.place[sure]
    kept += len(sure)
    rest, steps_s = np.full(len(doubtful), -np.inf), np.zeros((SPAN_SITES_MAX + 1, 2))
    total = int(
        _best_across_sites(instance, layout, ranked, y, doubtful, rest, found, near, kept, out, counts, steps_s)
    )
    if total < len(near.job):
        fresh = slice(kept, total)
        memory.learn(y, doubtful, rest, job=near.job[fresh], item=near.item[fresh], place=near.place[fresh])
    return total


def _prefer(must: Flag, found: Best, job: Index, held: Best) -> None:
    """Put into `found` the best of the `held` spans of each job where it beats what is there."""
    key = (held.item.astype(np.int64) << 30) | held.place
    ranked = np.lexsort((key, -held.surplus, job))
    first = ranked[np.flatnonzero(np.diff(job[ranked], prepend=-1))]
    at = job[first]
    surplus, rival = held.surplus[first], found.surplus[at]
    tie = (found.form[at] == SPAN) & (key[first] < (found.item[at].astype(np.int64) << 30) + found.place[at])
    beats = (surplus > rival) | ((surplus == rival) & tie) | (found.form[at] == NONE)
    better = first[beats & ((surplus > 0) | must[at])]
    at = job[better]
    found.form[at], found.item[at], found.place[at] = SPAN, held.item[better], held.place[better]
    found.surplus[at] = held.surplus[better]


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


@compiled_loop
def _reprice(
    instance: Instance, y: np.ndarray, pool_price: np.ndarray, owner: np.ndarray, found: Best, out: np.ndarray
) -> None:
    """Fill the surplus at y of the columns in `found`, each of the job in `owner`."""
    goods = instance.goods
    for index in range(len(found.form)):
        job = owner[index]
        form, item, place = found.form[index], found.item[index], found.place[index]
        if form == 0:
            price = y[0] * 0
            good = instance.singles.good[item]
            for slot in range(goods.first[good], goods.end[good]):
                price += y[slot * len(instance.pools.site) + place]
            single_column(instance, job, item, place, out)
            found.surplus[index] = single_surplus(instance, y, job, item, price, out)
        elif form == 1:
            span_column(instance, job, item, place, out)
            prices = pool_price[instance.spans.slots[item] - 1]
            found.surplus[index] = span_surplus(instance, y, job, item, place, prices, out)
        elif form == 2:
            found.surplus[index] = bundle_surplus(instance, y, item)


@compiled_loop
def _best_on_one_site(
    instance: Instance,
    layout: Layout,
    ranked: Order,
    y: np.ndarray,
    found: Best,
    near: Near,
    out: np.ndarray,
) -> int:
    """Improve `found`, which holds hints with their surplus at y, to the best bundle or single of each job.

    Fill `near` with columns met on the way that are within `room` of the best so far; return how many.
    """
    kept, kept_max = 0, len(near.job)
    jobs, goods, singles = instance.jobs, instance.goods, instance.singles
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
        found.form[job], found.item[job], found.place[job], found.surplus[job] = top_form, top_item, top_place, top
    return kept


@compiled_loop
def _best_across_sites(
    instance: Instance,
    layout: Layout,
    ranked: Order,
    y: np.ndarray,
    doubtful: np.ndarray,
    rest: np.ndarray,
    found: Best,
    near: Near,
    kept: int,
    out: np.ndarray,
    counts: np.ndarray,
    steps_s: np.ndarray,
) -> int:
    """Improve `found`, the best hint, bundle or single of each job, to its best column, spans but for the `doubtful` ones left out.

    Fill `near` on from `kept` with spans met on the way that are within `room_spans`; return how many are kept then.
    Fill rest[span] with what no column of it that is not kept is worth more than.
    """
    kept_max = len(near.job)
    jobs, spans, patterns = instance.jobs, instance.spans, instance.patterns
    zero = y[0] * 0
    for job in range(len(found.form)):
        if spans.start[job] == spans.start[job + 1]:
            continue
        top_form, top_item, top_place = int(found.form[job]), int(found.item[job]), int(found.place[job])
        top, top_key = found.surplus[job], column_key(max(0, top_form), max(0, top_item), max(0, top_place))
        any_found = top_form >= 0 or not jobs.must[job]
        room = near.room_spans[job]
        credit = zero
        if jobs.floor_row[job] >= 0:
            credit = y[jobs.floor_row[job]]
        home = jobs.home[job]
        alike = layout.home_class[home] if home >= 0 else len(layout.within_region) - 1
        near_price, far_price, farther_price, reach = data_prices(jobs, job, home)
        size = least_sync_bytes(instance, job)
        steps, batch = most_period_steps(instance, job), jobs.batch_per_gpu[job]
        waits = 0.0 if jobs.sync_open[job] else 1.0
        for span in range(spans.start[job], spans.start[job + 1]):
            if not doubtful[span]:
                continue
            family, gpus, slots = spans.family[span], spans.gpus[span], np.int64(spans.slots[span])
            prices = ranked.pool_price[slots - 1]
            destroyed = float(restart_rate(jobs, job, instance.term_s)) * slots if jobs.own[job] >= 0 else 0.0
            fixed = float(gpus * credit) - destroyed
            per_speed = size / (batch * gpus * steps)
            data = jobs.data_bytes_per_sample[job] * HOUR_PER_GB * slots
            steps_s[:] = -1.0
            for place in range(layout.group_start[family], layout.group_start[family + 1]):
                group = layout.nearest_first[alike, place]
                if layout.home_tier[alike, group] > reach:
                    break
                parts = layout.group_parts[group]
                if parts > spans.sites_max[span]:
                    continue
                if steps_s[parts, 0] < 0:
                    least_s = least_step_s(instance, job, span, layout.pattern[layout.group_end[group]])
                    fastest = batch * gpus / least_s * (1 + MARGIN)
                    steps_s[parts, 0] = least_s
                    steps_s[parts, 1] = float(affordable_rate(jobs, job, term_seconds(instance, job, fastest), 1))
                least_s, afford = steps_s[parts, 0], steps_s[parts, 1]
                step_s = least_s + waits * (size * layout.group_sync[group] + layout.group_delay[group]) / steps
                speed = batch * gpus / step_s
                if jobs.samples_left[job] / speed > jobs.deadline_s[job] * (1 + MARGIN):
                    continue
                inside = most_gpus(layout.within_region[alike, group], gpus, parts)
                around = most_gpus(layout.within_continent[alike, group], gpus, parts)
                reading = near_price * inside + far_price * (around - inside) + farther_price * (gpus - around)
                reading *= data / gpus
                toll = reading + per_speed * ranked.group_toll[slots - 1, group]
                worth = value_bound(instance, job, slots, speed, afford, toll) + fixed
                for at in range(layout.group_end[group], layout.group_end[group + 1]):
                    dues = gpus * ranked.terms[slots - 1, at, 0] * (1 - MARGIN)
                    if any_found and worth - dues < top - room:
                        rest[span] = max(rest[span], worth - dues)
                        break
                    sync_s = size * ranked.terms[slots - 1, at, 1] + ranked.terms[slots - 1, at, 2]
                    speed = batch * gpus / (least_s + waits * sync_s / steps)
                    toll = reading + per_speed * ranked.terms[slots - 1, at, 3]
                    closer = value_bound(instance, job, slots, speed, afford, toll) + fixed
                    if any_found and closer - dues < top - room:
                        rest[span] = max(rest[span], closer - dues)
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
                        toll += data * counts[part] / gpus * jobs.tier_price[job, tier]
                    closer = value_bound(instance, job, slots, speed, afford, toll) + fixed
                    if not allowed:
                        continue
                    if any_found and closer - cost * (1 - MARGIN) < top - room:
                        rest[span] = max(rest[span], closer - cost * (1 - MARGIN))
                        continue
                    if span_column(instance, job, span, pattern, out) <= 0:
                        continue
                    surplus = span_surplus(instance, y, job, span, pattern, prices, out)
                    key = column_key(1, span, pattern)
                    if not (not any_found or surplus >= top - room):
                        rest[span] = max(rest[span], surplus)
                    elif kept < kept_max:
                        near.job[kept], near.form[kept], near.item[kept], near.place[kept] = job, 1, span, pattern
                        near.surplus[kept] = surplus
                        kept += 1
                    if not any_found or surplus > top or (surplus == top and top_form >= 0 and key < top_key):
                        top, top_key, any_found = surplus, key, True
                        top_form, top_item, top_place = 1, span, pattern
        found.form[job], found.item[job], found.place[job], found.surplus[job] = top_form, top_item, top_place, top
    return kept
