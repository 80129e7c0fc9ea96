from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.strategies.mixing import (
    Matrix,
    consensus_rate,
    metropolis,
    mixing_matrix,
    one_peer_exponential,
    ring,
    symmetric,
)


def is_doubly_stochastic(matrix: Matrix) -> bool:
    ones = np.ones(len(matrix))
    return bool(np.allclose(matrix, matrix.T) and np.allclose(matrix @ ones, ones) and np.all(matrix >= -1e-12))


@given(count=st.integers(1, 8), number=st.integers(1, 30))
def test_every_topology_keeps_the_mean(count: int, number: int) -> None:
    sites = [f"s{place}" for place in range(count)]
    for topology in ("ring", "exponential", "metropolis"):
        assert is_doubly_stochastic(mixing_matrix(topology, sites, number, {}))


@given(data=st.data(), count=st.integers(2, 8))
def test_metropolis_weights_keep_the_mean_whatever_the_bandwidths(data: st.DataObject, count: int) -> None:
    sites = [f"s{place}" for place in range(count)]
    speeds = {(a, b): data.draw(st.floats(1e6, 1e11)) for a in sites for b in sites if a != b}
    assert is_doubly_stochastic(metropolis(symmetric(sites, speeds)))


def test_a_slower_link_weighs_less_and_one_that_is_not_there_nothing() -> None:
    speeds = {("a", "b"): 1e9, ("b", "a"): 1e9, ("b", "c"): 1e8, ("c", "b"): 1e9}
    matrix = metropolis(symmetric(["a", "b", "c"], speeds))
    assert matrix[0, 1] > 5 * matrix[1, 2] > 0
    assert matrix[0, 2] == 0


def test_equal_links_give_the_textbooks_metropolis_weights() -> None:
    """Four sites all linked: 1 / (1 + 3)."""
    assert np.allclose(metropolis(symmetric(list("abcd"), {})), 0.25)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_one_peer_a_round_makes_powers_of_two_equal_after_log2_rounds(count: int) -> None:
    product = np.eye(count)
    rounds = count.bit_length() - 1
    for number in range(1, rounds + 1):
        matrix = one_peer_exponential(count, number)
        assert np.all((matrix > 0).sum(axis=1) == 2), "one peer each"
        product = matrix @ product
    assert np.allclose(product, 1 / count)


@pytest.mark.parametrize("count", [3, 5, 6, 7])
def test_one_peer_a_round_makes_other_numbers_equal_in_the_long_run(count: int) -> None:
    product = np.eye(count)
    for number in range(1, 120):
        product = one_peer_exponential(count, number) @ product
    assert np.allclose(product, 1 / count, atol=1e-3)


def test_consensus_is_as_fast_as_the_second_eigenvalue_says() -> None:
    matrix = ring(6)
    rate = consensus_rate(matrix)
    assert rate == pytest.approx(1 - (1 + 2 * np.cos(np.pi / 3)) / 3)
    x = np.cos(np.arange(6) * 2 * np.pi / 6)  # the slowest mode
    assert np.linalg.norm(matrix @ x) == pytest.approx((1 - rate) * np.linalg.norm(x))
