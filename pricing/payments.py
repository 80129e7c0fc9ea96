"""Payment rules: what buyers pay for the same placements, and what they would have paid under another rule.

A market charges by one of two rules (`PaymentRule`, an admin's choice that each round's snapshot holds):

* *uniform*: the price of what is used, never above the value (the default).
* *pay as bid*: the whole value. Sites get their price; the rest is the market's fee.

The functions over `Trade` answer an auditor's question, from a cleared round's figures alone: what would buyers
pay under each rule, and so how much could a buyer gain by shading its bid?

* *Threshold* (Parkes, Kalagnanam and Eso 2001): value less a discount. VCG's discount of a buyer
  is what the others would lose without it, W - W_without. All of them together may exceed what
  the round's surplus can pay, so each is cut by the same amount C, the least that fits: the
  largest discounts, where shading pays most, are honoured most. Computed as an audit, never paid.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from pricing.errors import QuantityError


class PaymentRule(enum.StrEnum):
    """What buyers pay. Placements, prices and what sites get are the same under either."""

    UNIFORM = "uniform"
    PAY_AS_BID = "pay_as_bid"


def premium_micros_per_hour(rule: PaymentRule, *, gross: int, charge_max: int) -> int:
    """Return what a buyer pays per hour beyond the market's prices: up to its value where the rule is pay-as-bid.

    `gross` is what GPUs and link rent cost at the prices, `charge_max` the most that the buyer may be charged.
    """
    return max(0, charge_max - gross) if rule is PaymentRule.PAY_AS_BID else 0


@dataclass(frozen=True, slots=True)
class Trade:
    """One placement in micro-credits per hour: its value net of egress, its price, the sites' asks."""

    job_id: str
    value: int
    gross: int
    asks: int


def uniform(trades: list[Trade]) -> dict[str, int]:
    """Return what each buyer pays at the published prices: never more than its value."""
    return {trade.job_id: min(trade.gross, max(0, trade.value)) for trade in trades}


def pay_as_bid(trades: list[Trade]) -> dict[str, int]:
    """Return what each buyer pays where bids are taken at their word."""
    return {trade.job_id: max(0, trade.value) for trade in trades}


def threshold(trades: list[Trade], vcg_discounts: Mapping[str, int]) -> dict[str, int]:
    """Return what each buyer pays under the Threshold rule, never below what the sites ask.

    `vcg_discounts` are W - W_without by job. Raises QuantityError where one is negative or missing.
    """
    wanted = {}
    for trade in trades:
        discount = vcg_discounts.get(trade.job_id, -1)
        if discount < 0:
            message = (
                f"job {trade.job_id} has no VCG discount, or a negative one; compute W - W_without for every trade"
            )
            raise QuantityError(message)
        wanted[trade.job_id] = min(discount, max(0, trade.value - trade.asks))
    surplus = sum(max(0, trade.value - trade.asks) for trade in trades)
    cut = threshold_cut(list(wanted.values()), surplus)
    return {trade.job_id: max(0, trade.value) - max(0, wanted[trade.job_id] - cut) for trade in trades}


def threshold_cut(discounts: list[int], surplus: int) -> int:
    """Return the least C >= 0 with sum max(0, discount - C) <= surplus."""
    if sum(discounts) <= surplus:
        return 0
    descending = sorted(discounts, reverse=True)
    above = 0
    for count, discount in enumerate(descending, start=1):
        above += discount
        cut = -(-(above - surplus) // count)
        following = descending[count] if count < len(descending) else 0
        if cut >= following:
            return cut
    return descending[0]


def shading_gain(paid: Mapping[str, int], threshold_paid: Mapping[str, int]) -> dict[str, int]:
    """Return by how much each buyer pays more than under the Threshold rule, 0 where it pays less."""
    return {job_id: max(0, amount - threshold_paid[job_id]) for job_id, amount in paid.items()}
