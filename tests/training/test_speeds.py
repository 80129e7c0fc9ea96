"""Speeds measured while jobs train replace the catalogue's, with an interval that narrows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from training.spec import Workload
from training.speeds import (
    COLD_HALF_WIDTH_LOG,
    MeasuredRun,
    SpeedEstimate,
    carried,
    chance_within,
    cold,
    estimate,
    near,
    ratios_between,
    samples_per_s,
)

WORK = Workload(samples=10**9, batch_per_gpu=32, parameters=100_000_000, flops_per_sample=6e10)
TRUE = SpeedEstimate(1.1e14, 4e10, 0.0, measured=True)


def run(gpus: int, seconds: float = 3600.0, factor: float = 1.0) -> MeasuredRun:
    return MeasuredRun(gpus, samples_per_s(WORK, gpus, TRUE) * seconds * factor, seconds)


def test_runs_of_several_sizes_find_both_speeds() -> None:
    found = estimate(WORK, [run(1), run(2), run(8)] * 4, cold("A100"))
    assert found.measured
    assert found.flops_per_s == pytest.approx(TRUE.flops_per_s, rel=0.05)
    assert found.ring_bits_per_s == pytest.approx(TRUE.ring_bits_per_s, rel=0.10)
    assert found.half_width_log < 0.15


def test_a_run_on_one_gpu_leaves_the_ring_where_it_was_assumed() -> None:
    found = estimate(WORK, [run(1)], cold("A100"))
    assert found.flops_per_s == pytest.approx(TRUE.flops_per_s, rel=0.03)
    assert found.ring_bits_per_s == pytest.approx(cold("A100").ring_bits_per_s)


def test_short_runs_and_none_say_nothing() -> None:
    assert estimate(WORK, [], cold("A100")) == cold("A100")
    assert estimate(WORK, [run(4, seconds=59.0)], cold("A100")) == cold("A100")
    assert estimate(WORK, [MeasuredRun(4, 0.0, 3600.0)], cold("A100")) == cold("A100")


def test_a_run_beside_a_noisy_neighbour_does_not_move_the_estimate_far() -> None:
    clean = [run(1), run(2), run(4), run(8)]
    before = samples_per_s(WORK, 4, estimate(WORK, clean, cold("A100")))
    after = samples_per_s(WORK, 4, estimate(WORK, [*clean, run(4, factor=0.2)], cold("A100")))
    assert abs(math.log(after / before)) < 0.1


def test_a_longer_run_counts_for_more_than_its_start() -> None:
    short, long = (estimate(WORK, [run(1, seconds=seconds)], cold("A100")) for seconds in (70.0, 7000.0))
    assert long.half_width_log < short.half_width_log < COLD_HALF_WIDTH_LOG


def test_stated_intervals_hold_what_they_state() -> None:
    draws = np.random.default_rng(5)
    inside = 0
    trials = 300
    for _ in range(trials):
        runs = [run(gpus, factor=float(np.exp(0.05 * draws.standard_normal()))) for gpus in (1, 4)]
        found = estimate(WORK, runs, cold("A100"))
        next_one = samples_per_s(WORK, 4, TRUE) * float(np.exp(0.05 * draws.standard_normal()))
        inside += abs(math.log(next_one / samples_per_s(WORK, 4, found))) <= found.half_width_log
    assert 0.85 <= inside / trials <= 0.97


def test_the_market_values_an_open_speed_below_its_middle() -> None:
    lower = cold("A100").at_quantile()
    assert lower.flops_per_s < cold("A100").flops_per_s
    assert cold("A100").at_quantile(0.5).flops_per_s == pytest.approx(cold("A100").flops_per_s)


def test_a_family_is_carried_to_another_gpu_type_by_what_others_showed() -> None:
    here = estimate(WORK, [run(1), run(8)], cold("A100"))
    families = [
        {"A100": TRUE, "T4": SpeedEstimate(TRUE.flops_per_s * share, 1e10, 0.1, measured=True)}
        for share in (0.1, 0.2, 0.3)
    ]
    there = carried(here, "A100", "T4", ratios_between(families, "A100", "T4"))
    assert there.flops_per_s == pytest.approx(0.2 * here.flops_per_s)
    assert not there.measured
    assert there.half_width_log > here.half_width_log
    by_catalogue = carried(here, "A100", "T4", [])
    assert by_catalogue.flops_per_s == pytest.approx(here.flops_per_s * 65 / 312)


def test_the_chance_of_a_deadline_is_a_half_at_the_prediction() -> None:
    assert chance_within(100.0, 100.0, 0.3) == pytest.approx(0.5)
    assert chance_within(100.0, 100.0 * math.exp(0.3), 0.3) == pytest.approx(0.95, abs=0.001)
    assert chance_within(100.0, 0.0, 0.3) == 0.0
    assert chance_within(0.0, 1.0, 0.3) == 1.0


def test_near_a_measured_count_the_measurement_is_believed() -> None:
    # Two GPUs are three times as fast as the form allows: no pair of speeds agrees with both counts.
    runs = [run(1), run(2, factor=3.0), run(8)]
    found = estimate(WORK, runs, cold("A100"))
    for gpus, factor in ((1, 1.0), (2, 3.0), (8, 1.0)):
        true = samples_per_s(WORK, gpus, TRUE) * factor
        believed = samples_per_s(WORK, gpus, near(WORK, found, runs, gpus))
        assert believed == pytest.approx(true, rel=0.05)
    assert near(WORK, found, runs, 12) == near(WORK, found, runs, 8)
    assert near(WORK, cold("A100"), [], 2) == cold("A100")


def test_unlike_hosts_widen_the_interval() -> None:
    alike = [run(1), run(2), run(4), run(8)] * 2
    unlike = [run(gpus, factor=factor) for gpus in (1, 2, 4, 8) for factor in (0.7, 1.4)]
    narrow, wide = (estimate(WORK, runs, cold("A100")).half_width_log for runs in (alike, unlike))
    assert wide > 2 * narrow
