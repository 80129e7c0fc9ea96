"""Settlement: from a term's prices and a metered delivery to postings that balance.

For every settlement, in integers,

    charge + equity drawn = payouts + link revenue + fee          (invariant 14)

The charge and every payout round down; what remains is the fee. The market's equity is drawn
only for what the charge does not cover, and the charge never exceeds what is left of the term's
reservation: a delivery beyond it is cut for everyone in proportion.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pricing.errors import QuantityError, SettlementError
from pricing.money import (
    BYTES_PER_GB,
    MILLISECONDS_PER_HOUR,
    SECONDS_PER_HOUR,
    Micros,
    cost_micros,
    divide_up,
    egress_micros,
    rate_micros,
)


@dataclass(frozen=True, slots=True)
class PoolTerms:
    """GPUs of one pool as sold: what the buyer pays and the site gets per GPU-hour."""

    pool_id: str
    site_id: str
    gpus: int
    price_micros_per_gpu_hour: int
    payout_micros_per_gpu_hour: int


@dataclass(frozen=True, slots=True)
class LinkTerms:
    """A directed link as sold: rent by the hour, egress by the byte, both to `from_site`.

    `egress_bytes_per_s` is the predicted rate that bounds the reservation.
    """

    from_site: str
    to_site: str
    rent_micros_per_hour: int
    egress_price_micros_per_gb: int
    egress_bytes_per_s: int


@dataclass(frozen=True, slots=True)
class Terms:
    """The price of a term: rows, the uplift per hour that market equity adds, the premium that its buyer adds.

    A premium is what a pay-as-bid market charges beyond its prices (`pricing.payments`); it goes to the fee.
    """

    pools: Sequence[PoolTerms]
    links: Sequence[LinkTerms] = ()
    uplift_micros_per_hour: int = 0
    premium_micros_per_hour: int = 0

    @property
    def gross_micros_per_hour(self) -> int:
        """GPUs and link rent per hour at the market's prices."""
        gpus = sum(row.price_micros_per_gpu_hour * row.gpus for row in self.pools)
        return gpus + sum(row.rent_micros_per_hour for row in self.links)

    @property
    def charge_micros_per_hour(self) -> int:
        """What the buyer pays of it per hour, before egress."""
        return self.gross_micros_per_hour - self.uplift_micros_per_hour + self.premium_micros_per_hour


@dataclass(frozen=True, slots=True)
class Delivery:
    """What was metered: GPU-milliseconds by pool, bytes by directed link, and the time that it took.

    `rented_ms` says for how long each directed link was rented, where it was not `elapsed_ms` for
    all: a site's own report covers the links that leave it, so that rent is not counted twice.
    """

    gpu_ms: Mapping[str, int]
    elapsed_ms: int = 0
    egress_bytes: Mapping[tuple[str, str], int] | None = None
    rented_ms: Mapping[tuple[str, str], int] | None = None

    def rented_ms_of(self, link: LinkTerms) -> int:
        """Return for how long a directed link was rented."""
        if self.rented_ms is None:
            return self.elapsed_ms
        return self.rented_ms.get((link.from_site, link.to_site), 0)


@dataclass(frozen=True, slots=True)
class Settlement:
    """Who pays and who gets; `shortfall_micros` is what sites miss because equity ran out."""

    charge_micros: Micros
    equity_drawn_micros: Micros
    payouts: dict[str, int]
    link_revenue: dict[str, int]
    fee_micros: Micros
    shortfall_micros: Micros

    def __post_init__(self) -> None:
        """Refuse to exist out of balance."""
        given = self.charge_micros + self.equity_drawn_micros
        taken = sum(self.payouts.values()) + sum(self.link_revenue.values()) + self.fee_micros
        if given != taken or min(self.charge_micros, self.equity_drawn_micros, self.fee_micros) < 0:
            message = (
                f"given {given}, taken {taken}, fee {self.fee_micros}: report this as a defect of pricing.settlement"
            )
            raise SettlementError(message)


def reservation_micros(terms: Terms, term_s: int) -> Micros:
    """Return the most that a term can cost: price x GPUs x term and the predicted egress, rounded up."""
    charge_rate = terms.charge_micros_per_hour
    egress = sum(
        divide_up(row.egress_bytes_per_s * term_s * row.egress_price_micros_per_gb, BYTES_PER_GB) for row in terms.links
    )
    return Micros(divide_up(charge_rate * term_s, SECONDS_PER_HOUR) + egress)


