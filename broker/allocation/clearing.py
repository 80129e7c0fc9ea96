"""The clearing: what a round decided, with the proof that it could hardly have decided better.

`broker.allocation.solve` writes it, `broker.allocation.verify` checks it from the snapshot alone,
the broker commits it, and `pricing.settlement` later charges by its rows. All rates are integer
micro-credits per hour.
"""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import Field

from broker.allocation.configuration import Configuration
from broker.allocation.document import Document, Row

CLEARING_VERSION: Final = 2

# optimal: proved within 1e-4 of the best whole placements; feasible: the LP is proved, the gap is
# stated; stopped: a limit cut the LP short, and the bound is what its best prices prove; empty: no
# job could use anything on offer; followed: the last round's prices stand, and no LP was solved.
Status = Literal["optimal", "feasible", "stopped", "empty", "followed"]
# Statuses of rounds whose prices are not proved to be the LP's; their bound holds all the same.
UNPROVED: Final[frozenset[Status]] = frozenset({"stopped", "followed"})
Action = Literal["start", "keep", "renew", "move"]
UnplacedCode = Literal[
    "no_pool",
    "deadline",
    "barred",
    "budget_short",
    "tenant_budget",
    "bid_below_ask",
    "outbid",
    "fragmented",
    "uplift_short",
    "finished",
    "later",
]


class PoolCharge(Row):
    """What one pool's GPUs cost the buyer, and what the site gets, while the term runs.

    `payout_micros_per_gpu_hour` is the price less the market's fee, never below the ask.
    """

    pool_id: str
    site_id: str
    gpus: int = Field(ge=1)
    price_micros_per_gpu_hour: int = Field(ge=0)
    payout_micros_per_gpu_hour: int = Field(ge=0)


class LinkCharge(Row):
    """What one directed link costs the buyer: congestion rent by the hour, egress by the byte.

    Both are revenue of `from_site`, which pays its provider for the egress.
    `egress_bytes_per_s` is predicted and bounds the reservation; charged is what was sent.
    """

    from_site: str
    to_site: str
    shares: int = Field(ge=0, description="ten-thousandths of the link's bandwidth")
    rent_micros_per_hour: int = Field(ge=0)
    egress_bytes_per_s: int = Field(ge=0)
    egress_price_micros_per_gb: int = Field(ge=0)


class DataCharge(Row):
    """What reading a job's data far from its home is predicted to cost: revenue of `from_site`."""

    from_site: str
    to_site: str
    bytes_per_s: int = Field(ge=0, description="predicted, rounded up")
    price_micros_per_gb: int = Field(ge=0)


class LinkPrice(Row):
    """The price of one ten-thousandth of a directed link's bandwidth for an hour."""

    from_site: str
    to_site: str
    price_micros_per_share_hour: int = Field(ge=0)


class TenantPrice(Row):
    """What a tenant's budget and fairness floor cost at the margin.

    `budget_price_micros_per_share_hour` is per ten-thousandth of its budget: what the market
    forgoes because the tenant may not spend more. `floor_price_micros_per_gpu_hour` is the subsidy
    by GPU that its floor gives its jobs in the choice of placements; `floor_gpus_short` is how far
    it stays below.
    """

    tenant_id: str
    budget_price_micros_per_share_hour: int = Field(default=0, ge=0)
    floor_price_micros_per_gpu_hour: int = Field(default=0, ge=0)
    floor_gpus_short: int = Field(default=0, ge=0)


