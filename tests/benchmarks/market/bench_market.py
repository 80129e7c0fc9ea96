"""The optimiser against its peers and its targets, on this machine, now.

    make bench-market                       everything: about half an hour on two cores
    make bench-market QUICK=1               a minute: small sizes
    make bench-market TABLE=speeds.csv      measured speeds instead of generated ones

Both sides of a line are measured in this run, in CPU seconds of one thread, so that a ratio holds on
a busy machine too. Where a peer is better the table says "loses". Each group runs in a process of
its own: memory is that process's peak, and nobody inherits a warm or a full one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from rich.console import Console

from tests.benchmarks.market.figures import Figure, show, write
from tests.benchmarks.market.tables import Speeds, read_or_generate

Group = Callable[[], Iterator[Figure]]


def quick(speeds: Speeds, seed: int) -> dict[str, Group]:
    """Return the groups of a quick run."""
    return {
        "O7 Gavel": partial(_gavel, speeds, seed, ((2048, 20, 20.0),), ("ECOS", "HIGHS")),
        "O7 POP": partial(_shared, speeds, seed, 512, "HIGHS"),
        "O7 Sia": partial(_sia, speeds, seed, (256,), 10.0),
        "O5, O6, O8": partial(_families, seed, 200, 10),
        "O3": partial(_followed, seed, 1_000, 30),
    }


def full(speeds: Speeds, seed: int) -> dict[str, Group]:
    """Return all groups."""
    return {
        "O7 Gavel": partial(_gavel, speeds, seed, ((512, 1, 1.0), (2048, 20, 20.0)), ("ECOS", "CLARABEL", "HIGHS")),
        "O7 Gavel, large": partial(_gavel, speeds, seed, ((8192, 60, 40.0),), ("ECOS",)),
        "O7 POP": partial(_shared, speeds, seed, 2048, "HIGHS"),
        "O7 Sia": partial(_sia, speeds, seed, (256, 2048), 100.0),
        "O5, O6, O8": partial(_families, seed, 200, 10),
        "O1": partial(_rounds, "O1", seed, 10_000, 200, 0.8),
        "O3": partial(_followed, seed, 10_000, 200),
        "O2": partial(_rounds, "O2", seed, 100_000, 1_000, 15.0),
        "O6, large": partial(_greedy, seed, 2_000, 50),
    }


def main() -> None:
    """Measure the chosen groups, print the table, write the record."""
    parser = argparse.ArgumentParser(description="The optimiser against its peers.")
    parser.add_argument("--quick", action="store_true", help="small sizes, about a minute")
    parser.add_argument("--table", type=Path, help="measured speeds: gpu_type,consolidated,job_type,gpus,steps_per_s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="groups whose name contains this")
    parser.add_argument("--json", type=Path, help="where to write everything measured")
    arguments = parser.parse_args()
    speeds = read_or_generate(arguments.table, arguments.seed)
    groups = (quick if arguments.quick else full)(speeds, arguments.seed)
    console = Console(stderr=True)
    console.print(f"speeds: {speeds.source}; seed {arguments.seed}")
    figures: list[Figure] = []
    failed = False
    for name, group in groups.items():
        if arguments.only not in name:
            continue
        started = time.perf_counter()
        try:
            figures += _in_a_child(group)
        except Exception as failure:  # noqa: BLE001 (one group's failure is shown, the others still run)
            failed = True
            figures.append(
                Figure(name, "did not finish", "", "", f"{type(failure).__name__}: {failure}", "", "failed", {})
            )
        console.print(f"{name}: {time.perf_counter() - started:.0f} s")
    show(figures)
    if arguments.json:
        settings = {"speeds": speeds.source, "seed": arguments.seed, "quick": arguments.quick, "only": arguments.only}
        write(arguments.json, figures, settings)
    sys.exit(1 if failed else 0)


def _in_a_child(group: Group) -> list[Figure]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
        return child.submit(_measured, group).result()


def _measured(group: Group) -> list[Figure]:
    _compile_first()
    try:
        return list(group())
    except SystemExit as wrong:
        raise RuntimeError(str(wrong)) from wrong


def _compile_first() -> None:
    """Run a small market of each kind, so that no measured run waits for numba."""
    from tests.benchmarks.market import instances, ours  # noqa: PLC0415 (the parent needs no solver)
    from tests.broker.allocation.large_instances import large  # noqa: PLC0415

    ours.relaxed(large(60, 5, "B", 0), repeats=1)
    ours.relaxed(instances.market_of_time_shares(instances.time_shares(read_or_generate(None, 0), 32, 2, 0)), repeats=1)


def _gavel(
    speeds: Speeds, seed: int, sizes: tuple[tuple[int, int, float], ...], solvers: tuple[str, ...]
) -> Iterator[Figure]:
    from tests.benchmarks.market import against_peers  # noqa: PLC0415

    for jobs, sites, target in sizes:
        yield from against_peers.gavel_sum(speeds, (jobs, sites), seed, solvers, target)
        yield from against_peers.gavel_sum(speeds, (jobs, sites), seed, solvers[:1], target, alike_sites=True)
    yield from against_peers.gavel_min(speeds, (512, 5), seed, solvers)


def _shared(speeds: Speeds, seed: int, jobs: int, solver: str) -> Iterator[Figure]:
    from tests.benchmarks.market import against_peers  # noqa: PLC0415

    yield from against_peers.pop_shared(speeds, jobs, seed, 8, solver)


def _sia(speeds: Speeds, seed: int, sizes: tuple[int, ...], limit_s: float) -> Iterator[Figure]:
    from tests.benchmarks.market import against_peers  # noqa: PLC0415

    for jobs in sizes:
        yield from against_peers.sia_choice(speeds, jobs, seed, limit_s)


def _families(seed: int, jobs: int, sites: int) -> Iterator[Figure]:
    from tests.benchmarks.market import own_figures  # noqa: PLC0415
    from tests.broker.allocation.large_instances import large  # noqa: PLC0415

    for family in ("A", "B"):
        yield from own_figures.against_enumeration(f"{family} {jobs:,} x {sites}", large(jobs, sites, family, seed))
    yield from own_figures.pulp_layer("A 2,000 x 50", large(2_000, 50, "A", seed), repeats=3)
    yield from _greedy(seed, jobs, sites)


def _rounds(figure: str, seed: int, jobs: int, sites: int, target_s: float) -> Iterator[Figure]:
    from tests.benchmarks.market import own_figures  # noqa: PLC0415
    from tests.broker.allocation.large_instances import large  # noqa: PLC0415

    for family in ("A", "B"):
        market = large(jobs, sites, family, seed)
        yield from own_figures.relaxation(figure, f"{family} {jobs:,} x {sites:,}", market, target_s, repeats=3)
        if figure == "O1":
            yield from own_figures.pulp_layer(f"{family} {jobs:,} x {sites:,}", market, repeats=2)


def _followed(seed: int, jobs: int, sites: int) -> Iterator[Figure]:
    from tests.benchmarks.market import own_figures  # noqa: PLC0415
    from tests.broker.allocation.later_rounds import a_round_later  # noqa: PLC0415

    for family in ("A", "B"):
        market, first = a_round_later(jobs, sites, family, seed, changed=jobs // 100)
        yield from own_figures.incremental(f"{family} {jobs:,} x {sites:,}", market, first.prices, repeats=5)


def _greedy(seed: int, jobs: int, sites: int) -> Iterator[Figure]:
    from tests.benchmarks.market import against_peers  # noqa: PLC0415
    from tests.benchmarks.market.peers import greedy  # noqa: PLC0415
    from tests.broker.allocation.large_instances import large  # noqa: PLC0415

    for family in ("A", "B"):
        market = large(jobs, sites, family, seed)
        yield from against_peers.greedy_rules(f"{family} {jobs:,} x {sites}", market, greedy.ORDERS)


if __name__ == "__main__":
    main()
