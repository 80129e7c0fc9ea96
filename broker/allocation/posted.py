"""Prices as published: whole micro-credits, the same whatever path the solver took.

The LP's capacities carry a fixed generic perturbation, so its optimal prices are unique; what is left
of the path is rounding in the last digits, of the order of 1e-9 of a price. Rounding down after
adding SNAP takes it away, but for a price that lies within 1e-9 of that edge.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from broker.allocation.instance import Instance, Int, Real

# An optimal price is a ratio of small whole numbers times whole values: far more often a whole number,
# or near one, than just SNAP below one.
SNAP: Final = 0.0137


def first_asks(instance: Instance) -> Int:
    """Return per row the cost of its first step where it gives nothing without one, else 0.

    Below it a row's price earns nothing and only makes columns look better than they are.
    """
    rows = instance.rows
    has_steps = rows.step_start[:-1] < rows.step_start[1:]
    first_cost = np.zeros(instance.row_count, np.int64)
    first_cost[has_steps] = rows.step_cost[rows.step_start[:-1][has_steps]]
    # What a pool gives for nothing has no ask.
    sells = (np.arange(instance.row_count) < instance.links.first_row) & (rows.base <= 0)
    return np.where(sells, first_cost, 0)


def post(instance: Instance, y: Real) -> Int:
    """Return y [rows] in whole micro-credits, a row that sells at a cost no lower than its first step."""
    prices = np.floor(np.maximum(0.0, y) + SNAP).astype(np.int64)
    return np.maximum(prices, first_asks(instance))
