"""Every column of a market, one after the other: written out for enumeration, searched for greedy rules.

Written apart from the solver's own modules; only the value of a column and its link traffic come
from `kernel`, the market's rules. Compiled, since a market of 10,000 jobs has tens of millions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np

from broker.allocation import kernel
from broker.allocation.compiled import compiled
from broker.allocation.instance import BUNDLE, SHARES, SINGLE, SPAN, SPAN_SITES_MAX, Instance, Int, Real, Rows

ENTRIES_MAX: Final = 256
PAGE_COLUMNS: Final = 1_000_000
PAGE_ENTRIES: Final = 8_000_000
_FIELDS: Final = kernel.PARTS
_FIELD: Final = kernel.PART_FIELDS


class Listing(NamedTuple):
    """Columns job by job: those of the k-th job are start[k] up to start[k + 1], entries likewise.

    `value` is net of egress, micro-credits per hour; an entry is `use` units of `row`.
    """

    start: Int
    form: Int
    item: Int
    place: Int
    value: Int
    entry_start: Int
    entry_row: Int
    entry_use: Int


def list_columns(instance: Instance) -> Listing:
    """Write every column of a market out: one page, so for small markets only."""
    every = list(pages(instance, np.arange(instance.job_count)))
    if len(every) != 1:
        raise ValueError(f"More than {PAGE_COLUMNS} columns, or {PAGE_ENTRIES} uses. Take a smaller market.")
    return every[0][1]


def pages(instance: Instance, line: Int) -> Iterator[tuple[Int, Listing]]:
    """Yield (jobs, their columns) for the jobs of a line, in its order, as many at a time as a page holds."""
    first = 0
    blank = Listing(
        np.zeros(len(line) + 1, np.int64),
        *(np.zeros(PAGE_COLUMNS, np.int64) for _ in range(4)),
        np.zeros(PAGE_COLUMNS + 1, np.int64),
        np.zeros(PAGE_ENTRIES, np.int64),
        np.zeros(PAGE_ENTRIES, np.int64),
    )
    while first < len(line):
        end = _fill(instance, line, first, blank)
        assert end > first, "one job alone has more columns than a page"
        columns = blank.start[end - first]
        entries = blank.entry_start[columns]
        yield (
            line[first:end],
            Listing(
                blank.start[: end - first + 1],
                *(part[:columns] for part in blank[1:5]),
                blank.entry_start[: columns + 1],
                *(part[:entries] for part in blank[6:]),
            ),
        )
        first = end


def welfare(instance: Instance, values: Int, used: Int) -> float:
    """Return the sum of values less the cost of the steps that the rows' uses need."""
    return float(values.sum()) - sum(
        _steps_cost(instance.rows, row, int(used[row])) for row in range(instance.row_count)
    )


# What `best` looks for: value less the cost of the steps used, or value, either per GPU and slot or not.
SURPLUS: Final = 0
VALUE: Final = 1
VALUE_PER_GPU: Final = 2
SURPLUS_PER_GPU: Final = 3


