"""What a site may offer is bounded, so that no offer can make a round impossible."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from broker.allocation.instance import RATE_MICROS_PER_HOUR_MAX
from broker.allocation.snapshot import BITS_PER_S_MAX, FLOPS_PER_S_MAX
from sites.protocol import LinkOffer, PoolOffer


@pytest.mark.parametrize(
    ("ask", "flops_per_s"),
    [(RATE_MICROS_PER_HOUR_MAX + 1, None), (0, FLOPS_PER_S_MAX * 2), (0, 0.5), (0, float("inf"))],
)
def test_a_pool_beyond_what_a_snapshot_holds_is_refused(ask: int, flops_per_s: float | None) -> None:
    with pytest.raises(ValidationError):
        PoolOffer(gpu_type="A100", gpu_ids=(), ask_micros_per_gpu_hour=ask, flops_per_s=flops_per_s)


@pytest.mark.parametrize("bandwidth", [BITS_PER_S_MAX * 2, 0.5, float("inf")])
def test_a_link_beyond_what_a_snapshot_holds_is_refused(bandwidth: float) -> None:
    with pytest.raises(ValidationError):
        LinkOffer(target="visby", bandwidth_bits_per_s=bandwidth, delay_s=0.01)
