"""Asynchronous training with delayed Nesterov momentum (arXiv 2401.09135, Alg. 3 with c = 0).

A round is sealed as soon as one site's contribution is there (a quorum of one); a site that comes too late for it is
offered to the next ones before it trains on. Each arrival D moves theta by eta D / N at once and is added to a
buffer; every N-th round momentum takes the buffer's mean. Momentum on each stale arrival would diverge.

Documented as costlier in loss: on small models trained from scratch 9 to 28 % (training/README.md).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

import numpy as np

from training.merge import weighted_mean
from training.outer import OuterRule, fragment_digest
from training.outer_fragment import OwnedFragment, Received
from training.strategies.diloco import Diloco

_BUFFER: Final = "buffer"
# A contribution staler than this is worth less than the noise it brings: it goes to the carry.
_OFFERS_MAX: Final = 8


class DelayedNesterov(Diloco):
    """Each arrival counts at once, momentum every N-th time."""

    extras = (_BUFFER,)
    deals_apart = True
    waits = False
    offers = _OFFERS_MAX

    def __init__(self, rule: OuterRule, *, delay: int) -> None:
        """Step by `rule`, with momentum every `delay` rounds."""
        super().__init__(rule)
        self._delay = delay

    def begin(self, owned: OwnedFragment, *, joined: bool) -> None:
        """Start with an empty buffer where the state has none."""
        owned.extra.setdefault(_BUFFER, np.zeros_like(owned.theta))

    def expect(self, extras: Collection[str]) -> None:
        """Expect nothing: the buffer is always there."""

    def merge(self, owned: OwnedFragment, received: Sequence[Received], round_number: int) -> None:
        """Apply each arrival's share. A round counts as one arrival of the mean of its entries, times their number."""
        arrivals = weighted_mean((each.weight, each.values) for each in received)
        arrivals *= np.float32(len(received))
        rate, momentum, delay = (
            np.float32(self.rule.learning_rate),
            np.float32(self.rule.momentum),
            np.float32(self._delay),
        )
        arrivals /= delay
        owned.theta = owned.theta - rate * arrivals
        buffer = owned.extra[_BUFFER] + arrivals
        if round_number % self._delay == 0:
            owned.velocity = momentum * owned.velocity
            owned.velocity += buffer
            owned.theta -= rate * (momentum * owned.velocity)
            buffer = np.zeros_like(buffer)
        owned.extra[_BUFFER] = buffer

    def digest(self, owned: OwnedFragment) -> bytes:
        """Return the digest of parameters, velocity and buffer."""
        return fragment_digest(owned.theta, owned.velocity, owned.extra[_BUFFER])
