"""A round of the market against the best greedy placement of the same candidates.

    python -m tests.benchmarks.bench_allocation

The reference takes candidates in the order of surplus per GPU at the asks, as long as they fit:
the best simple rule known. Same candidates, same run. `verify` checks each clearing.
"""

from __future__ import annotations

import time

from rich.console import Console
from rich.table import Table

from broker.allocation.candidates import Column, columns
from broker.allocation.market import Market, open_market
from broker.allocation.snapshot import Snapshot
from broker.allocation.solve import clear
from broker.allocation.verify import verify
from tests.broker.allocation.instances import random_market

SIZES = ((20, 2), (60, 3), (200, 6))


def greedy_welfare(market: Market, candidates: list[Column]) -> int:
    """Return the welfare of placing candidates by surplus per GPU at the asks while they fit."""
    free = {pool_id: pool.capacity_gpus for pool_id, pool in market.pools.items()}
    links = dict(market.link_capacity)
    placed: set[str] = set()
    welfare = 0
    for column in sorted(candidates, key=lambda column: -column.worth / column.configuration.gpus):
        parts = column.configuration.parts
        fits = all(free[part.pool_id] >= part.gpus for part in parts)
        if column.job.job_id in placed or not fits or any(links[pair] < shares for pair, shares in column.shares):
            continue
        placed.add(column.job.job_id)
        welfare += column.worth
        for part in parts:
            free[part.pool_id] -= part.gpus
        for pair, shares in column.shares:
            links[pair] -= shares
    return welfare


def row(snapshot: Snapshot) -> tuple[str, ...]:
    """Return one line of the table."""
    started = time.perf_counter()
    clearing = clear(snapshot)
    elapsed_s = time.perf_counter() - started
    market = open_market(snapshot)
    started = time.perf_counter()
    greedy = greedy_welfare(market, [column for job in market.jobs for column in columns(market, job)])
    greedy_s = time.perf_counter() - started
    proof = clearing.certificate
    return (
        f"{len(snapshot.jobs)} x {len(snapshot.pools)}",
        f"{elapsed_s:.2f} s",
        f"{elapsed_s / greedy_s:.1f} x greedy's",
        f"{100 * proof.gap_micros_per_hour / max(1, proof.bound_micros_per_hour):.3f} %",
        f"{100 * (proof.welfare_micros_per_hour / max(1, greedy) - 1):+.2f} %",
        str(len(verify(snapshot, clearing))),
    )


def main() -> None:
    """Measure each size and print the table."""
    clear(random_market(0, 4, 2))  # the solver's own start is not the round's
    table = Table("jobs x pools", "round", "time against", "gap to the proved bound", "welfare over greedy", "findings")
    for jobs, sites in SIZES:
        table.add_row(*row(random_market(jobs, jobs, sites)))
    Console().print(table)


if __name__ == "__main__":
    main()
