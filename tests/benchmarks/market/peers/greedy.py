"""Greedy placements on our own market: the simple rules that a broker without an optimiser would use.

Jobs come one after the other in a stated order; each takes the column with the highest surplus over
the asks (value less what the cheapest free GPUs cost), if it is above 0 and still fits. Jobs inside
their term keep their place first, whatever the order.

    arrival              first come, best price: what a buyer's own tool does at posted prices
    value                highest value first
    value per GPU        highest value per GPU and slot first
    surplus per GPU      highest surplus at the asks per GPU and slot first: the best simple rule known
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from broker.allocation.instance import BUNDLE, NONE, Choice, Instance, Int, Real
from tests.benchmarks.market.peers.listing import Listing, added_cost, pages, welfare

ORDERS: Final = ("arrival", "value", "value per GPU", "surplus per GPU")


class GreedyAnswer(NamedTuple):
    """What the rule placed and its welfare in micro-credits per hour."""

    choice: Choice
    welfare: float
    placed: int


def place(instance: Instance, order: str) -> GreedyAnswer:
    """Place all jobs in an order of ORDERS."""
    jobs = instance.job_count
    used = np.zeros(instance.row_count, np.int64)
    line = np.lexsort((np.arange(jobs), -_keys(instance, order), ~instance.jobs.must))
    chosen = np.full((3, jobs), NONE, np.int64)
    values = np.zeros(jobs, np.int64)
    for part, columns in pages(instance, line):
        for position, job in enumerate(part):
            best = _best(instance, columns, position, int(job), used)
            if best < 0:
                continue
            entries = slice(columns.entry_start[best], columns.entry_start[best + 1])
            np.add.at(used, columns.entry_row[entries], columns.entry_use[entries])
            chosen[:, job] = columns.form[best], columns.item[best], columns.place[best]
            values[job] = columns.value[best]
    choice = Choice(chosen[0].astype(np.int8), chosen[1].astype(np.int32), chosen[2].astype(np.int32))
    return GreedyAnswer(choice, welfare(instance, values, used), int((chosen[0] >= 0).sum()))


def _best(instance: Instance, columns: Listing, position: int, job: int, used: Int) -> int:
    """Return the job's column of the highest surplus that fits, -1 where none is above 0."""
    low, high = columns.start[position], columns.start[position + 1]
    if low == high:
        return -1
    surplus = _surplus(instance, columns, low, high, used)
    if instance.jobs.must[job]:
        own = (columns.form[low:high] == BUNDLE) & (columns.item[low:high] == instance.jobs.own[job])
        return int(low + np.flatnonzero(own)[0])
    best = int(np.argmax(surplus))
    return int(low + best) if surplus[best] > 0 else -1


def _surplus(instance: Instance, columns: Listing, low: int, high: int, used: Int) -> Real:
    """Return value less the cost of uses on top of `used` for a range of columns; -inf where one does not fit."""
    entries = slice(columns.entry_start[low], columns.entry_start[high])
    cost = added_cost(instance, used, columns.entry_row[entries], columns.entry_use[entries])
    owner = np.repeat(np.arange(high - low), np.diff(columns.entry_start[low : high + 1]))
    return columns.value[low:high] - np.bincount(owner, cost, high - low)


def _keys(instance: Instance, order: str) -> Real:
    """Return what an order sorts by, highest first: each job's best column in an empty market."""
    keys = np.full(instance.job_count, -np.inf)
    if order == "arrival":
        return np.zeros(instance.job_count)
    used = np.zeros(instance.row_count, np.int64)
    pool_rows = instance.slots * instance.pool_count
    for part, columns in pages(instance, np.arange(instance.job_count)):
        count = len(columns.value)
        worth = _surplus(instance, columns, 0, count, used) if order == "surplus per GPU" else columns.value
        if order != "value":
            owner = np.repeat(np.arange(count), np.diff(columns.entry_start))
            gpu_slots = np.bincount(owner, np.where(columns.entry_row < pool_rows, columns.entry_use, 0), count)
            worth = worth / np.maximum(1.0, gpu_slots)
        np.maximum.at(keys, np.repeat(part, np.diff(columns.start)), worth)
    return keys
