"""Plans between sites that the market chooses for every configuration: the same three times over, and worth what they say."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from broker.allocation import kernel
from broker.allocation.compile import compile_market
from broker.allocation.instance import SPAN
from broker.allocation.rules import Rules
from broker.allocation.snapshot import Incumbent, Snapshot
from broker.allocation.solve import clear
from broker.allocation.table_rows import from_snapshot, to_snapshot
from broker.allocation.verify import verify
from broker.allocation.won import Market
from tests.broker.allocation.instances import random_market, with_open_plans
from tests.broker.allocation.test_demand import check


def market_of(seed: int, *, jobs: int = 8, sites: int = 4) -> Snapshot:
    return with_open_plans(random_market(seed, jobs=jobs, sites=sites, types=2), seed)


@pytest.mark.parametrize("seed", range(6))
def test_every_jobs_best_surplus_is_the_same_found_twice(seed: int) -> None:
    check(market_of(seed, jobs=6, sites=5), seed)


def test_what_the_loops_choose_is_what_the_rule_in_words_chooses() -> None:
    chosen: Counter[tuple[str, str]] = Counter()
    for seed in (1, 2):
        snapshot = market_of(seed, jobs=10)
        tables = from_snapshot(snapshot)
        market, rules = Market(tables, compile_market(tables)), Rules(snapshot)
        instance, names = market.instance, market.names
        jobs, out = {job.job_id: job for job in snapshot.jobs}, np.zeros(kernel.SPAN_OUT, np.int64)
        for job in range(instance.job_count):
            state = jobs[names.jobs[job]]
            for span in range(instance.spans.start[job], instance.spans.start[job + 1]):
                family = instance.spans.family[span]
                for pattern in range(
                    instance.patterns.family_start[family], instance.patterns.family_start[family + 1]
                ):
                    speed = kernel.span_column(instance, job, span, pattern, out)
                    if speed == 0:
                        continue
                    told = names.configuration(job, SPAN, span, pattern)
                    parts = [rules.part(state, rules.pools[row.pool_id], row.gpus) for row in told.parts]
                    assert told.sync == rules.resolved(state, parts, told.hub_site)
                    assert told.samples_per_s == speed  # to the bit
                    sent = {(row.from_site, row.to_site): row.bytes_per_s for row in told.traffic}
                    for part, row in enumerate(told.parts):
                        field = kernel.PARTS + part * kernel.PART_FIELDS
                        if row.site_id != told.hub_site:
                            assert out[field + 1] == sent[row.site_id, told.hub_site]
                            assert out[field + 3] == sent[told.hub_site, row.site_id]
                    chosen[told.sync.strategy, told.sync.codec] += 1
    assert chosen["diloco", "int8"]
    assert chosen["streaming", "int4"]
    assert chosen["sparse", "topk2"]


@pytest.mark.parametrize("seed", [3])
def test_a_round_with_open_plans_verifies_and_so_does_the_renewal_of_what_it_sold(seed: int) -> None:
    snapshot = market_of(seed)
    first = clear(snapshot)
    assert verify(snapshot, first) == []
    assert any(
        len(row.configuration.parts) > 1 and row.configuration.sync.strategy != "local" for row in first.placements
    )
    sold = {row.job_id: row for row in first.placements}
    leases = {
        job_id: Incumbent(
            configuration=row.configuration,
            epoch=1,
            locked_prices={charge.pool_id: charge.price_micros_per_gpu_hour for charge in row.pools},
            term_ends_ms=snapshot.taken_at_ms,
        )
        for job_id, row in sold.items()
    }
    later = snapshot.model_copy(
        update={"jobs": tuple(row.model_copy(update={"incumbent": leases.get(row.job_id)}) for row in snapshot.jobs)}
    )
    second = clear(later)
    assert verify(later, second) == []
    renewed = [row for row in second.placements if row.action == "renew"]
    assert len(renewed) == len(sold)
    for row in renewed:
        assert row.configuration == sold[row.job_id].configuration


def test_an_open_plan_travels_in_columns_and_one_that_is_not_open_leaves_no_trace() -> None:
    snapshot = market_of(5)
    tables = from_snapshot(snapshot)
    assert from_snapshot(to_snapshot(tables)).digest() == tables.digest()
    closed = snapshot.model_copy(
        update={"jobs": tuple(job.model_copy(update={"sync_open": False}) for job in snapshot.jobs)}
    )
    plain = closed.model_copy(
        update={
            "jobs": tuple(
                job.model_copy(
                    update={
                        "sync": job.sync.model_copy(
                            update={"target_utilisation": 0.95, "max_egress_gb": None, "fragments": 4}
                        )
                    }
                )
                for job in closed.jobs
            )
        }
    )
    assert from_snapshot(closed).digest() == from_snapshot(plain).digest() != tables.digest()
