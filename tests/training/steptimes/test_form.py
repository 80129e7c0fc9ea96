"""The form in arrays against the formulas of its chapter, written out for one configuration at a time."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from tests.training.steptimes.synthetic_tables import MODELS, drawn, true_parameters
from training.steptimes.form import OWN, SHARED, Form


def step_by_hand(own: dict[str, float], shared: dict[str, float], unit_s: float, *, k: int, g: int, b: int) -> float:
    normal = NormalDist()
    n = k * g
    slowest = normal.inv_cdf((n - 0.375) / (n + 0.25)) if n > 1 else 0.0
    local = own["overhead_s"] * (1 + own["host"] * (g - 1)) + own["sample_s"] * b
    if k > 1:
        local *= 1 + own["crosstalk"]
    compute = local * (1 + own["straggle"] * slowest)
    moved = 0.0
    if n > 1:
        moved += own["latency"] * own["transfer_s"] + own["fabric"] * own["transfer_s"] * 2 * (g - 1) / g
    if k > 1:
        crowd = (g - 1) ** shared["power"] if g > 1 else 0.0
        share = 1 + shared["contention"] * crowd
        if k == 2:
            share = shared["scale_two"] * (1 + shared["contention_two"] * crowd)
        moved += own["latency"] * own["transfer_s"] * own["latency_between"] * slowest
        moved += own["transfer_s"] * 2 * (k - 1) / k * share
        moved += own["wait"] * math.sqrt(unit_s * own["transfer_s"]) * (k - 1) / 3
    first = shared["first"] / (1 + shared["first"])
    hidden, width = (1 - first) * compute, shared["spread"] * moved
    if width == 0:
        return compute
    # The expected maximum of `hidden` and a normal draw around `moved`.
    gap = (hidden - moved) / width
    soft = hidden * normal.cdf(gap) + moved * normal.cdf(-gap) + width * normal.pdf(gap)
    return first * compute + soft


def test_every_term_of_the_form_is_the_one_that_is_written_down() -> None:
    own, shared = true_parameters()
    table = drawn((1, 2, 3, 8), noise=0.0)
    step, _ = Form(table, 0.1).steps(own, shared)
    common = dict(zip(SHARED, np.exp(shared), strict=True))
    for row in range(0, len(table), 3):
        mine = dict(zip(OWN, np.exp(own[table.model[row]]), strict=True))
        shape = {"k": int(table.nodes[row]), "g": int(table.node_gpus[row]), "b": int(table.batch[row])}
        assert step[row] == pytest.approx(step_by_hand(mine, common, 0.1, **shape), rel=1e-5)


def test_communication_that_fits_behind_compute_is_hidden_and_what_does_not_is_not() -> None:
    own, shared = true_parameters()
    table = drawn((1, 8), noise=0.0, batches=(1, 4096))
    step, _ = Form(table, 0.1).steps(own, shared)
    dense = table.model == MODELS.index("dense")

    def at(nodes: int, batch: int) -> float:
        rows = dense & (table.nodes == nodes) & (table.node_gpus == 4) & (table.batch == batch)
        return float(step[rows][0])

    assert at(8, 4096) < 1.1 * at(1, 4096)
    assert at(8, 1) > 1.5 * at(1, 1)
