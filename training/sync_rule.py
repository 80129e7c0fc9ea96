"""The arithmetic of choosing a plan between sites, in plain numbers: `training.sync_choice` says it in words.

Floats without objects, so that the market's compiled loops run these same lines and get the same bits.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from training.spec import Codec, Strategy, SyncPlan
from training.throughput import BYTES_PER_PARAMETER


class Way(NamedTuple):
    """A way to keep sites together, and the longest period that its loss bears."""

    strategy: Strategy
    codec: Codec
    period_steps_max: int


# A longer period costs loss: DiLoCo's and Streaming DiLoCo's figures hold to 100 steps (arXiv 2501.18512, Table 5), SparseLoCo's
# carry wants 15 to 50 (arXiv 2508.15706); DiLoCo's own 500 is the last resort.
PERIOD_STEPS_MAX: Final[dict[str, int]] = {"diloco": 100, "streaming": 100, "sparse": 50}
PERIOD_STEPS_LAST: Final = 500
# From the least lossy on.
WAYS: Final = (
    Way("every_step", "fp32", 1),
    Way("diloco", "int8", PERIOD_STEPS_MAX["diloco"]),
    Way("streaming", "int4", PERIOD_STEPS_MAX["streaming"]),
    Way("sparse", "topk2", PERIOD_STEPS_MAX["sparse"]),
    Way("sparse", "topk2", PERIOD_STEPS_LAST),
)
# Below it a period's fixed costs (encoding, one merge on the host) begin to show.
PERIOD_STEPS_MIN: Final = 5
# Fewer rounds leave much of a sparse codec's carry unsent, and give momentum nothing to build on.
ROUNDS_MIN: Final = 10
# Up to five steps of overlap cost no measurable loss (arXiv 2501.18512, 3.3.2).
OVERLAP_STEPS_MAX: Final = 5
_BYTES_PER_GB: Final = 1e9
# Under `auto` a period that differs from this is the tenant's wish; this one leaves it open. A stored plan says no more.
PERIOD_STEPS_OPEN: Final[int] = SyncPlan.model_fields["period_steps"].default


def overlap_steps(round_s: float, step_s: float) -> float:
    """Return the inner steps beside which a streaming round travels."""
    return min(float(OVERLAP_STEPS_MAX), max(1.0, float(math.ceil(round_s / step_s))))


def period_steps(stall_steps: float, groups: float, target: float, period_steps_max: float, steps: float) -> float:
    """Return H, a multiple of the groups: the shortest with which `target` of the time computes, as far as it may be.

    `stall_steps` is what one round waits, in inner steps; the job has `steps` of those.
    """
    wanted = stall_steps * groups * target / (1.0 - target)
    longest = min(period_steps_max, max(1.0, math.floor(steps / ROUNDS_MIN)))
    shortest = max(float(PERIOD_STEPS_MIN), OVERLAP_STEPS_MAX * groups + groups if groups > 1.0 else 1.0)
    return math.ceil(max(1.0, min(longest, max(wanted, shortest))) / groups) * groups


def stated_period_steps(asked: float, groups: float) -> float:
    """Return the tenant's own H as a multiple of the groups."""
    return max(groups, math.floor(asked / groups) * groups)


def overlap_within(overlap: float, period: float, groups: float) -> float:
    """Return an overlap that ends before the next group travels, as in a job of few steps it must."""
    return min(overlap, period / groups - 1.0)


def utilisation(period: float, groups: float, step_s: float, stall_s: float) -> float:
    """Return the share of the time that computes."""
    return period * step_s / (period * step_s + stall_s * groups)


def sent_gb(steps: float, period: float, parameters: float, codec_ratio: float) -> float:
    """Return the GB that a site sends over the whole job."""
    return steps / period * parameters * BYTES_PER_PARAMETER / codec_ratio / _BYTES_PER_GB


def comes_closer(over_gb: float, share: float, best_over_gb: float, best_share: float) -> bool:
    """Say whether a way that will not do beats another: the cap on egress is the tenant's money, so it goes first.

    `over_gb` is the larger of what is sent and the cap, infinite without a cap.
    """
    return over_gb < best_over_gb or (over_gb == best_over_gb and share > best_share)
