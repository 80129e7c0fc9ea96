"""Clear a round: a pure function from a snapshot to a clearing, the same to the bit on every run.

The order of work is the order of this file: open the market, list columns, solve the LP, repair
to whole placements, choose prices, drop what market equity cannot uphold, and write it all down
with a certificate. Nothing reads a clock, a file or a random number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import highspy

from broker.allocation.candidates import Candidate, Column, candidates, worthwhile
from broker.allocation.clearing import (
    Certificate,
    Clearing,
    Effort,
    LinkCharge,
    LinkPrice,
    Placement,
    PoolCharge,
    Transfer,
)
from broker.allocation.explain import unplaced, why_placed
from broker.allocation.market import Market, Pair, open_market
from broker.allocation.model import Solution, build, solve
from broker.allocation.prices import Prices, canonical_prices
from broker.allocation.repair import Repaired, best_surplus, bound, fits, repair, uplift_cost
from broker.allocation.snapshot import Snapshot
from pricing.asks import BASIS_POINTS
from pricing.fairness import LostOpportunity, Resource, owen_transfers
from pricing.settlement import LinkTerms, PoolTerms, Terms, reservation_micros

ALGORITHM: Final = "enumerated-configuration-lp/1"
# The proved gap between the published bound and the LP's own optimum, relative, beside what
# rounding prices to whole micro-credits costs.
LP_GAP_MAX: Final = 1e-6


def clear(snapshot: Snapshot) -> Clearing:
    """Return the clearing of a snapshot.

    Raises broker.allocation.errors.SolverError where the solver gives nothing that stands up to
    our own check; then the round should be recorded as failed and the snapshot kept.
    """
    market = open_market(snapshot)
    looked_at = {job.job_id: candidates(market, job) for job in market.jobs}
    every = [column for found in looked_at.values() for column in worthwhile(found)]
    solution = solve(market, build(market, every))
    duals = _dual_prices(market, solution)
    best = repair(market, every, duals, uplift_limited=False)
    prices = canonical_prices(market, every, solution, best.placed)
    if sum(uplift_cost(prices, column) for column in best.placed) > snapshot.market_equity_micros:
        best = repair(market, every, prices, uplift_limited=True)
    return _written(market, looked_at, every, solution, prices=prices, best=best)


def solver_version() -> str:
    """Return the name under which a clearing can be replayed to the bit."""
    highs = highspy.Highs()  # type: ignore[no-untyped-call]  # highspy's own signature lacks types
    return f"{ALGORITHM} highs/{highs.version()}"


def _dual_prices(market: Market, solution: Solution) -> Prices:
    """Return the LP's own duals as prices: any will do for repair, since any give a bound."""
    return Prices(
        {
            pool_id: pool.ask_micros_per_gpu_hour + int(solution.pool_rents.get(pool_id, 0.0))
            for pool_id, pool in market.pools.items()
        },
        {pair: int(solution.link_rents.get(pair, 0.0)) for pair in market.links},
    )


def _written(
    market: Market,
    looked_at: Mapping[str, Sequence[Candidate]],
    every: Sequence[Column],
    solution: Solution,
    *,
    prices: Prices,
    best: Repaired,
) -> Clearing:
    snapshot = market.snapshot
    placements = tuple(_placement(market, prices, column) for column in best.placed)
    by_id = sorted(placements, key=lambda placement: placement.job_id)
    certificate = _certificate(market, every, solution, prices, best)
    return Clearing(
        round_number=snapshot.round_number,
        snapshot_digest=snapshot.digest(),
        status="empty" if not every else "optimal" if best.optimal else "feasible",
        solver=solver_version(),
        prices=prices.pools,
        link_prices=tuple(
            LinkPrice(from_site=pair[0], to_site=pair[1], price_micros_per_share_hour=price)
            for pair, price in prices.links.items()
            if price
        ),
        placements=tuple(by_id),
        unplaced=tuple(sorted(unplaced(market, looked_at, prices, best.placed), key=lambda row: row.job_id)),
        transfers=_transfers(market, prices),
        certificate=certificate,
        effort=Effort(
            columns=len(every),
            links_priced=sum(1 for price in prices.links.values() if price),
            price_rounds=prices.rounds,
            prices_settled=prices.settled,
            repair_columns=best.columns,
            repair_nodes=best.nodes,
        ),
    )


def _placement(market: Market, prices: Prices, column: Column) -> Placement:
    pools = _pool_charges(market, prices, column)
    links = _link_charges(market, prices, column)
    uplift = prices.uplift(column)
    return Placement(
        job_id=column.job.job_id,
        job_version=column.job.version,
        action=column.action,
        configuration=column.configuration,
        value_micros_per_hour=column.value,
        pools=pools,
        links=links,
        uplift_micros_per_hour=uplift,
        term_s=column.term_s,
        reservation_micros=reservation_micros(_terms(pools, links, uplift), column.term_s),
        samples_per_s=column.configuration.samples_per_s,
        why=why_placed(market, prices, column),
    )


