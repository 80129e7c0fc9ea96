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

from broker.allocation.instance import BUNDLE, NONE, Choice, Instance, Int
from tests.benchmarks.market.peers import listing

ORDERS: Final = ("arrival", "value", "value per GPU", "surplus per GPU")
_RULES: Final = {
    "value": listing.VALUE,
    "value per GPU": listing.VALUE_PER_GPU,
    "surplus per GPU": listing.SURPLUS_PER_GPU,
}


class GreedyAnswer(NamedTuple):
    """What the rule placed and its welfare in micro-credits per hour."""

    choice: Choice
    welfare: float
    placed: int


def place(instance: Instance, order: str) -> GreedyAnswer:
    """Place all jobs in an order of ORDERS."""
    used = np.zeros(instance.row_count, np.int64)
    chosen = np.full((instance.job_count, 4), NONE, np.int64)
    chosen[:, 3] = 0
    keys = np.zeros(instance.job_count)
    if order in _RULES:
        listing.scores(instance, used, _RULES[order], keys)
    _keep_incumbents(instance, used, chosen)
    line = np.argsort(-keys, kind="stable")
    listing.place_in_order(instance, line[~instance.jobs.must[line]], used, chosen)
    form, item, place_ = chosen[:, 0].astype(np.int8), chosen[:, 1].astype(np.int32), chosen[:, 2].astype(np.int32)
    welfare = listing.welfare(instance, chosen[:, 3], used)
    return GreedyAnswer(Choice(form, item, place_), welfare, int((form >= 0).sum()))


def _keep_incumbents(instance: Instance, used: Int, chosen: Int) -> None:
    """Leave jobs inside their term where they are."""
    bundles = instance.bundles
    for job in np.flatnonzero(instance.jobs.must):
        own = instance.jobs.own[job]
        entries = slice(bundles.entry_start[own], bundles.entry_start[own + 1])
        np.add.at(used, bundles.entry_row[entries], bundles.entry_use[entries])
        chosen[job] = BUNDLE, own, 0, bundles.value[own]
