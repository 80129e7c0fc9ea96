from __future__ import annotations

import numpy as np
import pytest

from training.exchange import Entry
from training.outer_fragment import Received
from training.ranks import Ranks
from training.round_statistics import RoundStatistics, measured, noise_scale


def statistics(parts: dict[str, tuple[int, list[float]]]) -> RoundStatistics:
    received = [Received(site, weight, np.array(values, dtype=np.float32)) for site, (weight, values) in parts.items()]
    entries = [Entry(site, weight, (), ()) for site, (weight, _) in parts.items()]
    found = RoundStatistics.gathered(Ranks(), entries, [measured(received)])
    assert found is not None
    return found


def test_norms_and_cosines_are_those_of_the_vectors() -> None:
    found = statistics({"a": (1, [3.0, 0.0]), "b": (1, [0.0, 4.0]), "c": (2, [1.0, 0.0])})
    assert found.norms == pytest.approx((3, 4, 1))
    assert found.cosine == pytest.approx((0 + 1 + 0) / 3)
    assert found.mean_norm == pytest.approx(np.linalg.norm([(3 + 2) / 4, 1]))


def test_fragments_add_up() -> None:
    whole = statistics({"a": (1, [3.0, 1.0, 2.0]), "b": (3, [0.0, 4.0, -1.0])})
    pieces = [
        measured([Received("a", 1, np.float32(a)), Received("b", 3, np.float32(b))])
        for a, b in (([3.0, 1.0], [0.0, 4.0]), ([2.0], [-1.0]))
    ]
    split = RoundStatistics.gathered(Ranks(), [Entry("a", 1, (), ()), Entry("b", 3, (), ())], pieces)
    assert split is not None
    assert split.cosine == pytest.approx(whole.cosine)
    assert split.mean_norm == pytest.approx(whole.mean_norm)


def test_one_site_has_no_cosine_and_no_noise_scale() -> None:
    found = statistics({"a": (5, [1.0, 2.0])})
    assert found.cosine is None
    assert found.noise_scale_samples is None


def test_the_noise_scale_is_the_trace_of_the_covariance_over_the_square_of_the_mean() -> None:
    """Gradients drawn with a known mean and noise, of unlike batches: the two estimates average to the truth."""
    chance = np.random.default_rng(2)
    mean, noise = np.full(50, 0.3), 2.0
    weights = np.array([16.0, 16.0, 48.0])
    truth = noise**2 * 50 / (mean @ mean)
    small = 1 / np.mean(1 / weights)
    signals, noises = [], []
    for _ in range(400):
        parts = mean + noise / np.sqrt(weights)[:, None] * chance.standard_normal((3, 50))
        squares = (parts**2).sum(axis=1)
        merged = weights @ parts / weights.sum()
        big_square, small_square = float(merged @ merged), float(squares.mean())
        signals.append((80 * big_square - small * small_square) / (80 - small))
        noises.append((small_square - big_square) / (1 / small - 1 / 80))
        found = noise_scale(weights, squares, big_square)
        assert found is None or found == pytest.approx(noises[-1] / signals[-1])
    assert np.mean(noises) / np.mean(signals) == pytest.approx(truth, rel=0.1)
