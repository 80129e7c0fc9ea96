"""DiLoCo (arXiv 2311.08105): every H steps the mean of what sites moved, and one Nesterov step along it.

Also `sparse` (arXiv 2508.15706), which is the same with top-k contributions, a decayed carry and a plain step; and
`local`, where nothing is merged.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from training.codecs import Values
from training.outer import PLAIN, OuterRule, fragment_digest, outer_step
from training.outer_fragment import OwnedFragment, Received
from training.robust_merge import merged
from training.spec import MergeRule


class Diloco:
    """The outer step with momentum; other strategies change single answers of it."""

    gradients = False
    keeps_carry = True
    mixes = False
    overlap_steps = 0
    deals_apart = False
    waits = True
    offers = 1
    last_rounds = 0
    extras: tuple[str, ...] = ()

    def __init__(self, rule: OuterRule, *, merge: MergeRule = "mean") -> None:
        """Step by `rule` along what `merge` makes of the contributions."""
        self.rule = rule
        self._merge = merge

    def travelling(self, round_number: int, fragments: int) -> Sequence[int]:
        """Return all fragments."""
        return range(fragments)

    def begin(self, owned: OwnedFragment, *, joined: bool) -> None:
        """Prepare nothing."""

    def expect(self, extras: Collection[str]) -> None:
        """Expect nothing."""

    def moved(self, owned: OwnedFragment, present: Values) -> Values:
        """Return D = theta - theta_m."""
        return owned.theta - present

    def observe(self, site_ids: Sequence[str]) -> None:
        """Need nothing of it."""

    def merge(self, owned: OwnedFragment, received: Sequence[Received], round_number: int) -> None:
        """Take the outer step; a lone contribution is adopted whole: there is nothing to average."""
        direction = self.mean(owned, received)
        if len(received) == 1:
            owned.theta, _ = outer_step(owned.theta, owned.velocity, direction, PLAIN)
        else:
            owned.theta, owned.velocity = outer_step(owned.theta, owned.velocity, direction, self.rule)

    def mean(self, owned: OwnedFragment, received: Sequence[Received]) -> Values:
        """Return the mean by samples, or what the plan's robust rule puts in its place."""
        return merged(self._merge, [(each.weight, each.values) for each in received])

    def adopted(self, owned: OwnedFragment, present: Values | None) -> Values:
        """Return the outer parameters."""
        return owned.theta

    def digest(self, owned: OwnedFragment) -> bytes:
        """Return the digest of parameters and velocity."""
        return fragment_digest(owned.theta, owned.velocity)

    def final(self, owned: OwnedFragment) -> Values:
        """Return the outer parameters."""
        return owned.theta
