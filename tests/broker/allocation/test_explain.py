"""What explanations compute by themselves, for speed, is what the compiled rules say."""

from __future__ import annotations

import numpy as np
import pytest

from broker.allocation import kernel
from broker.allocation.compile import compile_market
from broker.allocation.explain import _Explained
from broker.allocation.solver import solve
from broker.allocation.table_rows import from_snapshot
from broker.allocation.won import Market
from tests.broker.allocation.feature_markets import feature_market


@pytest.mark.parametrize("seed", range(6))
def test_the_rules_said_twice_are_the_same(seed: int) -> None:
    tables = from_snapshot(feature_market(seed, jobs=10, sites=5, slots=1))
    market = Market(tables, compile_market(tables))
    instance = market.instance
    explained = _Explained(market, solve(instance), ())
    for job in range(instance.job_count):
        allowed = explained._allowed_sites(job)
        assert allowed.tolist() == [
            bool(kernel.site_allowed(instance, job, site)) for site in range(len(instance.sites.region))
        ]
        if instance.jobs.samples_left[job] <= 0:
            continue
        for pool in range(instance.pool_count):
            for count in (1, 3, 8):
                step_s = explained._step_s(job, pool, count)
                assert step_s == kernel.site_step_s(instance, job, pool, count)
                speed = float(instance.jobs.batch_per_gpu[job]) * count / step_s
                sketch = explained._sketch(job, pool, count)
                assert sketch.speed == speed
                assert sketch.term_s == int(kernel.term_seconds(instance, job, speed))
                assert sketch.linear == int(kernel.value_rate(instance.jobs, job, speed))
                assert sketch.affordable == int(kernel.affordable_rate(instance.jobs, job, sketch.term_s, 1))
    assert np.array_equal(np.sort(np.concatenate(list(explained._by_ask.values()))), np.arange(instance.pool_count))
