"""Columns written out: what each is worth, uses and may be charged; and every column within a regret.

`columns` is for the LP and puts jobs on market nodes; a whole choice needs the pools.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from broker.allocation.columns import Columns, joined
from broker.allocation.compiled import compiled_loop
from broker.allocation.instance import BUNDLE, SINGLE, SPAN, SPAN_SITES_MAX, Index, Instance, Int, Real
from broker.allocation.kernel import (
    CHARGE_MAX,
    EGRESS,
    PART_FIELDS,
    PARTS,
    SPAN_OUT,
    TERM_S,
    VALUE,
    budget_shares,
    single_column,
    span_column,
    term_seconds,
)

# Columns that are written out at a time.
_PORTION: Final = 32_768


class Names(NamedTuple):
    """Columns by name."""

    job: Index
    form: Index
    item: Index
    place: Index


class Described(NamedTuple):
    """Columns that their jobs may hold, with the most that each may be charged per hour, and its term.

    A bundle's term is the longest: it does not say how fast its job is there.
    """

    columns: Columns
    charge_max: Int
    term_s: Int


def described(instance: Instance, names: Names) -> Described:
    """Write columns out, in their order; those that their jobs may not hold are left out."""
    form, item, place = names.form, names.item, names.place
    sizes = np.full(len(form), instance.slots + 2, np.int64)
    span, bundle = form == SPAN, form == BUNDLE
    sizes[span] = SPAN_SITES_MAX * (instance.spans.slots[item[span]] + 2) + 2
    sizes[bundle] = np.diff(instance.bundles.entry_start)[item[bundle]]
    room = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    out = np.zeros((3, len(form)), np.int64)
    length = np.zeros(len(form), np.int64)
    row, use = np.zeros(room[-1], np.int32), np.zeros(room[-1], np.int64)
    _describe(instance, names, room, row, use, length, out, np.zeros(SPAN_OUT, np.int64))
    allowed = np.flatnonzero(length >= 0)
    length = length[allowed]
    start = np.concatenate([[0], np.cumsum(length)]).astype(np.int64)
    entry = np.repeat(room[allowed] - start[:-1], length) + np.arange(start[-1])
    columns = Columns(
        names.job[allowed].astype(np.int32),
        form[allowed].astype(np.int8),
        item[allowed].astype(np.int32),
        place[allowed].astype(np.int32),
        out[0, allowed],
        start,
        row[entry],
        use[entry],
    )
    return Described(columns, out[1, allowed], out[2, allowed])


def near(instance: Instance, prices: Real, best: Real, width: Real) -> Columns:
    """Return every column whose surplus at `prices` is at most `width` [jobs] below the job's best.

    In order of (job, form, item, place).
    """
    found = described(instance, _named(*(np.zeros(0, np.int64) for _ in range(4)))).columns
    counts = np.cumsum(_count_by_job(instance))
    first = 0
    while first < instance.job_count:
        before = counts[first - 1] if first else 0
        end = max(first + 1, int(np.searchsorted(counts, before + _PORTION, side="right")))
        columns = described(instance, _every_name(instance, first, end)).columns
        close = columns.surplus(prices) >= (best - width)[columns.job]
        found = joined(found, columns.take(np.flatnonzero(close)))
        first = end
    return found.take(np.lexsort((found.place, found.item, found.form, found.job)))


def near_singles(instance: Instance, prices: Real, best: Real, width: float, jobs: Int) -> Columns:
    """Return the singles of `jobs` whose surplus at `prices` is at most `width` below their job's best."""
    singles, goods, pools = instance.singles, instance.goods, instance.pool_count
    count = np.diff(singles.start)[jobs]
    item = np.repeat(singles.start[jobs] - np.cumsum(count) + count, count) + np.arange(int(count.sum()))
    least = np.repeat(best[jobs] - width, count)
    job = np.repeat(jobs, count)
    summed = np.concatenate(
        [np.zeros((1, pools)), np.cumsum(prices[: instance.slots * pools].reshape(instance.slots, pools), axis=0)]
    )
    good_of = np.repeat(np.arange(len(goods.kind)), np.diff(goods.offer_start))
    unit = summed[goods.end[good_of], goods.offer_pool] - summed[goods.first[good_of], goods.offer_pool]
    cheapest = np.full(len(goods.kind), np.inf)
    np.minimum.at(cheapest, good_of, unit)
    # Egress is left out of these bounds, and a floor's subsidy counts.
    floor = instance.jobs.floor_row[job]
    bonus = np.where(floor >= 0, prices[floor], 0.0)
    worth = singles.value[item] + singles.gpus[item] * bonus
    able = np.flatnonzero(worth - singles.gpus[item] * cheapest[singles.good[item]] >= least)
    owner, offer = _ranges(goods.offer_start, singles.good[item[able]])
    owner = able[owner]
    close = (goods.offer_limit[offer] >= singles.gpus[item[owner]]) & (
        worth[owner] - singles.gpus[item[owner]] * unit[offer] >= least[owner]
    )
    owner, offer = owner[close], offer[close]
    names = _named(job[owner], np.full(len(owner), SINGLE), item[owner], goods.offer_pool[offer])
    columns = described(instance, names).columns
    return columns.take(np.flatnonzero(columns.surplus(prices) >= (best - width)[columns.job]))