class Placement(Row):
    """A configuration that a job won.

    `value_micros_per_hour` is what the job's predicted progress is worth by its own bid, after
    what a move destroys. The buyer pays the rows of `pools` and `links` less
    `uplift_micros_per_hour`, which market equity adds, and where it pays as bid
    `premium_micros_per_hour` on top, which is the market's fee. `term_s` is how long the price is locked;
    a `keep` goes on under its lease as it stands, its term unchanged. `reservation_micros` is
    the most that the term can cost the buyer.
    """

    job_id: str
    job_version: int
    action: Action
    configuration: Configuration
    value_micros_per_hour: int
    pools: tuple[PoolCharge, ...]
    links: tuple[LinkCharge, ...] = ()
    data: tuple[DataCharge, ...] = ()
    uplift_micros_per_hour: int = Field(default=0, ge=0)
    premium_micros_per_hour: int = Field(default=0, ge=0)
    term_s: int = Field(ge=1)
    reservation_micros: int = Field(ge=0)
    samples_per_s: float = Field(gt=0)
    why: str

    @property
    def charge_micros_per_hour(self) -> int:
        """What the buyer pays per hour: GPUs and link rent, less uplift, plus premium; egress comes by the byte."""
        gross = sum(row.price_micros_per_gpu_hour * row.gpus for row in self.pools)
        rent = sum(row.rent_micros_per_hour for row in self.links)
        return gross + rent - self.uplift_micros_per_hour + self.premium_micros_per_hour


class Unplaced(Row):
    """A job without a placement: the constraint that binds, and what would change it."""

    job_id: str
    code: UnplacedCode
    sentence: str
    bid_needed_micros_per_million_samples: int | None = None
    starts_at_ms: int | None = Field(default=None, description="UTC milliseconds: planned, not promised")
    planned: Configuration | None = None


class Transfer(Row):
    """What a site's capacity and links are worth to the federation (the Owen point)."""

    site_id: str
    rent_micros_per_hour: int = Field(ge=0)


class Certificate(Row):
    """How far the placements can be from the best, provable by anyone who holds the snapshot.

    `bound` is the dual function at the published prices: no allocation of whole GPUs is worth
    more. With exact integers, bound - welfare = regret_sum + slack_sum. `jobs_unsupported` are those
    that would rather have something else at these prices, by more than a hundredth of its worth.
    """

    bound_micros_per_hour: int
    welfare_micros_per_hour: int
    gap_micros_per_hour: int = Field(ge=0)
    lp_objective_micros_per_hour: float
    regret_sum_micros_per_hour: int
    slack_sum_micros_per_hour: int
    uplift_micros_per_hour: int = Field(ge=0)
    turnover_micros_per_hour: int = Field(ge=0)
    jobs_unsupported: int = Field(default=0, ge=0)
    floors_shortfall_micros_per_hour: int = Field(default=0, ge=0)
    checks: dict[str, bool]


class Effort(Row):
    """What the round's solver did, as counts: the same on every replay.

    `prices_settled` is false where the solver refused a step in choosing among equally valid
    price vectors; the prices then hold all the same, but another solver could choose others.
    """

    columns: int = 0
    lp_rounds: int = 0
    links_priced: int = 0
    price_rounds: int = 0
    prices_settled: bool = True
    repair_columns: int = 0
    repair_nodes: int = 0
    patterns_left_out: int = 0


class Clearing(Document):
    """The whole output of a round, in a canonical order: pools, links and jobs by id.

    `later_prices` are those of the slots after now, where the snapshot has a horizon.
    """

    version: Literal[2] = CLEARING_VERSION
    round_number: int
    snapshot_digest: str
    status: Status
    solver: str
    prices: dict[str, int]
    later_prices: tuple[dict[str, int], ...] = ()
    tenant_prices: tuple[TenantPrice, ...] = ()
    link_prices: tuple[LinkPrice, ...] = ()
    placements: tuple[Placement, ...] = ()
    unplaced: tuple[Unplaced, ...] = ()
    transfers: tuple[Transfer, ...] = ()
    certificate: Certificate
    effort: Effort = Effort()

    def spelled(self) -> dict[str, Any]:
        """Return what the canonical JSON says: a premium only where there is one, as in clearings from before it."""
        document = super().spelled()
        for row in document["placements"]:
            if not row["premium_micros_per_hour"]:
                del row["premium_micros_per_hour"]
        return document
