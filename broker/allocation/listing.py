"""Every column of a small round within a regret, pool by pool: what `finish` chooses from.

`columns.window` is for the LP and puts jobs on market nodes; a whole choice needs the pools.
"""

from __future__ import annotations

import numpy as np

from broker.allocation.columns import Columns
from broker.allocation.compiled import compiled_loop
from broker.allocation.instance import SINGLE, SPAN, Index, Instance, Int, Real
from broker.allocation.kernel import VALUE
from broker.allocation.occupancy import Scratch, column_uses, new_scratch


def near(instance: Instance, prices: Real, best: Real, width: Real) -> Columns:
    """Return every column whose surplus at `prices` is at most `width` [jobs] below the job's best.

    In order of (job, form, item, place). Listed twice: first to count, then to write.
    """
    scratch = new_scratch(instance)
    columns = _room(0, 0)
    found = np.zeros(2, np.int64)
    _list(instance, prices, best - width, scratch, False, columns, found)
    columns = _room(int(found[0]), int(found[1]))
    _list(instance, prices, best - width, scratch, True, columns, found)
    return columns


def _room(count: int, entries: int) -> Columns:
    def index() -> Index:
        return np.zeros(count, np.int32)

    return Columns(
        job=index(),
        form=np.zeros(count, np.int8),
        item=index(),
        place=index(),
        value=np.zeros(count, np.int64),
        start=np.zeros(count + 1, np.int64),
        row=np.zeros(entries, np.int32),
        use=np.zeros(entries, np.int64),
    )


@compiled_loop
def _list(
    instance: Instance, prices: Real, least: Real, scratch: Scratch, write: bool, columns: Columns, found: Int
) -> None:
    singles, spans, bundles, goods, patterns = (
        instance.singles,
        instance.spans,
        instance.bundles,
        instance.goods,
        instance.patterns,
    )
    listed, entries = 0, 0
    for job in range(len(least)):
        for form in range(3):
            if form == SINGLE:
                first, end = singles.start[job], singles.start[job + 1]
            elif form == SPAN:
                first, end = spans.start[job], spans.start[job + 1]
            else:
                first, end = bundles.start[job], bundles.start[job + 1]
            for item in range(first, end):
                low, high = np.int64(0), np.int64(1)
                if form == SINGLE:
                    good = singles.good[item]
                    low, high = goods.offer_start[good], goods.offer_start[good + 1]
                elif form == SPAN:
                    family = spans.family[item]
                    low, high = patterns.family_start[family], patterns.family_start[family + 1]
                for position in range(low, high):
                    place = position
                    if form == SINGLE:
                        if goods.offer_limit[position] < singles.gpus[item]:
                            continue
                        place = np.int64(goods.offer_pool[position])
                    count = column_uses(instance, job, form, item, place, scratch)
                    if count < 0:
                        continue
                    surplus = float(scratch.out[VALUE])
                    for entry in range(count):
                        surplus -= prices[scratch.row[entry]] * scratch.use[entry]
                    if surplus < least[job]:
                        continue
                    if write:
                        columns.job[listed] = job
                        columns.form[listed] = form
                        columns.item[listed] = item
                        columns.place[listed] = place
                        columns.value[listed] = scratch.out[VALUE]
                        columns.start[listed + 1] = entries + count
                        for entry in range(count):
                            columns.row[entries + entry] = scratch.row[entry]
                            columns.use[entries + entry] = scratch.use[entry]
                    listed += 1
                    entries += count
    found[0] = listed
    found[1] = entries