def _count_by_job(instance: Instance) -> Int:
    """Return how many names `_every_name` makes of each job."""
    singles, spans, bundles = instance.singles, instance.spans, instance.bundles
    total = np.diff(bundles.start).astype(np.int64)
    for start, each in (
        (singles.start, np.diff(instance.goods.offer_start)[singles.good]),
        (spans.start, np.diff(instance.patterns.family_start)[spans.family]),
    ):
        summed = np.concatenate([[0], np.cumsum(each)])
        total += summed[start[1:]] - summed[start[:-1]]
    return total


def _every_name(instance: Instance, first: int, end: int) -> Names:
    """Return all columns of jobs `first` up to `end` that may fit by their size."""
    singles, spans, bundles, patterns = instance.singles, instance.spans, instance.bundles, instance.patterns
    job, item = _items(singles.start, first, end)
    owner, offer = _ranges(instance.goods.offer_start, singles.good[item])
    large = instance.goods.offer_limit[offer] >= singles.gpus[item[owner]]
    owner, offer = owner[large], offer[large]
    single = _named(job[owner], np.full(len(owner), SINGLE), item[owner], instance.goods.offer_pool[offer])
    job, item = _items(spans.start, first, end)
    owner, pattern = _ranges(patterns.family_start, spans.family[item])
    few = patterns.parts[pattern] <= spans.sites_max[item[owner]]
    owner, pattern = owner[few], pattern[few]
    span = _named(job[owner], np.full(len(owner), SPAN), item[owner], pattern)
    job, item = _items(bundles.start, first, end)
    bundle = _named(job, np.full(len(job), BUNDLE), item, np.zeros(len(job)))
    return Names(*(np.concatenate(parts) for parts in zip(single, span, bundle, strict=True)))


def _named(job: Int, form: Int, item: Int, place: Int) -> Names:
    return Names(*(part.astype(np.int32) for part in (job, form, item, place)))


def _items(start: Int, first: int, end: int) -> tuple[Int, Int]:
    item = np.arange(start[first], start[end])
    return np.repeat(np.arange(first, end), np.diff(start[first : end + 1])), item


def _ranges(start: Int, which: Index) -> tuple[Int, Int]:
    """Return every position from start[w] up to start[w + 1] for each w of `which`, and whose it is."""
    sizes = np.diff(start)[which]
    owner = np.repeat(np.arange(len(which)), sizes)
    before = np.concatenate([[0], np.cumsum(sizes)])[:-1]
    return owner, np.repeat(start[which] - before, sizes) + np.arange(len(owner))


@compiled_loop
def _describe(
    instance: Instance, names: Names, room: Int, row: Index, use: Int, length: Int, written: Int, out: Int
) -> None:
    jobs, singles, patterns, bundles = instance.jobs, instance.singles, instance.patterns, instance.bundles
    pools, first_link = len(instance.pools.site), instance.links.first_row
    for column in range(len(names.job)):
        job, form = np.int64(names.job[column]), names.form[column]
        item, place = np.int64(names.item[column]), np.int64(names.place[column])
        at = room[column]
        gpus, slots = np.int64(0), np.int64(1)
        speed = np.inf
        allowed = True
        if form == BUNDLE:
            for entry in range(bundles.entry_start[item], bundles.entry_start[item + 1]):
                row[at] = bundles.entry_row[entry]
                use[at] = bundles.entry_use[entry]
                at += 1
            out[VALUE] = bundles.value[item]
            out[CHARGE_MAX] = bundles.charge_max[item]
            out[TERM_S] = np.int64(instance.term_s)
        elif form == SINGLE:
            good = singles.good[item]
            gpus = np.int64(singles.gpus[item])
            first, end = instance.goods.first[good], instance.goods.end[good]
            slots = np.int64(end - first)
            allowed = single_column(instance, job, item, place, out)
            if allowed:
                out[TERM_S] = np.int64(term_seconds(instance, job, singles.speed[item]))
                for slot in range(first, end):
                    row[at] = slot * pools + place
                    use[at] = gpus
                    at += 1
        else:
            gpus = np.int64(instance.spans.gpus[item])
            slots = np.int64(instance.spans.slots[item])
            speed = span_column(instance, job, item, place, out)
            allowed = speed > 0.0
            if allowed:
                for part in range(patterns.parts[place]):
                    field = PARTS + part * PART_FIELDS
                    for slot in range(slots):
                        row[at] = slot * pools + patterns.pool[place, part]
                        use[at] = out[field]
                        at += 1
                    for direction in range(2):
                        link = patterns.up[place, part] if direction == 0 else patterns.down[place, part]
                        if link >= 0 and out[field + 2 + 2 * direction] > 0:
                            row[at] = first_link + link
                            use[at] = out[field + 2 + 2 * direction]
                            at += 1
        if not allowed:
            length[column] = -1
            continue
        if form != BUNDLE:
            rate = max(np.int64(0), out[CHARGE_MAX] + out[EGRESS] // slots)
            budget = budget_shares(jobs, job, rate)
            if budget > 0:
                row[at] = jobs.budget_row[job]
                use[at] = budget
                at += 1
            if jobs.floor_row[job] >= 0:
                row[at] = jobs.floor_row[job]
                use[at] = -gpus
                at += 1
        written[0, column] = out[VALUE]
        written[1, column] = out[CHARGE_MAX]
        written[2, column] = out[TERM_S]
        length[column] = at - room[column]