@compiled
def best(instance: Instance, job: int, used: Int, rule: int, found: Int, out: Int, row: Int, use: Int) -> float:
    """Return a job's highest score by a rule on top of `used`, over the columns that fit; -inf without one.

    found[:4] is then the column's form, item, place and how many entries of row and use are its
    own; found[4] its value. Spans are evaluated only where their ceiling promises a higher score.
    """
    highest = -np.inf
    patterns, rows = instance.patterns, instance.rows
    column_row, column_use = np.zeros(ENTRIES_MAX, np.int64), np.zeros(ENTRIES_MAX, np.int64)
    counts = np.zeros(SPAN_SITES_MAX, np.int64)
    for form in range(3):
        begin, end = item_ranges(instance, job, form)
        for item in range(begin, end):
            low, high = place_range(instance, form, item)
            ceiling = np.inf
            if form == SPAN and low < high:
                speed = kernel.span_ceiling(instance, job, item, low)
                ceiling = float(kernel.value_rate(instance.jobs, job, speed)) * float(instance.spans.slots[item])
            for index in range(low, high):
                if form == SPAN:
                    promised = ceiling
                    if not kernel.split(
                        instance.spans.gpus[item], patterns.weight[index], patterns.parts[index], counts
                    ):
                        continue
                    for part in range(patterns.parts[index]):
                        promised -= _more(rows, patterns.pool[index, part], used, counts[part])
                    if promised == -np.inf:
                        continue
                    if rule in {VALUE, VALUE_PER_GPU}:
                        promised = ceiling
                    if rule in {VALUE_PER_GPU, SURPLUS_PER_GPU}:
                        promised /= float(instance.spans.gpus[item]) * float(instance.spans.slots[item])
                    if promised <= highest:
                        continue
                entries = column(instance, job, form, item, index, out, column_row, column_use)
                if entries < 0:
                    continue
                cost, gpu_slots = 0.0, 0.0
                for entry in range(entries):
                    cost += _more(rows, column_row[entry], used, column_use[entry])
                    if column_row[entry] < instance.slots * len(instance.pools.site):
                        gpu_slots += float(column_use[entry])
                if cost == np.inf:
                    continue
                score = float(out[kernel.VALUE]) - (cost if rule in {SURPLUS, SURPLUS_PER_GPU} else 0.0)
                if rule in {VALUE_PER_GPU, SURPLUS_PER_GPU}:
                    score /= max(1.0, gpu_slots)
                if score > highest:
                    highest = score
                    found[0], found[1], found[3], found[4] = form, item, entries, out[kernel.VALUE]
                    found[2] = instance.goods.offer_pool[index] if form == SINGLE else index
                    row[:entries], use[:entries] = column_row[:entries], column_use[:entries]
    return highest


@compiled
def place_in_order(instance: Instance, line: Int, used: Int, chosen: Int) -> None:
    """Place the jobs of a line, each at its highest surplus if that is above 0; chosen[job] is (form, item, place, value).

    `used` is what the rows supply already, and in the end in all.
    """
    found = np.zeros(5, np.int64)
    out = np.zeros(_FIELDS + _FIELD * SPAN_SITES_MAX, np.int64)
    row, use = np.zeros(ENTRIES_MAX, np.int64), np.zeros(ENTRIES_MAX, np.int64)
    for job in line:
        if best(instance, job, used, SURPLUS, found, out, row, use) > 0.0:
            for entry in range(found[3]):
                used[row[entry]] += use[entry]
            chosen[job, 0], chosen[job, 1], chosen[job, 2], chosen[job, 3] = found[0], found[1], found[2], found[4]


@compiled
def scores(instance: Instance, used: Int, rule: int, highest: Real) -> None:
    """Fill each job's highest score by a rule on top of `used`."""
    found = np.zeros(5, np.int64)
    out = np.zeros(_FIELDS + _FIELD * SPAN_SITES_MAX, np.int64)
    row, use = np.zeros(ENTRIES_MAX, np.int64), np.zeros(ENTRIES_MAX, np.int64)
    for job in range(len(instance.jobs.must)):
        highest[job] = best(instance, job, used, rule, found, out, row, use)


@compiled
def _more(rows: Rows, row: int, used: Int, use: int) -> float:
    """Return what `use` more units of a row cost on top of used[row], inf where it has no more."""
    after = _steps_cost(rows, row, used[row] + use)
    return np.inf if after == np.inf else after - _steps_cost(rows, row, used[row])


@compiled
def _steps_cost(rows: Rows, row: int, used: int) -> float:
    """Return what it costs a row to supply `used` units by its cheapest steps."""
    needed, cost = used - rows.base[row], 0.0
    for step in range(rows.step_start[row], rows.step_start[row + 1]):
        if needed <= 0:
            break
        taken = min(needed, rows.step_units[step])
        cost += float(taken) * float(rows.step_cost[step])
        needed -= taken
    return np.inf if needed > 0 else cost


@compiled
def item_ranges(instance: Instance, job: int, form: int) -> tuple[int, int]:
    """Return a job's items of a form: from, up to."""
    if form == SINGLE:
        return instance.singles.start[job], instance.singles.start[job + 1]
    if form == SPAN:
        return instance.spans.start[job], instance.spans.start[job + 1]
    return instance.bundles.start[job], instance.bundles.start[job + 1]


