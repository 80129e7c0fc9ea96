"""Whether the prices are fair: what each site earns for joining, and what anyone forgoes.

Both come from the duals of the allocation LP and go into a clearing's certificate.

* Paying each site the rent of its own capacity is the Owen point of the linear production game
  (Owen 1975, Mathematical Programming 9:358-370): it is in the core of the LP's game, so no group
  of sites earns more by leaving.
* With whole GPUs, prices cannot support every decision. Regret is what a job forgoes against its
  best configuration at these prices, slack is unsold capacity at a price above the ask. Together
  they are exactly what the bound exceeds the welfare by.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Resource:
    """Capacity that a site brings: GPUs of a pool (per GPU-hour) or a link (per share-hour).

    `reserve_micros` is what a unit must at least earn: the ask, 0 for a link.
    """

    site_id: str
    price_micros: int
    reserve_micros: int
    capacity: int

    @property
    def rent_micros_per_hour(self) -> int:
        """What the whole capacity earns above its reserve at the price."""
        return (self.price_micros - self.reserve_micros) * self.capacity


@dataclass(frozen=True, slots=True)
class LostOpportunity:
    """The four sums of the identity bound - welfare = regret + slack, in micro-credits per hour."""

    bound_micros_per_hour: int
    welfare_micros_per_hour: int
    regret_sum_micros_per_hour: int
    slack_sum_micros_per_hour: int

    @property
    def gap_micros_per_hour(self) -> int:
        """How much better the best allocation could be, at most."""
        return self.bound_micros_per_hour - self.welfare_micros_per_hour

    @property
    def identity_holds(self) -> bool:
        """Whether regret and slack explain the gap to the last micro-credit."""
        return self.gap_micros_per_hour == self.regret_sum_micros_per_hour + self.slack_sum_micros_per_hour


def owen_transfers(resources: Iterable[Resource]) -> dict[str, int]:
    """Return each site's Owen transfer per hour: the rent of the capacity that it brings."""
    transfers: defaultdict[str, int] = defaultdict(int)
    for resource in resources:
        transfers[resource.site_id] += resource.rent_micros_per_hour
    return dict(sorted(transfers.items()))
