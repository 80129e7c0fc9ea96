"""Every step: sites average gradients before the optimizer's step, as if they were ranks of one machine.

With fp32 it equals data parallelism in one process but for the rounding of the mean. It needs a fast link: it is
what the other strategies are measured against. All sites hold equal parameters and equal optimizer states, so a
joiner takes both from a peer. What sites agree on bit by bit is the merged gradient; the optimizer's own arithmetic
may differ in the last place between unlike GPUs, as it does under any data parallelism.
"""

from __future__ import annotations

from collections.abc import Sequence

from training.codecs import Values
from training.outer import PLAIN, fragment_digest
from training.outer_fragment import OwnedFragment, Received
from training.spec import MergeRule
from training.strategies.diloco import Diloco


class EveryStep(Diloco):
    """The merged gradient stands in `velocity`; theta follows the model after the optimizer's step."""

    gradients = True

    def __init__(self, *, merge: MergeRule = "mean") -> None:
        """Take no outer step."""
        super().__init__(PLAIN, merge=merge)

    def moved(self, owned: OwnedFragment, present: Values) -> Values:
        """Return the gradient."""
        return present

    def merge(self, owned: OwnedFragment, received: Sequence[Received], round_number: int) -> None:
        """Keep the mean gradient."""
        owned.velocity = self.mean(owned, received)

    def adopted(self, owned: OwnedFragment, present: Values | None) -> Values:
        """Return the mean gradient: the optimizer takes it in place of the site's own."""
        return owned.velocity

    def digest(self, owned: OwnedFragment) -> bytes:
        """Return the digest of the mean gradient."""
        return fragment_digest(owned.velocity)
