"""The outer optimizer: what a site does with the merged pseudo-gradient, and the hash that proves it.

DiLoCo's Nesterov step (arXiv 2311.08105): v <- mu v + D, theta <- theta - eta (D + mu v), in
float32 with each operation rounded separately, as in `training.merge`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from training.codecs import Values
from training.exchange import SampleRange
from training.spec import SyncPlan


@dataclass(frozen=True, slots=True)
class OuterRule:
    """The two numbers of an outer step."""

    learning_rate: float
    momentum: float


PLAIN: Final = OuterRule(learning_rate=1.0, momentum=0.0)
_PLAN_DEFAULTS: Final = OuterRule(
    learning_rate=SyncPlan.model_fields["outer_learning_rate"].default,
    momentum=SyncPlan.model_fields["outer_momentum"].default,
)


def outer_rule(plan: SyncPlan) -> OuterRule:
    """Return the step that `plan` asks for.

    With topk2 and both numbers at the plan's defaults the step is plain: the decayed carry takes
    momentum's part (arXiv 2508.15706). Any other pair is taken as said.
    """
    asked = OuterRule(plan.outer_learning_rate, plan.outer_momentum)
    if plan.codec == "topk2" and asked == _PLAN_DEFAULTS:
        return PLAIN
    return asked


def outer_step(theta: Values, velocity: Values, merged: Values, rule: OuterRule) -> tuple[Values, Values]:
    """Return the parameters and velocity after one step along `merged` = theta - mean of theta_m."""
    if rule.momentum == 0:
        velocity, direction = np.zeros_like(velocity), merged
    else:
        momentum = np.float32(rule.momentum)
        velocity = momentum * velocity
        velocity += merged
        direction = momentum * velocity
        direction += merged
    return theta - np.float32(rule.learning_rate) * direction, velocity


def fragment_digest(*parts: Values) -> bytes:
    """Return the SHA-256 of one fragment's outer state (parameters, velocity, …), as little-endian float32."""
    digest = hashlib.sha256()
    for values in parts:
        digest.update(np.ascontiguousarray(values, dtype="<f4").data)
    return digest.digest()


def state_hash(layout: str, digests: Sequence[bytes], done: Sequence[SampleRange]) -> str:
    """Return the hash of a whole outer state: its layout, its fragments in order, its done samples."""
    head = json.dumps({"layout": layout, "done": [[each.start, each.stop] for each in done]}, separators=(",", ":"))
    digest = hashlib.sha256(b"hansa outer state 1\n" + head.encode() + b"\n")
    for fragment in digests:
        digest.update(fragment)
    return digest.hexdigest()
