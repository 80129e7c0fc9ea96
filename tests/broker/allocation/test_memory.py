from __future__ import annotations

import numpy as np
import pytest

from broker.allocation import oracle
from broker.allocation.columns import scale, window
from broker.allocation.memory import Memory
from broker.allocation.nodes import market_nodes
from broker.allocation.oracle import Best
from tests.broker.allocation import large_instances, small_instances


def nothing(jobs: int) -> Best:
    none = np.full(jobs, -1, np.int32)
    return Best(none.astype(np.int8), none.copy(), none.copy(), np.zeros(jobs))


@pytest.mark.parametrize("seed", range(30))
def test_a_search_that_remembers_others_finds_the_same_as_one_that_does_not(seed: int) -> None:
    instance = small_instances.small(seed)
    layout = oracle.prepare(instance)
    nodes = market_nodes(instance, layout)
    memory, random = Memory(instance), np.random.default_rng(seed)
    y = np.floor(random.uniform(0, 2, instance.row_count) * 200_000)
    hint = nothing(instance.job_count)
    for spread in (0.3, 0.03, 0.003, 0.0003, 0.2, 0.0):
        window(instance, layout, nodes, y, 0.01 * scale(instance), found=hint, hint=hint, memory=memory)
        alone = oracle.best(instance, y, layout=layout)
        for mine, expected in zip(hint, alone, strict=True):
            assert np.array_equal(mine, expected)
        y = np.floor(y * random.uniform(1 - spread, 1 + spread, len(y)))


def test_small_changes_of_price_leave_most_spans_without_a_search() -> None:
    instance = large_instances.large(300, 24, "B", 1)
    layout, memory = oracle.prepare(instance), Memory(instance)
    nodes, found = market_nodes(instance, layout), nothing(instance.job_count)
    y = np.full(instance.row_count, 300_000.0)
    y[instance.links.first_row :] = 0.0
    width = 0.01 * scale(instance)
    window(instance, layout, nodes, y, width, found=found, memory=memory)
    doubtful = memory.doubtful(y * 0.9999, found.surplus)
    assert len(doubtful) > 0
    assert doubtful.mean() < 0.5
