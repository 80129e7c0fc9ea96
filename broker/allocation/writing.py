"""Write a solved round down: placements, prices, certificate, and a sentence for every job.

Takes what `broker.allocation.solver` decided in numbers; everything here is exact integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from broker.allocation.clearing import (
    UNPROVED,
    Certificate,
    Clearing,
    Effort,
    LinkCharge,
    LinkPrice,
    Placement,
    PoolCharge,
    TenantPrice,
    Transfer,
)
from broker.allocation.explain import unplaced, why_placed
from broker.allocation.instance import BUNDLE, NONE, Choice, Instance, Int
from broker.allocation.oracle import dual_exact, exact_dot
from broker.allocation.rents import costs, rents, rounding, supplied
from broker.allocation.solver import Outcome, best_columns, held_columns, used_rows
from broker.allocation.tables import PAYMENT_RULES
from broker.allocation.won import Market, Won
from pricing.asks import BASIS_POINTS, Ask
from pricing.fairness import LostOpportunity, Resource, owen_transfers
from pricing.money import BYTES_PER_GB, SECONDS_PER_HOUR, divide_up
from pricing.payments import PaymentRule, premium_micros_per_hour
from pricing.settlement import LinkTerms, PoolTerms, Terms, reservation_micros

# The proved gap between the published bound and the LP's own optimum, relative, beside what
# rounding prices to whole micro-credits costs.
LP_GAP_MAX: Final = 1e-6
# A job is unsupported where it forgoes more than this share of its best surplus.
UNSUPPORTED_SHARE: Final = 100


def written(market: Market, outcome: Outcome, *, round_number: int, snapshot_digest: str, solver: str) -> Clearing:
    """Return the clearing of a solved round."""
    prices, choice = outcome.prices, outcome.choice
    columns = [
        market.told(job, int(choice.form[job]), int(choice.item[job]), int(choice.place[job]))
        for job in np.flatnonzero(choice.form != NONE).tolist()
    ]
    now = [column for column in columns if column.first_slot == 0]
    later = [column for column in columns if column.first_slot > 0]
    used = used_rows(market.instance, choice)
    books = _Books(market, prices, used, choice)
    placements = [books.placement(column) for column in now]
    names = market.names
    pools = market.instance.pool_count
    return Clearing(
        round_number=round_number,
        snapshot_digest=snapshot_digest,
        status=outcome.status,
        solver=solver,
        prices={pool_id: int(prices[pool]) for pool, pool_id in enumerate(names.pools)},
        later_prices=tuple(
            {pool_id: int(prices[slot * pools + pool]) for pool, pool_id in enumerate(names.pools)}
            for slot in range(1, market.instance.slots)
        ),
        tenant_prices=books.tenant_prices(),
        link_prices=books.link_prices(),
        placements=tuple(sorted(placements, key=lambda placement: placement.job_id)),
        unplaced=tuple(sorted(unplaced(market, outcome, now, later), key=lambda row: row.job_id)),
        transfers=books.transfers(),
        certificate=books.certificate(outcome, now),
        effort=Effort(
            columns=outcome.columns,
            lp_rounds=outcome.lp_rounds,
            links_priced=int(np.count_nonzero(prices[books.link_rows])),
            prices_settled=outcome.prices_settled,
            repair_columns=outcome.repair_columns,
            repair_nodes=outcome.repair_nodes,
            patterns_left_out=market.compiled.spans_left_out,
        ),
    )


def placement_at(market: Market, prices: Int, choice: Choice) -> Placement:
    """Return the placement of the only job of a market in its column, at given prices."""
    column = market.told(0, int(choice.form[0]), int(choice.item[0]), int(choice.place[0]))
    return _Books(market, prices, used_rows(market.instance, choice), choice).placement(column)


class _Books:
    """What rows cost, supply and hold at the published prices."""

    def __init__(self, market: Market, prices: Int, used: Int, choice: Choice) -> None:
        self.market, self.prices, self.used = market, prices, used
        self.instance, self.names = market.instance, market.names
        first = self.instance.links.first_row
        self.link_rows = np.arange(first, first + len(self.instance.links.from_site))
        self.fee = int(market.tables.market("fee_basis_points"))
        self.rule = PaymentRule(PAYMENT_RULES[market.tables.market("payment_rule")])
        self.asks = [self._ask(pool) for pool in range(self.instance.pool_count)]
        # Jobs inside their term stay at their locked price even where this round's buys fewer GPUs.
        self.sold = supplied(self.instance, prices)
        self.staying = used_rows(self.instance, _staying(self.instance, choice))

    def _sold_of(self, pool: int) -> int:
        """Return how many GPUs of a pool are sold at this round's price: a lease that stays takes the dearest."""
        return min(int(self.used[pool]), int(self.sold[pool]))

    def _ask(self, pool: int) -> Ask:
        rows = self.instance.rows
        steps = range(int(rows.step_start[pool]), int(rows.step_start[pool + 1]))
        curve = [(int(rows.step_units[step]), int(rows.step_cost[step])) for step in steps]
        return Ask(self.names.pools[pool], curve[0][1], flat_gpus=curve[0][0], steps=tuple(curve[1:]))

    def placement(self, column: Won) -> Placement:
        """Return a column as a placement with its rows of money."""
        pools, links = self._pool_charges(column), self._link_charges(column)
        uplift, premium = column.uplift(self.market, self.prices), self.premium(column)
        terms = _terms(pools, links, uplift, premium)
        data = sum(
            divide_up(row.bytes_per_s * column.term_s * row.price_micros_per_gb, BYTES_PER_GB) for row in column.data
        )
        tables = self.market.tables
        return Placement(
            job_id=self.names.jobs[column.job],
            job_version=int(tables["jobs.version"][column.job]),
            action=column.action,
            configuration=column.configuration,
            value_micros_per_hour=column.value,
            pools=pools,
            links=links,
            data=column.data,
            uplift_micros_per_hour=uplift,
            premium_micros_per_hour=premium,
            term_s=column.term_s,
            reservation_micros=reservation_micros(terms, column.term_s) + data,
            samples_per_s=column.configuration.samples_per_s,
            why=why_placed(self.market, self.prices, column),
        )

    def premium(self, column: Won) -> int:
        """Return what a column's buyer pays per hour beyond the prices; a kept one goes on as it was sold."""
        if column.action == "keep":
            return 0
        gross = column.gross(self.market, self.prices)
        return premium_micros_per_hour(self.rule, gross=gross, charge_max=column.charge_max)

    def _pool_charges(self, column: Won) -> tuple[PoolCharge, ...]:
        """Return the rows of a placement: a kept one at its locked prices, any other at the market's."""
        locked = self.market.locked_prices(column.job) if column.action == "keep" else {}
        rows = []
        for part, (pool, gpus) in zip(column.configuration.parts, column.pools, strict=True):
            if column.action == "keep":
                price = locked.get(part.pool_id, 0)
                payout = price * (BASIS_POINTS - self.fee) // BASIS_POINTS
            else:
                price = int(self.prices[pool])
                payout = self.asks[pool].payout_micros_per_gpu_hour(price, self.fee, self._sold_of(pool))
            rows.append(
                PoolCharge(
                    pool_id=part.pool_id,
                    site_id=part.site_id,
                    gpus=gpus,
                    price_micros_per_gpu_hour=price,
                    payout_micros_per_gpu_hour=payout,
                )
            )
        return tuple(rows)

    def _link_charges(self, column: Won) -> tuple[LinkCharge, ...]:
        return tuple(
            LinkCharge(
                from_site=self.names.links[link][0],
                to_site=self.names.links[link][1],
                shares=shares,
                rent_micros_per_hour=0 if column.action == "keep" else int(self.prices[self.link_rows[link]]) * shares,
                egress_bytes_per_s=sent,
                egress_price_micros_per_gb=int(self.instance.links.egress_micros_per_gb[link]),
            )
            for link, shares, sent in column.links
        )

    def link_prices(self) -> tuple[LinkPrice, ...]:
        """Return the links that cost something."""
        return tuple(
            LinkPrice(from_site=pair[0], to_site=pair[1], price_micros_per_share_hour=int(self.prices[row]))
            for pair, row in sorted(zip(self.names.links, self.link_rows.tolist(), strict=True))
            if self.prices[row]
        )

    def tenant_prices(self) -> tuple[TenantPrice, ...]:
        """Return what budgets and floors cost at the margin, where they cost anything."""
        found = []
        for tenant_id, (budget, floor) in self.market.tenant_rows():
            price = int(self.prices[budget]) if budget >= 0 else 0
            subsidy = int(self.prices[floor]) if floor >= 0 else 0
            short = max(0, int(self.used[floor] - self.instance.rows.base[floor])) if floor >= 0 else 0
            if price or subsidy or short:
                found.append(
                    TenantPrice(
                        tenant_id=tenant_id,
                        budget_price_micros_per_share_hour=price,
                        floor_price_micros_per_gpu_hour=subsidy,
                        floor_gpus_short=short,
                    )
                )
        return tuple(found)

    def transfers(self) -> tuple[Transfer, ...]:
        """Return what each site's capacity and links are worth now: the rent of every step below its price."""
        sites = self.names.sites
        rent = rents(self.instance, self.prices)
        pools = self.instance.pool_count
        resources = [Resource(self.names.pool_parts[pool][0], int(rent[pool]), 0, 1) for pool in range(pools)] + [
            Resource(sites[int(origin)], int(rent[row]), 0, 1)
            for origin, row in zip(self.instance.links.from_site, self.link_rows, strict=True)
        ]
        transfers = owen_transfers(resources)
        return tuple(Transfer(site_id=site_id, rent_micros_per_hour=amount) for site_id, amount in transfers.items())

    def certificate(self, outcome: Outcome, now: Sequence[Won]) -> Certificate:
        """Return the proof, every figure in exact integers."""
        instance, prices = self.instance, self.prices
        top = best_columns(instance, prices)
        surplus = _surplus(instance, outcome.choice, prices)
        regret = np.asarray(top.surplus, dtype=np.int64) - surplus
        rent, cost = rents(instance, prices), costs(instance, self.used)
        slack = rent - (prices * self.used - cost)
        lost = LostOpportunity(
            bound_micros_per_hour=dual_exact(instance, prices, top) if instance.row_count else 0,
            welfare_micros_per_hour=outcome.welfare,
            regret_sum_micros_per_hour=exact_sum(regret),
            slack_sum_micros_per_hour=exact_sum(slack),
        )
        paying = [column for column in now if column.action != "keep"]
        uplifts = [column.uplift(self.market, prices) for column in paying]
        charges = [
            column.gross(self.market, prices) - uplift + self.premium(column)
            for column, uplift in zip(paying, uplifts, strict=True)
        ]
        drawn = sum(
            divide_up(uplift * column.term_s, SECONDS_PER_HOUR) for column, uplift in zip(paying, uplifts, strict=True)
        )
        floors = [floor for _, (_, floor) in self.market.tenant_rows() if floor >= 0]
        lp = outcome.lp_objective
        return Certificate(
            bound_micros_per_hour=lost.bound_micros_per_hour,
            welfare_micros_per_hour=lost.welfare_micros_per_hour,
            gap_micros_per_hour=max(0, lost.gap_micros_per_hour),
            lp_objective_micros_per_hour=lp,
            regret_sum_micros_per_hour=lost.regret_sum_micros_per_hour,
            slack_sum_micros_per_hour=lost.slack_sum_micros_per_hour,
            uplift_micros_per_hour=sum(uplifts),
            turnover_micros_per_hour=sum(charges),
            jobs_unsupported=int(np.count_nonzero(regret * UNSUPPORTED_SHARE > np.maximum(top.surplus, 1))),
            floors_shortfall_micros_per_hour=exact_sum(cost[floors]),
            checks={
                "identity": lost.identity_holds,
                "bound_at_least_welfare": lost.gap_micros_per_hour >= 0,
                "lp_gap_proved": outcome.status in UNPROVED
                or abs(lost.bound_micros_per_hour - lp) <= LP_GAP_MAX * abs(lp) + rounding(instance, prices),
                "placements_fit": bool((self.used <= np.maximum(self.sold, self.staying)).all()),
                "buyers_at_most_value": all(
                    charge <= max(0, column.value - column.egress)
                    for column, charge in zip(paying, charges, strict=True)
                ),
                "sites_at_least_ask": all(
                    prices[pool] >= ask.marginal_micros_per_gpu_hour(self._sold_of(pool))
                    for pool, ask in enumerate(self.asks)
                ),
                "uplift_within_equity": drawn <= int(self.market.tables.market("market_equity_micros")),
            },
        )


