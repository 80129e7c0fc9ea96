"""Whether the prices are fair: what each site earns for joining, and what anyone forgoes.

Both come from the duals of the allocation LP and go into a clearing's certificate.

* Paying each site the rent of its own capacity is the Owen point of the linear production game
  (Owen 1975, Mathematical Programming 9:358-370): it is in the core of the LP's game, so no group
  of sites earns more by leaving.
* With whole GPUs, prices cannot support every decision. Regret is what a job forgoes against its
  best configuration at these prices, slack is unsold capacity at a price above the ask. Together
  they are exactly what the bound exceeds the welfare by.

Beside the Owen point stands the Shapley value: it also pays sites that are slack now for what they
add in some order of joining, but it need not be in the core.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb, sqrt


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


def core_slack(values: Mapping[int, float], payoffs: Sequence[float]) -> float:
    """Return the least that any listed coalition gets above what it could get alone.

    `values` maps coalitions, as bit masks of players, to their value alone. Below 0, a coalition
    would rather leave; for the Owen point of a linear production game it never is.
    """
    return min((_sum_over(mask, payoffs) - value for mask, value in values.items() if mask), default=0.0)


def shapley_values(values: Sequence[float]) -> tuple[float, ...]:
    """Return each player's Shapley value of the game `values[mask]`, exactly.

    The mean of what a player adds over all orders of joining (Shapley 1953). Raises ValueError
    where the game does not have a power of two of coalitions.
    """
    players = len(values).bit_length() - 1
    if len(values) != 1 << players:
        raise ValueError(f"a game of n players has 2^n coalitions, not {len(values)}; give one value for each")
    weights = [1.0 / (players * comb(players - 1, size)) for size in range(players)]
    shares = [0.0] * players
    for mask, before in enumerate(values):
        weight = weights[mask.bit_count()] if mask.bit_count() < players else 0.0
        for player in range(players):
            if not mask >> player & 1:
                shares[player] += weight * (values[mask | 1 << player] - before)
    return tuple(shares)


def sampled_shapley(
    value: Callable[[int], float], players: int, orders: Iterable[Sequence[int]]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return Shapley values estimated from orders of joining, and their standard errors.

    `value` gives a coalition's value by its bit mask; at least two orders make an error.
    """
    added: list[list[float]] = [[] for _ in range(players)]
    for order in orders:
        mask, before = 0, value(0)
        for player in order:
            mask |= 1 << player
            after = value(mask)
            added[player].append(after - before)
            before = after
    means = tuple(sum(row) / len(row) for row in added)
    errors = tuple(
        sqrt(sum((each - mean) ** 2 for each in row) / max(1, len(row) - 1) / len(row))
        for row, mean in zip(added, means, strict=True)
    )
    return means, errors


def division_distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Return how far two divisions of the same total are apart: half the L1 distance over the total."""
    total = sum(one)
    return 0.0 if total == 0 else sum(abs(a - b) for a, b in zip(one, other, strict=True)) / 2 / abs(total)


def _sum_over(mask: int, payoffs: Sequence[float]) -> float:
    return sum(payoff for player, payoff in enumerate(payoffs) if mask >> player & 1)
