"""Columns as arrays: which job, what it is worth, and which rows it uses how much.

A window is every column close to its job's best at given prices; the LP starts from it. There a job
without a restriction of its own (no site list, no veto) is placed on *market nodes*: one column for
all pools of a tier (form `oracle.SCOPE`), since the LP spreads the load over the pools behind a node.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from broker.allocation.compiled import compiled_loop
from broker.allocation.instance import BUNDLE, NONE, SINGLE, SPAN, Index, Instance, Int, Real
from broker.allocation.kernel import (
    CHARGE_MAX,
    EGRESS,
    PART_FIELDS,
    PARTS,
    SPAN_OUT,
    VALUE,
    budget_shares,
    ceil_rate,
    single_column,
    span_column,
)
from broker.allocation.layout import Layout, scope_of
from broker.allocation.memory import Memory
from broker.allocation.nodes import Nodes
from broker.allocation.oracle import SCOPE, Best, Near, search

# Spans of one job in one window: the best of them; the proof adds others where they are missed.
SPANS_PER_JOB: Final = 6


class Columns(NamedTuple):
    """Columns by index; column c uses use[e] of row[e] for e in start[c] up to start[c + 1].

    Rows from Instance.row_count on are market nodes. Form NONE is staying out: worth and uses nothing.
    """

    job: Index
    form: NDArray[np.int8]
    item: Index
    place: Index
    value: Int
    start: Int
    row: Index
    use: Int

    def surplus(self, y: NDArray[np.float64] | NDArray[np.int64]) -> NDArray[np.float64] | NDArray[np.int64]:
        """Return the value less the price of what is used, at y [rows, then nodes]."""
        paid = np.concatenate([np.zeros(1, y.dtype), np.cumsum(self.use * y[self.row])])
        return self.value - (paid[self.start[1:]] - paid[self.start[:-1]])

    def take(self, chosen: NDArray[Any]) -> Columns:
        """Return the chosen columns, in the order of `chosen`."""
        sizes = self.start[chosen + 1] - self.start[chosen]
        start = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        entry = np.repeat(self.start[chosen] - start[:-1], sizes) + np.arange(start[-1])
        return Columns(
            self.job[chosen],
            self.form[chosen],
            self.item[chosen],
            self.place[chosen],
            self.value[chosen],
            start,
            self.row[entry],
            self.use[entry],
        )


def joined(first: Columns, second: Columns) -> Columns:
    """Return both, one after the other."""
    merged: list[NDArray[Any]] = [np.concatenate([a, b]) for a, b in zip(first, second, strict=True)]
    start = np.concatenate([first.start, second.start[1:] + first.start[-1]])
    return Columns(merged[0], merged[1], merged[2], merged[3], merged[4], start, merged[6], merged[7])


def describe(
    instance: Instance, layout: Layout, nodes: Nodes, job: Index, form: NDArray[np.int8], item: Index, place: Index
) -> Columns:
    """Return the columns so named with their values and uses. Each must be one that its job may hold."""
    form = form.astype(np.int8)
    sizes = np.full(len(job), 2, np.int64)
    single, span, bundle = form == SINGLE, form == SPAN, form == BUNDLE
    sizes[single] += instance.slots
    parts = instance.patterns.parts[place[span]]
    sizes[span] += parts * instance.spans.slots[item[span]] + 2 * parts
    sizes[bundle] = np.diff(instance.bundles.entry_start)[item[bundle]]
    sizes[form == SCOPE] += 1
    room = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    value, length = np.zeros(len(job), np.int64), np.zeros(len(job), np.int64)
    row, use = np.zeros(room[-1], np.int32), np.zeros(room[-1], np.int64)
    wide = Columns(job, form, item, place, value, room, row, use)
    _fill(instance, layout, nodes.sizes, nodes.node, wide, length, np.zeros(SPAN_OUT, np.int64))
    start = np.concatenate([[0], np.cumsum(length)]).astype(np.int64)
    entry = np.repeat(room[:-1] - start[:-1], length) + np.arange(start[-1])
    return wide._replace(start=start, row=row[entry], use=use[entry])


def scale(instance: Instance) -> Real:
    """Return per job the largest value of its columns on one site or written out: what a width is relative to."""
    largest = np.zeros(instance.job_count)
    for start, value in (
        (instance.singles.start, instance.singles.value),
        (instance.bundles.start, instance.bundles.value),
    ):
        np.maximum.at(largest, np.repeat(np.arange(instance.job_count), np.diff(start)), value.astype(np.float64))
    return largest


def window(
    instance: Instance,
    layout: Layout,
    nodes: Nodes,
    y: Real,
    width: Real,
    *,
    found: Best,
    hint: Best | None = None,
    width_spans: Real | None = None,
    memory: Memory | None = None,
) -> Columns:
    """Return the columns within `width` [jobs] of their job's best at y, staying out included.

    Spans are held to `width_spans` where that is given. `found` is filled with the best ones. Columns are ordered by job, the best first.
    """
    most = 8 * instance.job_count + 4 * len(instance.singles.good) + 1024
    near = Near(
        width,
        width if width_spans is None else width_spans,
        *(np.zeros(most, dtype) for dtype in (np.int32, np.int8, np.int32, np.int32, np.float64)),  # type: ignore[arg-type]
    )
    count = search(instance, layout, y, found, hint, near, memory)
    job, form, item, place, surplus = (part[:count] for part in near[2:])
    close = surplus >= found.surplus[job] - width[job]
    outside = np.flatnonzero(~instance.jobs.must & (found.surplus <= width)).astype(np.int32)
    none = np.full(len(outside), NONE, np.int32)
    # The best column itself may have gone unkept where the hint was it, or the room was used up.
    absent = np.ones(instance.job_count, bool)
    absent[job[close]] = False
    absent[outside] = False
    missed = np.flatnonzero(absent | (found.form == SPAN) | (found.form == BUNDLE)).astype(np.int32)
    job = np.concatenate([job[close], outside, missed])
    form = np.concatenate([form[close], none.astype(np.int8), found.form[missed]])
    item = np.concatenate([item[close], none, found.item[missed]])
    place = np.concatenate([place[close], none, found.place[missed]])
    surplus = np.concatenate([surplus[close], np.zeros(len(outside)), found.surplus[missed]])
    order = np.lexsort((place, item, form, -surplus, job))
    job, form, item, place = (part[order] for part in (job, form, item, place))
    same = np.zeros(len(job), bool)
    same[1:] = (np.diff(job) == 0) & (np.diff(form) == 0) & (np.diff(item) == 0) & (np.diff(place) == 0)
    spans = np.cumsum(form == SPAN)
    before = np.concatenate([[0], spans])[np.searchsorted(job, job)]
    keep = ~same & ((form != SPAN) | (spans - before <= SPANS_PER_JOB))
    return describe(instance, layout, nodes, job[keep], form[keep], item[keep], place[keep])


@compiled_loop
def _fill(
    instance: Instance,
    layout: Layout,
    sizes: np.ndarray,
    node: np.ndarray,
    wide: Columns,
    length: np.ndarray,
    out: np.ndarray,
) -> None:
    jobs, goods, singles, patterns = instance.jobs, instance.goods, instance.singles, instance.patterns
    pool_count = len(instance.pools.site)
    first_row = instance.links.first_row
    for column in range(len(wide.job)):
        job, form, item, place = wide.job[column], wide.form[column], wide.item[column], wide.place[column]
        at = wide.start[column]
        gpus, slots = np.int64(0), np.int64(1)
        if form == 0 or form == 3:
            good = singles.good[item]
            gpus = singles.gpus[item]
            slots = np.int64(goods.end[good] - goods.first[good])
            if form == 0:
                single_column(instance, job, item, place, out)
                for slot in range(goods.first[good], goods.end[good]):
                    wide.row[at], wide.use[at] = slot * pool_count + place, gpus
                    at += 1
            else:
                price = jobs.tier_price[job, place]
                egress = ceil_rate(float(singles.data_bytes_per_s[item]) * 3600.0 * float(price) / 1e9)
                out[VALUE] = singles.value[item] - egress * slots
                out[EGRESS] = egress * slots
                out[CHARGE_MAX] = singles.value[item] // slots - egress - (jobs.locked[job] if jobs.must[job] else 0)
                cell = scope_of(instance, layout, jobs.home[job], place) * len(goods.kind) + good
                size = np.searchsorted(sizes, gpus)
                wide.row[at], wide.use[at] = len(instance.rows.base) + node[cell, size], gpus
                at += 1
        elif form == 1:
            gpus, slots = instance.spans.gpus[item], np.int64(instance.spans.slots[item])
            span_column(instance, job, item, place, out)
            for part in range(patterns.parts[place]):
                field = PARTS + part * PART_FIELDS
                for slot in range(instance.spans.slots[item]):
                    wide.row[at], wide.use[at] = slot * pool_count + patterns.pool[place, part], out[field]
                    at += 1
                if patterns.up[place, part] >= 0:
                    wide.row[at], wide.use[at] = first_row + patterns.up[place, part], out[field + 2]
                    wide.row[at + 1], wide.use[at + 1] = first_row + patterns.down[place, part], out[field + 4]
                    at += 2
        elif form == 2:
            out[VALUE] = instance.bundles.value[item]
            for entry in range(instance.bundles.entry_start[item], instance.bundles.entry_start[item + 1]):
                wide.row[at], wide.use[at] = instance.bundles.entry_row[entry], instance.bundles.entry_use[entry]
                at += 1
        else:
            out[VALUE] = 0
        if gpus > 0 and jobs.budget_row[job] >= 0:
            rate = max(np.int64(0), out[CHARGE_MAX] + out[EGRESS] // slots)
            wide.row[at], wide.use[at] = jobs.budget_row[job], budget_shares(jobs, job, rate)
            at += 1
        if gpus > 0 and jobs.floor_row[job] >= 0:
            wide.row[at], wide.use[at] = jobs.floor_row[job], -gpus
            at += 1
        wide.value[column] = out[VALUE]
        length[column] = at - wide.start[column]
