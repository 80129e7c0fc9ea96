"""Goodput: samples that count, from the gradient noise scale, the batch and the strategy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from training.goodput import (
    NoiseScale,
    drift_of,
    efficiency,
    goodput,
    seconds_to_target,
    strategy_efficiency,
)


def test_the_noise_scale_of_a_known_distribution_is_found() -> None:
    draws = np.random.default_rng(3)
    mean, spread, dimensions = 0.1, 0.5, 400
    true = (dimensions * spread**2) / (dimensions * mean**2)  # 25 samples
    noise = NoiseScale()
    for _ in range(400):
        samples = mean + spread * draws.standard_normal((32, dimensions))
        small = np.mean([np.sum(part.mean(axis=0) ** 2) for part in np.split(samples, 8)])
        noise = noise.observed(4, float(small), 32, float(np.sum(samples.mean(axis=0) ** 2)))
    assert noise.batch == pytest.approx(true, rel=0.1)


def test_without_noise_there_is_no_estimate() -> None:
    assert NoiseScale().batch is None
    assert NoiseScale().observed(4, 1.0, 32, 1.0).batch is None  # no noise at all


@pytest.mark.parametrize(("small", "big", "norm"), [(4, 4, 1.0), (0, 4, 1.0), (8, 4, 1.0), (4, 8, math.nan)])
def test_what_cannot_be_an_observation_is_refused(small: int, big: int, norm: float) -> None:
    with pytest.raises(ValueError, match=r"batch sizes|not finite"):
        NoiseScale().observed(small, norm, big, 0.5)


def test_a_sample_counts_fully_at_the_reference_batch_and_less_in_a_larger() -> None:
    assert efficiency(1000, 256, 256) == 1.0
    assert efficiency(1000, 2048, 256) == pytest.approx(1256 / 3048)
    assert efficiency(1e9, 2048, 256) == pytest.approx(1.0, abs=1e-5)  # all noise: batches are free
    assert efficiency(0, 512, 256) == 0.5  # no noise: a larger batch is wasted


def test_doubling_the_batch_never_doubles_progress_and_never_harms_it() -> None:
    for noise in (0.0, 10.0, 1000.0, 1e6):
        one, two = (batch * efficiency(noise, batch, 256) for batch in (256, 512))
        assert one <= two + 1e-9
        assert two <= 2 * one + 1e-9


def test_drift_costs_nothing_on_one_site_or_merged_each_step() -> None:
    assert strategy_efficiency(1, 500) == 1.0
    assert strategy_efficiency(8, 1) == 1.0
    assert strategy_efficiency(8, 500) < strategy_efficiency(8, 20) < 1.0


def test_drift_is_learned_from_two_runs_to_one_loss() -> None:
    drift = drift_of(4, 101, 1.3e6, 1.0e6)
    assert strategy_efficiency(4, 101, drift) == pytest.approx(1 / 1.3)
    assert drift_of(4, 101, 0.9e6, 1.0e6) == 0.0


def test_a_target_in_samples_becomes_a_time() -> None:
    rate = goodput(1000, noise_batch=768, batch=1792, reference_batch=256)
    assert rate == pytest.approx(1000 * 1024 / 2560)
    assert seconds_to_target(4e6, rate) == pytest.approx(10_000)
    assert seconds_to_target(1.0, 0.0) == math.inf
