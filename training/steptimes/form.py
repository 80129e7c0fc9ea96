"""The step time of one site in closed form: GPU, node and network, in that order.

With b the local batch, g the GPUs of the fullest node, k nodes, n GPUs and z(m) the expected maximum
of m standard normal draws (about sqrt(2 ln m): the slowest of m is what a step waits for),

    local   = (overhead (1 + host (g - 1)) + sample b) (1 + crosstalk [k > 1])
    compute = local (1 + straggle z(n))
    inside  = latency + fabric transfer 2 (g - 1) / g                                     n > 1
    between = latency' z(n) + transfer 2 (k - 1) / k share(g, k) + wait (k - 1)           k > 1
    step    = first compute + E max((1 - first) compute, inside + between)

The fullest node's g GPUs share its network card: share = 1 + contention (g - 1)^power, with figures
of its own for two nodes, where a ring has one peer only. `wait` counts rare delays of single nodes:
k nodes have k times the chance of one, and delays of independent messages add up like the square
root of what is moved. E max is over a normal spread of the communication, so that the composition is
soft as in Pollux (OSDI'20), with a width that scales with what is moved.

All parameters are logarithms (`first` a logit), so that no fit can leave the physical range.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from scipy.special import expit, ndtr, ndtri

from training.steptimes.table import Floats, StepTable

# What each model has of its own, and what all models of one cluster share.
OWN: Final = (
    "overhead_s",
    "sample_s",
    "host",
    "straggle",
    "latency",
    "fabric",
    "latency_between",
    "transfer_s",
    "wait",
    "crosstalk",
)
SHARED: Final = ("spread", "first", "contention", "power", "contention_two", "scale_two")
# Beyond this an exponent only overflows; the range is far wider than any step time.
LOG_BOUND: Final = 30.0


def slowest_of(count: Floats) -> Floats:
    """Return the expected maximum of `count` standard normal draws (Blom's approximation)."""
    result: Floats = ndtri((count - 0.375) / (count + 0.25))
    return np.where(count > 1, result, 0.0)


class Form:
    """The form over the rows of one table: what depends on the shapes alone is worked out once.

    `unit_s` is the table's typical step time: it makes `wait` a pure number.
    """

    def __init__(self, table: StepTable, unit_s: float) -> None:
        """Take the shapes of `table`."""
        self.model, self.batch, self.unit_s = table.model, table.batch, unit_s
        nodes, gpus, node_gpus = table.nodes, table.gpus, table.node_gpus
        self.others = node_gpus - 1
        self.many = nodes > 1
        self.two = nodes == 2  # noqa: PLR2004
        self.synced = gpus > 1
        self.slowest = slowest_of(gpus)
        self.ring_inside = np.where(self.synced, 2 * (node_gpus - 1) / node_gpus, 0.0)
        self.ring_between = 2 * (nodes - 1) / nodes
        self.further = (nodes - 1) / 3.0
        self.log_others = np.log(np.maximum(self.others, 1.0))

    def steps(self, own: Floats, shared: Floats) -> tuple[Floats, Floats]:
        """Return the predicted step and its part without waiting for others, in seconds.

        `own` has a row for each model and a column for each name of OWN; `shared` follows SHARED.
        """
        overhead_s, sample_s, host, straggle, latency, fabric, latency_between, transfer_s, wait, crosstalk = np.exp(
            np.clip(own, -LOG_BOUND, LOG_BOUND)
        )[self.model].T
        spread, _, contention, power, contention_two, scale_two = np.exp(np.clip(shared, -LOG_BOUND, LOG_BOUND))
        first = expit(shared[1])
        local = (overhead_s * (1 + host * self.others) + sample_s * self.batch) * np.where(
            self.many, 1 + crosstalk, 1.0
        )
        compute = local * (1 + straggle * self.slowest)
        crowd = np.where(self.others > 0, np.exp(power * self.log_others), 0.0)
        share = np.where(self.two, scale_two * (1 + contention_two * crowd), 1 + contention * crowd)
        latency_s = latency * transfer_s
        inside = np.where(self.synced, latency_s + fabric * transfer_s * self.ring_inside, 0.0)
        between = np.where(
            self.many,
            latency_s * latency_between * self.slowest
            + transfer_s * self.ring_between * share
            + wait * np.sqrt(self.unit_s * transfer_s) * self.further,
            0.0,
        )
        hidden, moved = (1 - first) * compute, inside + between
        width = spread * moved + 1e-6 * hidden
        gap = (hidden - moved) / width
        below = ndtr(gap)
        step = first * compute + hidden * below + moved * (1 - below) + width * np.exp(-gap * gap / 2) * _DENSITY
        return step, local


_DENSITY: Final = float(1 / np.sqrt(2 * np.pi))