@compiled
def place_range(instance: Instance, form: int, item: int) -> tuple[int, int]:
    """Return where an item may be: offers of its good, patterns of its family, or the one place."""
    if form == SINGLE:
        good = instance.singles.good[item]
        return instance.goods.offer_start[good], instance.goods.offer_start[good + 1]
    if form == SPAN:
        family = np.int64(instance.spans.family[item])
        return instance.patterns.family_start[family], instance.patterns.family_start[family + 1]
    return np.int64(0), np.int64(1)


@compiled
def column(instance: Instance, job: int, form: int, item: int, index: int, out: Int, row: Int, use: Int) -> int:
    """Fill out[VALUE] and the column's uses; return how many, -1 where there is no such column.

    `index` runs over `place_range`: for a single it is an offer, not yet a pool.
    """
    jobs, pools = instance.jobs, len(instance.pools.site)
    gpus, entries = np.int64(0), 0
    if form == BUNDLE:
        out[kernel.VALUE] = instance.bundles.value[item]
        for entry in range(instance.bundles.entry_start[item], instance.bundles.entry_start[item + 1]):
            row[entries], use[entries] = instance.bundles.entry_row[entry], instance.bundles.entry_use[entry]
            entries += 1
        return entries
    if form == SINGLE:
        gpus, good = instance.singles.gpus[item], instance.singles.good[item]
        pool = np.int64(instance.goods.offer_pool[index])
        if gpus > instance.goods.offer_limit[index] or not kernel.single_column(instance, job, item, pool, out):
            return -1
        slots = np.int64(instance.goods.end[good] - instance.goods.first[good])
        for slot in range(instance.goods.first[good], instance.goods.end[good]):
            row[entries], use[entries] = np.int64(slot) * pools + pool, gpus
            entries += 1
    else:
        if kernel.span_column(instance, job, item, index, out) <= 0.0:
            return -1
        slots, patterns = np.int64(instance.spans.slots[item]), instance.patterns
        for part in range(patterns.parts[index]):
            count = out[_FIELDS + part * _FIELD]
            gpus += count
            for slot in range(slots):
                row[entries], use[entries] = slot * pools + patterns.pool[index, part], count
                entries += 1
            for direction in range(2):
                link = patterns.up[index, part] if direction == 0 else patterns.down[index, part]
                shares = out[_FIELDS + part * _FIELD + 2 + 2 * direction]
                if link >= 0 and shares > 0:
                    row[entries], use[entries] = instance.links.first_row + link, shares
                    entries += 1
    rate = max(np.int64(0), out[kernel.CHARGE_MAX] + out[kernel.EGRESS] // slots)
    budget = kernel.budget_shares(jobs, job, rate)
    if budget > 0:
        if budget > SHARES:
            return -1
        row[entries], use[entries] = jobs.budget_row[job], budget
        entries += 1
    if jobs.floor_row[job] >= 0:
        row[entries], use[entries] = jobs.floor_row[job], -gpus
        entries += 1
    return entries


@compiled
def _fill(instance: Instance, line: Int, first: int, listing: Listing) -> int:
    """Write the columns of line[first:] until the page is full; return where in the line it ended."""
    out = np.zeros(_FIELDS + _FIELD * SPAN_SITES_MAX, np.int64)
    row, use = np.zeros(ENTRIES_MAX, np.int64), np.zeros(ENTRIES_MAX, np.int64)
    at, entry = 0, 0
    listing.start[0] = 0
    listing.entry_start[0] = 0
    for position in range(first, len(line)):
        job = line[position]
        for form in range(3):
            begin, end = item_ranges(instance, job, form)
            for item in range(begin, end):
                low, high = place_range(instance, form, item)
                for index in range(low, high):
                    entries = column(instance, job, form, item, index, out, row, use)
                    if entries < 0:
                        continue
                    if at == len(listing.value) or entry + entries > len(listing.entry_row):
                        return position
                    listing.form[at], listing.item[at] = form, item
                    listing.place[at] = instance.goods.offer_pool[index] if form == SINGLE else index
                    listing.value[at] = out[kernel.VALUE]
                    for each in range(entries):
                        listing.entry_row[entry], listing.entry_use[entry] = row[each], use[each]
                        entry += 1
                    at += 1
                    listing.entry_start[at] = entry
        listing.start[position - first + 1] = at
    return len(line)
