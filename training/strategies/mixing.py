"""Mixing matrices for gossip: symmetric and doubly stochastic, so that averaging keeps the mean of all sites.

The second largest eigenvalue says how fast differences die: `consensus_rate` = 1 - |lambda_2|.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from training.spec import Topology

Matrix = npt.NDArray[np.float64]
Bandwidths = Mapping[tuple[str, str], float]


def mixing_matrix(topology: Topology, sites: Sequence[str], round_number: int, bandwidths: Bandwidths) -> Matrix:
    """Return W over `sites`, in their order. `bandwidths` (bits per second by directed pair) may be empty."""
    if topology == "ring":
        return ring(len(sites))
    if topology == "exponential":
        return one_peer_exponential(len(sites), round_number)
    return metropolis(symmetric(sites, bandwidths))


def ring(count: int) -> Matrix:
    """Return a third for oneself and each of both neighbours; a half each for two."""
    matrix = np.zeros((count, count))
    edges = {(place, (place + 1) % count) for place in range(count) if count > 1}
    share = 1 / min(3, max(count, 1))
    for a, b in edges:
        matrix[a, b] = matrix[b, a] = share
    return _completed(matrix)


def one_peer_exponential(count: int, round_number: int) -> Matrix:
    """Return the round's halves: with the peer at distance 1, 2, 4, … by turns, paired so that it is symmetric.

    Sites whose numbers differ in one bit pair up. For a power of two all are equal after log2(count) rounds; otherwise
    a site without partner keeps its own, and the roles rotate with the round.
    """
    matrix = np.zeros((count, count))
    bits = max(1, (count - 1).bit_length())
    bit = 1 << ((round_number - 1) % bits)
    turn = 0 if count & (count - 1) == 0 else (round_number - 1) // bits
    for place in range(count):
        partner = place ^ bit
        if place < partner < count:
            a, b = (place + turn) % count, (partner + turn) % count
            matrix[a, b] = matrix[b, a] = 0.5
    return _completed(matrix)


def metropolis(speeds: Matrix) -> Matrix:
    """Return Metropolis weights on the edges with a speed above 0: W_ij = s_ij / (1 + the larger weighted degree).

    `speeds` is symmetric, in any unit. With equal speeds this is 1 / (1 + max(d_i, d_j)); a slower edge weighs less,
    so what mixes most travels on the fast links.
    """
    relative = speeds / speeds.max(initial=0) if speeds.max(initial=0) > 0 else speeds
    degrees = relative.sum(axis=1)
    matrix: Matrix = relative / (1 + np.maximum(degrees[:, None], degrees[None, :]))
    return _completed(matrix)


def symmetric(sites: Sequence[str], bandwidths: Bandwidths) -> Matrix:
    """Return each pair's slower direction; where nothing is measured, all pairs alike."""
    count = len(sites)
    speeds = np.ones((count, count)) - np.eye(count)
    if bandwidths:
        for a, first in enumerate(sites):
            for b, second in enumerate(sites):
                if a != b:
                    speeds[a, b] = min(bandwidths.get((first, second), 0.0), bandwidths.get((second, first), 0.0))
    return speeds


def consensus_rate(matrix: Matrix) -> float:
    """Return 1 - |lambda_2|: the share of disagreement that one round removes at least."""
    magnitudes = np.sort(np.abs(np.linalg.eigvalsh(matrix)))
    return 1.0 - float(magnitudes[-2]) if len(magnitudes) > 1 else 1.0


def _completed(matrix: Matrix) -> Matrix:
    """Give each site what its neighbours leave of one."""
    np.fill_diagonal(matrix, 0.0)
    np.fill_diagonal(matrix, 1.0 - matrix.sum(axis=1))
    return matrix
