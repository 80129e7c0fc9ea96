"""The market in numbers against the same rules in plain Python and the throughput model itself."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from broker.allocation import kernel
from broker.allocation.compile import Compiled, compile_market
from broker.allocation.instance import BUNDLE, SHARES, SINGLE, SPAN, capacity
from broker.allocation.singles import next_count
from broker.allocation.snapshot import Snapshot
from broker.allocation.table_rows import from_snapshot
from tests.broker.allocation.instances import random_market
from training.spec import SyncPlan
from training.throughput import SitePart, predict


def compiled(snapshot: Snapshot) -> Compiled:
    return compile_market(from_snapshot(snapshot))


@pytest.mark.parametrize("seed", range(3))
def test_speed_and_value_of_every_single_are_the_models_own(seed: int) -> None:
    snapshot = random_market(seed, jobs=12, sites=4, types=3)
    market = compiled(snapshot)
    instance, names = market.instance, market.names
    jobs = {job.job_id: job for job in snapshot.jobs}
    pools = {pool.pool_id: pool for pool in snapshot.pools}
    out = np.zeros(kernel.SPAN_OUT, np.int64)
    seen = 0
    for index, job_id in enumerate(names.jobs):
        job = jobs[job_id]
        for single in range(instance.singles.start[index], instance.singles.start[index + 1]):
            good = instance.singles.good[single]
            for offer in range(instance.goods.offer_start[good], instance.goods.offer_start[good + 1]):
                place = int(instance.goods.offer_pool[offer])
                pool = pools[names.pools[place]]
                gpus = int(instance.singles.gpus[single])
                part = SitePart(pool.site_id, pool.gpu_type, gpus, pool.flops_per_s, pool.intra_site_bits_per_s)
                speed = predict(job.workload, SyncPlan(strategy="local", codec="fp32"), [part], {}).samples_per_s
                assert instance.singles.speed[single] == speed  # to the bit
                allowed = job.sites_allowed is None or pool.site_id in job.sites_allowed
                assert kernel.single_column(instance, index, single, place, out) == allowed
                term_s = min(snapshot.term_s, max(60, math.ceil(1.25 * job.samples_left / speed)))
                bid = math.floor(job.bid_micros_per_million_samples * 3600.0 / 1e6 * speed)
                affordable = max(0, job.hold_left_micros - 1) * 3600 // term_s
                assert instance.singles.value[single] == min(bid, affordable)
                seen += 1
    assert seen > 50


@pytest.mark.parametrize("seed", range(3))
def test_speed_and_traffic_of_every_span_are_the_models_own(seed: int) -> None:
    market = compiled(random_market(seed, jobs=12, sites=5, types=2))
    instance, names = market.instance, market.names
    out = np.zeros(kernel.SPAN_OUT, np.int64)
    seen = 0
    for job in range(instance.job_count):
        for span in range(instance.spans.start[job], instance.spans.start[job + 1]):
            family = instance.spans.family[span]
            for pattern in range(instance.patterns.family_start[family], instance.patterns.family_start[family + 1]):
                speed = kernel.span_column(instance, job, span, pattern, out)
                if speed == 0:
                    continue
                assert speed <= kernel.span_ceiling(instance, job, span, pattern)
                told = names.configuration(job, SPAN, span, pattern)
                assert told.samples_per_s == speed  # to the bit
                assert told.gpus == instance.spans.gpus[span]
                sent = {(row.from_site, row.to_site): row.bytes_per_s for row in told.traffic}
                for part, row in enumerate(told.parts):
                    field = kernel.PARTS + part * kernel.PART_FIELDS
                    assert out[field] == row.gpus
                    if row.site_id != told.hub_site:
                        assert out[field + 1] == sent[row.site_id, told.hub_site]
                        assert out[field + 3] == sent[told.hub_site, row.site_id]
                seen += 1
    assert seen > 20


def test_counts_are_the_ladder_within_the_request_and_its_ends() -> None:
    for low, high in ((1, 1), (1, 7), (3, 3), (5, 40), (2, 24), (1, 64), (7, 9), (33, 4096)):
        ladder = {2**i for i in range(13)} | {3 * 2**i for i in range(11)}
        wanted = sorted({low, high} | {count for count in ladder if low <= count <= high})
        counts, count = [low], low
        while count < high:
            count = min(high, next_count(count))
            counts.append(count)
        assert counts == wanted


def test_the_order_of_rows_changes_no_number() -> None:
    snapshot = random_market(5, jobs=15, sites=4, types=2)
    draw = random.Random(1)  # noqa: S311  a seeded test market
    mixed = snapshot.model_copy(
        update={
            name: tuple(draw.sample(getattr(snapshot, name), len(getattr(snapshot, name))))
            for name in ("jobs", "pools", "sites", "links")
        }
    )
    assert _flat(compiled(snapshot).instance) == _flat(compiled(mixed).instance)


def _flat(part: object) -> object:
    if isinstance(part, tuple):
        return tuple(_flat(field) for field in part)
    return part.tobytes() if isinstance(part, np.ndarray) else part


def test_pools_without_features_supply_their_capacity_at_their_ask() -> None:
    snapshot = random_market(2, jobs=5, sites=3, types=2)
    instance = compiled(snapshot).instance
    pools = sorted(snapshot.pools, key=lambda pool: (pool.site_id, pool.gpu_type))
    assert capacity(instance.rows)[: len(pools)].tolist() == [pool.capacity_gpus for pool in pools]
    assert instance.rows.step_cost[: len(pools)].tolist() == [pool.ask_micros_per_gpu_hour for pool in pools]
    assert instance.links.first_row == len(pools)
    assert (capacity(instance.rows)[len(pools) :] == SHARES).all()
    assert SINGLE == 0
    assert BUNDLE == 2
