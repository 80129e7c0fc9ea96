"""Keeping a site's egress within the job's cap, by its own choice of codec: each payload names its codec.

A pure rule. It looks at what was posted so far and at what is left to do, and takes the least lossy codec, from the plan's own on,
with which the rest fits. Every change is logged with its reason.
"""

from __future__ import annotations

from typing import Final

from training.spec import Codec
from training.throughput import BYTES_PER_PARAMETER, CODEC_RATIOS

# From the least to the most lossy of those that need no other outer step.
LADDER: Final[tuple[Codec, ...]] = ("fp32", "bf16", "int8", "int4", "topk2")
_BYTES_PER_GB: Final = 1e9


def affordable_codec(
    planned: Codec, max_egress_gb: float | None, *, posted_bytes: int, elements_left: float
) -> tuple[Codec, str]:
    """Return the codec of the next contribution and why, in a sentence; the reason is empty where it is the plan's.

    `elements_left` counts the values of all contributions that this site still has to make. Where not even the most compressed
    codec fits, that one is taken: a job is not stopped in the middle.
    """
    if max_egress_gb is None:
        return planned, ""
    left_bytes = max_egress_gb * _BYTES_PER_GB - posted_bytes
    start = LADDER.index(planned) if planned in LADDER else len(LADDER)
    choices = LADDER[start:] or (planned,)
    for codec in choices:
        needed = elements_left * BYTES_PER_PARAMETER / CODEC_RATIOS[codec]
        if needed <= left_bytes:
            break
    if codec == planned:
        return planned, ""
    reason = (
        f"{codec} instead of {planned}: {left_bytes / _BYTES_PER_GB:.3g} GB of the {max_egress_gb:g} GB egress are left, "
        f"and the rest of the job needs {needed / _BYTES_PER_GB:.3g} GB with it"
    )
    return codec, reason