def settle(terms: Terms, delivery: Delivery, *, reservation_left_micros: int, equity_left_micros: int) -> Settlement:
    """Return the postings for a delivery under a term's prices.

    The buyer's discount is the uplift's share of the gross rate, its premium a share on top. Raises QuantityError where the
    delivery names a pool or a link that the terms do not have.
    """
    _refuse_strangers(terms, delivery)
    egress = delivery.egress_bytes or {}
    payouts = _by_site(
        (row.site_id, cost_micros(row.payout_micros_per_gpu_hour, delivery.gpu_ms.get(row.pool_id, 0)))
        for row in terms.pools
    )
    revenue_rows = [
        (
            row.from_site,
            rate_micros(row.rent_micros_per_hour, delivery.rented_ms_of(row)),
            egress_micros(row.egress_price_micros_per_gb, egress.get((row.from_site, row.to_site), 0)),
        )
        for row in terms.links
    ]
    link_revenue = _by_site((site, rent + sent) for site, rent, sent in revenue_rows)
    charge = _metered_charge(terms, delivery) + sum(sent for _, _, sent in revenue_rows)
    charge, payouts, link_revenue = _within(reservation_left_micros, charge, payouts, link_revenue)
    return _balance(charge, payouts, link_revenue, equity_left_micros)


def _metered_charge(terms: Terms, delivery: Delivery) -> int:
    """Return the charge for GPUs and rent: the exact sum times what is charged of the gross rate, rounded down once."""
    gross = sum(row.price_micros_per_gpu_hour * delivery.gpu_ms.get(row.pool_id, 0) for row in terms.pools)
    gross += sum(row.rent_micros_per_hour * delivery.rented_ms_of(row) for row in terms.links)
    gross_rate = terms.gross_micros_per_hour
    if gross_rate == 0:
        return 0
    return gross * terms.charge_micros_per_hour // (gross_rate * MILLISECONDS_PER_HOUR)


def _within(
    limit: int, charge: int, payouts: dict[str, int], link_revenue: dict[str, int]
) -> tuple[int, dict[str, int], dict[str, int]]:
    """Cut a charge to what its reservation has left, and everyone's share of it alike."""
    if charge <= limit:
        return charge, payouts, link_revenue
    left = max(0, limit)
    return left, _scaled(payouts, left, charge), _scaled(link_revenue, left, charge)


def _balance(charge: int, payouts: dict[str, int], link_revenue: dict[str, int], equity_left: int) -> Settlement:
    due = sum(payouts.values()) + sum(link_revenue.values())
    drawn = min(max(0, due - charge), max(0, equity_left))
    shortfall = max(0, due - charge - drawn)
    if shortfall:
        payouts = _scaled(payouts, due - shortfall, due)
        link_revenue = _scaled(link_revenue, due - shortfall, due)
    paid = sum(payouts.values()) + sum(link_revenue.values())
    return Settlement(
        charge_micros=Micros(charge),
        equity_drawn_micros=Micros(drawn),
        payouts=payouts,
        link_revenue=link_revenue,
        fee_micros=Micros(charge + drawn - paid),
        shortfall_micros=Micros(shortfall),
    )


def _scaled(amounts: dict[str, int], numerator: int, denominator: int) -> dict[str, int]:
    return {site: amount * numerator // denominator for site, amount in amounts.items()}


def _by_site(amounts: Iterable[tuple[str, int]]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for site, amount in amounts:
        totals[site] = totals.get(site, 0) + amount
    return dict(sorted(totals.items()))


def _refuse_strangers(terms: Terms, delivery: Delivery) -> None:
    strangers = set(delivery.gpu_ms) - {row.pool_id for row in terms.pools}
    links = (set(delivery.egress_bytes or {}) | set(delivery.rented_ms or {})) - {
        (row.from_site, row.to_site) for row in terms.links
    }
    if strangers or links:
        message = (
            f"the delivery names {sorted(strangers)} {sorted(links)}, which the terms do not price: refuse the report"
        )
        raise QuantityError(message)
