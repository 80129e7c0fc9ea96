"""Quorum and grace: K sites seal a round, late ones have a grace, and directions are averaged on the sphere.

From Decoupled DiLoCo (arXiv 2604.21428): with unlike numbers of sites from round to round a plain mean shrinks, since
sites point in different directions. Radial-directional averaging keeps the mean length and averages the directions,
for each tensor: (sum w |D| / sum w) * unit(sum w unit(D)). Embeddings, whose rows are mostly zero, take the plain
mean. When a round is sealed is the hub's decision, by the quorum and grace in the view.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from training.codecs import Values
from training.merge import fixed_sum, sum_of_squares, weighted_mean
from training.outer_fragment import OwnedFragment, Received
from training.strategies.diloco import Diloco

# Directions that cancel to this share of their sum say nothing: then the mean stands.
_CANCELLED: Final = 1e-6


class Quorum(Diloco):
    """DiLoCo with radial-directional averaging. What is more than two rounds late goes back to the carry."""

    deals_apart = True
    waits = False
    offers = 3

    def mean(self, owned: OwnedFragment, received: Sequence[Received]) -> Values:
        """Return the radial-directional mean of each parameter's stretch of the fragment."""
        merged = np.empty(owned.fragment.elements, dtype=np.float32)
        start = 0
        for piece in owned.fragment.pieces:
            stop = start + piece.stop - piece.start
            parts = [(each.weight, each.values[start:stop]) for each in received]
            merged[start:stop] = weighted_mean(parts) if piece.embedding else radial_mean(parts)
            start = stop
        return merged


def radial_mean(parts: Sequence[tuple[int, Values]]) -> Values:
    """Return the weighted mean length along the weighted mean direction of (weight, D)."""
    weights = float(sum(weight for weight, _ in parts))
    lengths = [float(np.sqrt(sum_of_squares(values))) for _, values in parts]
    direction = np.zeros(parts[0][1].size, dtype=np.float64)
    for (weight, values), length in zip(parts, lengths, strict=True):
        if length > 0:
            direction += values.astype(np.float64) * (weight / length)
    norm = float(np.sqrt(fixed_sum(direction * direction)))
    if norm <= _CANCELLED * weights:
        return weighted_mean(parts)
    mean_length = sum(weight * length for (weight, _), length in zip(parts, lengths, strict=True)) / weights
    direction *= mean_length / norm
    return direction.astype(np.float32)