def exact_sum(amounts: Int) -> int:
    """Return the sum of whole amounts, beyond 2^63 too."""
    return exact_dot(np.asarray(amounts, dtype=np.int64), np.ones(len(amounts), dtype=np.int64))


def _staying(instance: Instance, choice: Choice) -> Choice:
    """Return the part of a choice that is jobs inside their term in their own place."""
    own = instance.jobs.must & (choice.form == BUNDLE) & (choice.item == instance.jobs.own)
    return choice._replace(form=np.where(own, choice.form, NONE).astype(np.int8))


def _surplus(instance: Instance, choice: Choice, prices: Int) -> Int:
    """Return what each job's column leaves it at the prices, 0 without one."""
    surplus = np.zeros(instance.job_count, np.int64)
    if not instance.row_count:
        return surplus
    columns = held_columns(instance, choice)
    surplus[columns.job] = columns.surplus(prices)
    return surplus


def _terms(pools: Sequence[PoolCharge], links: Sequence[LinkCharge], uplift: int, premium: int) -> Terms:
    return Terms(
        pools=[
            PoolTerms(row.pool_id, row.site_id, row.gpus, row.price_micros_per_gpu_hour, row.payout_micros_per_gpu_hour)
            for row in pools
        ],
        links=[
            LinkTerms(
                row.from_site,
                row.to_site,
                row.rent_micros_per_hour,
                row.egress_price_micros_per_gb,
                row.egress_bytes_per_s,
            )
            for row in links
        ],
        uplift_micros_per_hour=uplift,
        premium_micros_per_hour=premium,
    )
