"""Prices to start from, before any LP."""

from __future__ import annotations

import numpy as np

from broker.allocation.instance import Instance, Real
from broker.allocation.oracle import Layout


def start_prices(instance: Instance, layout: Layout, last: Real | None) -> Real:
    """Return prices near the LP's: last round's, or none."""
    y = np.zeros(instance.row_count)
    rows = instance.rows
    has_steps = rows.step_start[:-1] < rows.step_start[1:]
    y[has_steps] = rows.step_cost[rows.step_start[:-1][has_steps]]
    y[instance.links.first_row :] = 0
    return y if last is None else np.maximum(last, np.where(np.arange(len(y)) < instance.links.first_row, y, 0))