def _pool_charges(market: Market, prices: Prices, column: Column) -> tuple[PoolCharge, ...]:
    """Return the rows of a placement: a kept one at its locked prices, any other at the market's."""
    fee = market.snapshot.fee_basis_points
    rows = []
    for part in column.configuration.parts:
        if column.action == "keep" and column.job.incumbent is not None:
            price = column.job.incumbent.locked_prices.get(part.pool_id, 0)
            payout = price * (BASIS_POINTS - fee) // BASIS_POINTS
        else:
            price = prices.pools[part.pool_id]
            payout = market.asks[part.pool_id].payout_micros_per_gpu_hour(price, fee)
        rows.append(
            PoolCharge(
                pool_id=part.pool_id,
                site_id=part.site_id,
                gpus=part.gpus,
                price_micros_per_gpu_hour=price,
                payout_micros_per_gpu_hour=payout,
            )
        )
    return tuple(rows)


def _link_charges(market: Market, prices: Prices, column: Column) -> tuple[LinkCharge, ...]:
    shares = dict(column.shares)
    return tuple(
        LinkCharge(
            from_site=pair[0],
            to_site=pair[1],
            shares=shares[pair],
            rent_micros_per_hour=0 if column.action == "keep" else prices.links[pair] * shares[pair],
            egress_bytes_per_s=row.bytes_per_s,
            egress_price_micros_per_gb=market.links[pair].egress_price_micros_per_gb,
        )
        for row in column.configuration.traffic
        if (pair := (row.from_site, row.to_site)) in shares
    )


def _terms(pools: Sequence[PoolCharge], links: Sequence[LinkCharge], uplift: int) -> Terms:
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
    )


def _transfers(market: Market, prices: Prices) -> tuple[Transfer, ...]:
    resources = [
        Resource(pool.site_id, prices.pools[pool_id], pool.ask_micros_per_gpu_hour, pool.capacity_gpus)
        for pool_id, pool in market.pools.items()
    ]
    resources += [Resource(pair[0], prices.links[pair], 0, most) for pair, most in market.link_capacity.items()]
    return tuple(
        Transfer(site_id=site_id, rent_micros_per_hour=rent) for site_id, rent in owen_transfers(resources).items()
    )


def _certificate(
    market: Market, every: Sequence[Column], solution: Solution, prices: Prices, best: Repaired
) -> Certificate:
    used: dict[str | Pair, int] = {}
    for column in best.placed:
        uses: list[tuple[str | Pair, int]] = [(part.pool_id, part.gpus) for part in column.configuration.parts]
        for row, use in [*uses, *column.shares]:
            used[row] = used.get(row, 0) + use
    slack = sum(
        (prices.pools[pool_id] - pool.ask_micros_per_gpu_hour) * (pool.capacity_gpus - used.get(pool_id, 0))
        for pool_id, pool in market.pools.items()
    ) + sum(prices.links[pair] * (most - used.get(pair, 0)) for pair, most in market.link_capacity.items())
    surplus = {column.job.job_id: prices.surplus(column) for column in best.placed}
    regret = sum(most - surplus.get(job_id, 0) for job_id, most in best_surplus(market, every, prices).items())
    lost = LostOpportunity(bound(market, every, prices), best.welfare, regret, slack)
    charges = [prices.gross(column) - prices.uplift(column) for column in best.placed if column.action != "keep"]
    lp = solution.objective_micros_per_hour
    return Certificate(
        bound_micros_per_hour=lost.bound_micros_per_hour,
        welfare_micros_per_hour=lost.welfare_micros_per_hour,
        gap_micros_per_hour=max(0, lost.gap_micros_per_hour),
        lp_objective_micros_per_hour=lp,
        regret_sum_micros_per_hour=regret,
        slack_sum_micros_per_hour=slack,
        uplift_micros_per_hour=sum(prices.uplift(column) for column in best.placed),
        turnover_micros_per_hour=sum(charges),
        checks={
            "identity": lost.identity_holds,
            "bound_at_least_welfare": lost.gap_micros_per_hour >= 0,
            "lp_gap_proved": abs(lost.bound_micros_per_hour - lp) <= LP_GAP_MAX * abs(lp) + _rounding(market, prices),
            "placements_fit": fits(market, best.placed),
            "buyers_at_most_value": all(
                prices.gross(column) - prices.uplift(column) <= max(0, column.value - column.egress)
                for column in best.placed
                if column.action != "keep"
            ),
            "sites_at_least_ask": all(
                prices.pools[pool_id] >= pool.ask_micros_per_gpu_hour for pool_id, pool in market.pools.items()
            ),
            "uplift_within_equity": sum(uplift_cost(prices, column) for column in best.placed)
            <= market.snapshot.market_equity_micros,
        },
    )


def _rounding(market: Market, prices: Prices) -> int:
    """Return what whole micro-credits may move the bound by: one for every unit of priced capacity."""
    pools = sum(
        pool.capacity_gpus
        for pool_id, pool in market.pools.items()
        if prices.pools[pool_id] > pool.ask_micros_per_gpu_hour
    )
    jobs = len(market.jobs)
    return pools + jobs + sum(most for pair, most in market.link_capacity.items() if prices.links[pair])
