"""Streaming DiLoCo (arXiv 2501.18512, Alg. 2): fragments take turns, and training goes on while one travels.

Of P groups of fragments one is posted every H / P inner steps. tau steps later the sealed round is applied to the
outer parameters as they were when it was posted, and the model, which has moved on, takes
alpha * its own + (1 - alpha) * the outer parameters. Groups are strided, so that each holds a share of every depth.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from training.codecs import Values
from training.outer import OuterRule
from training.outer_fragment import OwnedFragment
from training.spec import MergeRule
from training.strategies.diloco import Diloco


class Streaming(Diloco):
    """DiLoCo in turns."""

    deals_apart = True

    def __init__(
        self, rule: OuterRule, *, groups: int, overlap_steps: int, mixing: float, merge: MergeRule = "mean"
    ) -> None:
        """Let `groups` groups take turns, each travelling for `overlap_steps` steps."""
        super().__init__(rule, merge=merge)
        self._groups = groups
        self._mixing = np.float32(mixing)
        self.mixes = mixing != 0
        self.overlap_steps = overlap_steps
        # After the last sample every group but the one just sent has work that nobody has seen.
        self.last_rounds = groups - 1

    def travelling(self, round_number: int, fragments: int) -> Sequence[int]:
        """Return every P-th fragment; a model of fewer fragments than groups skips the turns that are empty."""
        groups = min(self._groups, fragments)
        return range((round_number - 1) % groups, fragments, groups)

    def adopted(self, owned: OwnedFragment, present: Values | None) -> Values:
        """Mix the model's own progress since posting with the outer parameters."""
        if present is None:
            return owned.theta
        mixed: Values = self._mixing * present
        mixed += (np.float32(1) - self._mixing) * owned.theta
        return mixed
