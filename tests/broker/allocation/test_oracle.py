from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from broker.allocation import kernel, oracle
from broker.allocation.instance import BUNDLE, SINGLE, SPAN, Instance
from tests.broker.allocation import small_instances

Listed = tuple[int, int, int, int, dict[int, int]]


def every_column(instance: Instance, job: int) -> list[Listed]:  # noqa: C901 - three forms of column, side by side
    """List (form, item, place, value, uses) of all columns of a job, by the text of the rules."""
    jobs, goods, singles, spans, patterns = (
        instance.jobs,
        instance.goods,
        instance.singles,
        instance.spans,
        instance.patterns,
    )
    out = np.zeros(kernel.SPAN_OUT, np.int64)
    listed: list[Listed] = []

    def side(uses: dict[int, int], gpus: int, slots: int) -> None:
        if jobs.budget_row[job] >= 0:
            rate = max(0, int(out[kernel.CHARGE_MAX] + out[kernel.EGRESS] // slots))
            uses[int(jobs.budget_row[job])] = math.ceil(rate * 10_000 / int(jobs.budget[job]))
        if jobs.floor_row[job] >= 0:
            uses[int(jobs.floor_row[job])] = -gpus

    for item in range(singles.start[job], singles.start[job + 1]):
        good = singles.good[item]
        for offer in range(goods.offer_start[good], goods.offer_start[good + 1]):
            pool = int(goods.offer_pool[offer])
            if goods.offer_limit[offer] >= singles.gpus[item] and kernel.single_column(instance, job, item, pool, out):
                gpus = int(singles.gpus[item])
                uses = {t * instance.pool_count + pool: gpus for t in range(goods.first[good], goods.end[good])}
                side(uses, gpus, int(goods.end[good] - goods.first[good]))
                listed.append((SINGLE, item, pool, int(out[kernel.VALUE]), uses))
    for item in range(spans.start[job], spans.start[job + 1]):
        family = spans.family[item]
        for pattern in range(patterns.family_start[family], patterns.family_start[family + 1]):
            if kernel.span_column(instance, job, item, pattern, out) > 0:
                uses = {}
                for part in range(patterns.parts[pattern]):
                    field = kernel.PARTS + part * kernel.PART_FIELDS
                    for slot in range(spans.slots[item]):
                        uses[slot * instance.pool_count + int(patterns.pool[pattern, part])] = int(out[field])
                    if patterns.up[pattern, part] >= 0:
                        uses[instance.links.first_row + int(patterns.up[pattern, part])] = int(out[field + 2])
                        uses[instance.links.first_row + int(patterns.down[pattern, part])] = int(out[field + 4])
                side(uses, int(spans.gpus[item]), int(spans.slots[item]))
                listed.append((SPAN, item, pattern, int(out[kernel.VALUE]), uses))
    for item in range(instance.bundles.start[job], instance.bundles.start[job + 1]):
        entries = slice(instance.bundles.entry_start[item], instance.bundles.entry_start[item + 1])
        rows, uses_of = instance.bundles.entry_row[entries].tolist(), instance.bundles.entry_use[entries].tolist()
        listed.append((BUNDLE, item, 0, int(instance.bundles.value[item]), dict(zip(rows, uses_of, strict=True))))
    return listed


def with_families_of_any_size(instance: Instance) -> Instance:
    """Return the same market with pairs and triples of one kind in one family, and slow rings inside sites."""
    patterns = instance.patterns
    family = np.repeat(np.arange(len(patterns.family_start) - 1), np.diff(patterns.family_start))
    kinds = np.where(patterns.pool >= 0, instance.pools.kind[patterns.pool], 0)
    lowest = np.where(patterns.pool >= 0, kinds, 99).min(axis=1)
    highest = kinds.max(axis=1)
    merged = {int(f): (int(lowest[family == f].min()), int(highest[family == f].max())) for f in np.unique(family)}
    names = sorted(set(merged.values()))
    joined = np.array([names.index(merged[int(f)]) for f in family], np.int64)
    order = np.argsort(joined, kind="stable")
    start = np.searchsorted(joined[order], np.arange(len(names) + 1)).astype(np.int64)
    spans = instance.spans
    held = np.array(
        [names.index(merged[int(f)]) if int(f) in merged else len(names) - 1 for f in spans.family], np.int32
    )
    return instance._replace(
        kinds=instance.kinds._replace(ring_bits_per_s=instance.kinds.ring_bits_per_s / 300),
        jobs=instance.jobs._replace(ring_bits_per_s=instance.jobs.ring_bits_per_s / 300),
        patterns=type(patterns)(*(part[order] for part in patterns[:-1]), start),
        spans=spans._replace(family=held),
    )


def some_prices(instance: Instance, seed: int) -> NDArray[Any]:
    """Return whole prices, many of them equal or 0, so that ties occur."""
    rng = np.random.default_rng(seed)
    pools = rng.choice([0, 200_000, 500_000, 501_237, 900_000], instance.links.first_row)
    rest = rng.choice([0, 3, 50, 400], instance.row_count - instance.links.first_row)
    return np.concatenate([pools, rest]).astype(np.int64)


@pytest.mark.parametrize("seed", range(60))
def test_best_column_and_dual_equal_brute_force_over_every_column(seed: int) -> None:
    instance = small_instances.small(seed)
    check(instance, some_prices(instance, seed))


@pytest.mark.parametrize("seed", range(60))
def test_so_it_does_where_a_family_joins_patterns_of_two_and_three_parts(seed: int) -> None:
    instance = small_instances.small(seed)
    if len(instance.patterns.parts):
        instance = with_families_of_any_size(instance)
    check(instance, some_prices(instance, seed))


@pytest.mark.parametrize("seed", range(20))
def test_so_it_does_at_prices_too_large_for_floats(seed: int) -> None:
    instance = small_instances.small(seed)
    check(instance, some_prices(instance, seed) * (2**33 + 1), approximately=True)


def check(instance: Instance, prices: NDArray[Any], *, approximately: bool = False) -> None:
    expected_total = 0
    found = oracle.best(instance, prices)
    for job in range(instance.job_count):
        ranked = sorted(
            (-(value - sum(use * int(prices[row]) for row, use in uses.items())), kernel.column_key(form, item, place))
            for form, item, place, value, uses in every_column(instance, job)
        )
        surplus = -ranked[0][0] if ranked else 0
        out = not instance.jobs.must[job] and surplus <= 0
        expected_total += 0 if out else surplus
        assert (found.form[job] < 0) == out
        if not out:
            key = kernel.column_key(int(found.form[job]), int(found.item[job]), int(found.place[job]))
            assert (int(found.surplus[job]), key) == (surplus, ranked[0][1])
    rows = instance.rows
    for row in range(instance.row_count):
        expected_total += int(rows.base[row]) * int(prices[row])
        for step in range(rows.step_start[row], rows.step_start[row + 1]):
            expected_total += max(0, int(prices[row] - rows.step_cost[step])) * int(rows.step_units[step])
    assert oracle.dual_exact(instance, prices) == expected_total
    if approximately:
        return
    real = prices.astype(float)
    in_floats = oracle.best(instance, real)
    assert oracle.dual(instance, real, in_floats) == pytest.approx(expected_total, rel=1e-12)
    assert [part.tolist() for part in in_floats[:3]] == [part.tolist() for part in found[:3]]


@pytest.mark.parametrize("seed", range(20))
def test_hint_changes_nothing(seed: int) -> None:
    instance = small_instances.small(seed)
    elsewhere = oracle.best(instance, some_prices(instance, seed + 1000))
    prices = some_prices(instance, seed)
    alone, hinted = oracle.best(instance, prices), oracle.best(instance, prices, hint=elsewhere)
    assert all(np.array_equal(a, b) for a, b in zip(alone, hinted, strict=True))


def test_exact_sum_does_not_overflow_at_200_000_jobs() -> None:
    rates = np.full(200_000, 2**45 + 1, np.int64)
    assert oracle.exact_dot(rates, np.full(200_000, 2**20, np.int64)) == 200_000 * (2**45 + 1) * 2**20
