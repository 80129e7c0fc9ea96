"""What rows earn, cost and supply at prices and uses: the sell side of the market, in exact integers.

All functions work on whole vectors of rows and return int64 [rows].
"""

from __future__ import annotations

import numpy as np

from broker.allocation.instance import SHARES, Instance, Int


def rents(instance: Instance, prices: Int) -> Int:
    """Return what each row earns at best: base x price + sum over steps of max(0, price - cost) x units."""
    rows = instance.rows
    owner = _owner(instance)
    margin = np.maximum(0, prices[owner] - rows.step_cost) * rows.step_units
    earned = rows.base * prices
    np.add.at(earned, owner, margin)
    return earned


def costs(instance: Instance, used: Int) -> Int:
    """Return what the steps cost that each row's use takes, cheapest first.

    Use beyond the last step is not counted: it is for `supplied` to refuse.
    """
    rows = instance.rows
    owner = _owner(instance)
    total = np.cumsum(rows.step_units)
    before = total - rows.step_units
    before -= np.append(0, total)[rows.step_start[:-1]][owner]
    taken = np.clip((used - rows.base)[owner] - before, 0, rows.step_units)
    cost = np.zeros(instance.row_count, dtype=np.int64)
    np.add.at(cost, owner, taken * rows.step_cost)
    return cost


def supplied(instance: Instance, prices: Int) -> Int:
    """Return what each row supplies at prices: its base and every step that costs no more than the price."""
    rows = instance.rows
    owner = _owner(instance)
    units = rows.base.copy()
    np.add.at(units, owner, np.where(rows.step_cost <= prices[owner], rows.step_units, 0))
    return units


def rounding(instance: Instance, prices: Int) -> int:
    """Return what whole micro-credits may move the bound by.

    One for every unit that a priced row supplies, and as much again for what jobs would take of it:
    a row of shares may be wanted whole by every job.
    """
    priced = prices > _first_cost(instance)
    shares = np.arange(instance.row_count) >= instance.links.first_row
    wanted = np.where(shares, SHARES * instance.job_count, np.abs(supplied(instance, prices)))
    return int((np.abs(supplied(instance, prices)) + wanted)[priced].sum()) + instance.job_count


def _owner(instance: Instance) -> Int:
    return np.repeat(np.arange(instance.row_count), np.diff(instance.rows.step_start))


def _first_cost(instance: Instance) -> Int:
    """Return the cost of each row's first step, 0 where it has none."""
    rows = instance.rows
    padded = np.append(rows.step_cost, 0)
    return np.where(rows.step_start[:-1] < rows.step_start[1:], padded[rows.step_start[:-1]], 0)
