"""O6 and O7: our market beside greedy rules, Gavel, POP and Sia, on identical problems in the same run.

An LP's objective must equal the peer's to EQUAL; where it does not, the benchmark stops.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from broker.allocation.instance import Instance
from tests.benchmarks.market import alike, instances, ours
from tests.benchmarks.market.figures import Figure, verdict
from tests.benchmarks.market.peers import gavel, greedy, pop, sia
from tests.benchmarks.market.tables import Speeds

EQUAL: Final = 1e-6
# POP's own figures for its benchmark: 2,048 jobs, 3 x 512 GPUs, MOSEK on 16 cores.
_POP_PUBLISHED: Final = "MOSEK 285.6 s, POP-8 12.6 s at .9983"
_OVER_GREEDY: Final = 0.045
_POP_SECONDS: Final = 12.6
_POP_QUALITY: Final = 0.9983


def gavel_sum(
    speeds: Speeds,
    size: tuple[int, int],
    seed: int,
    solvers: tuple[str, ...],
    target: float,
    *,
    alike_sites: bool = False,
) -> Iterator[Figure]:
    """Compare the max-sum LP on jobs x (3 GPU types at each of some sites), with POP-4 beside it."""
    jobs, sites = size
    problem = instances.time_shares(speeds, jobs, sites, seed, alike=alike_sites)
    mine = ours.relaxed(instances.market_of_time_shares(problem), repeats=3)
    objective = mine.found.lp_objective / instances.VALUE_SCALE
    bound = mine.found.bound / instances.VALUE_SCALE
    answers = {solver: gavel.max_sum(problem, solver) for solver in solvers}
    # The solvers' own answers are right to about 1e-6 themselves; the most exact of them decides.
    closest = min(answers.values(), key=lambda answer: abs(answer.objective - objective))
    if not abs(closest.objective - objective) <= EQUAL * abs(closest.objective):
        found = {solver: answer.objective for solver, answer in answers.items()}
        raise SystemExit(
            f"O7: our objective {objective!r} (bound {bound!r}) is not the peers' {found}. One side is wrong."
        )
    fastest = min(answers, key=lambda solver: answers[solver].seconds)
    best = answers[fastest]
    ratio = best.seconds / mine.seconds
    where = "alike at every site" if alike_sites else "each site its own"
    yield Figure(
        "O7",
        f"Gavel max-sum {jobs:,} x {len(problem.workers)}, {where}",
        f"{target:g} x",
        f"{mine.seconds:.3f} s, gap {mine.found.gap:.1e}",
        f"{fastest} {best.seconds:.2f} s (solver {best.solver_s:.2f}), objective equal to {abs(1 - best.objective / objective):.0e}",
        f"{ratio:.1f} x, solver alone {best.solver_s / mine.seconds:.1f} x",
        verdict(reached=ratio >= target, loses=ratio < 1),
        {
            "objective": objective,
            "bound": bound,
            "phases_s": mine.found.seconds,
            "first_s": mine.first_s,
            "columns": mine.found.columns,
            "iterations": mine.found.iterations,
            "peers": {name: (a.objective, a.seconds, a.solver_s) for name, a in answers.items()},
        },
    )
    if alike_sites:
        return
    for parts in (4, 16):
        split = pop.max_sum(problem, parts, fastest, seed)
        lost = 1 - sum(split.objectives) / objective
        yield Figure(
            "O7",
            f"POP-{parts} around it",
            "",
            f"{mine.seconds:.3f} s, loses nothing",
            f"{fastest} {split.seconds:.2f} s, longest part {split.longest_s:.2f} s; loses {lost:.2%}",
            f"{split.seconds / mine.seconds:.1f} x, longest part {split.longest_s / mine.seconds:.1f} x",
            verdict(reached=split.seconds > mine.seconds, loses=split.longest_s < mine.seconds),
            {"objective": sum(split.objectives), "seconds": split.seconds, "longest_s": split.longest_s},
        )


def gavel_min(speeds: Speeds, size: tuple[int, int], seed: int, solvers: tuple[str, ...]) -> Iterator[Figure]:
    """Show Gavel's max-min LP, which our market does not state: it maximises welfare."""
    jobs, sites = size
    problem = instances.time_shares(speeds, jobs, sites, seed)
    # A job that fits nowhere would make the least throughput 0 for all.
    runs = problem.throughput.max(axis=1) > 0
    problem = problem._replace(throughput=problem.throughput[runs], gpus=problem.gpus[runs])
    answers = {solver: gavel.max_min(problem, solver) for solver in solvers}
    yield Figure(
        "O7",
        f"Gavel max-min {jobs:,} x {len(problem.workers)}",
        "",
        "not offered: fairness is a floor in the market",
        ", ".join(f"{name} {a.seconds:.2f} s" for name, a in answers.items()),
        "",
        "shown",
        {"peers": {name: (a.objective, a.seconds, a.solver_s) for name, a in answers.items()}},
    )


def pop_shared(speeds: Speeds, jobs: int, seed: int, parts: int, solver: str) -> Iterator[Figure]:
    """Compare on POP's benchmark: max-min with space sharing, pairs of jobs on one GPU."""
    problem = instances.shared_workers(speeds, jobs, seed)
    mine = min((alike.max_min_shared(problem) for _ in range(3)), key=lambda answer: answer.seconds)
    least = float(alike.spread(problem, mine).min())
    split = pop.max_min_shared(problem, parts, solver, seed)
    quality = min(split.objectives) / mine.objective
    if quality > 1 + EQUAL:
        raise SystemExit(f"O7: POP's least speed is {quality} of what we take for the optimum. One side is wrong.")
    reached = least / mine.objective >= _POP_QUALITY and mine.seconds < _POP_SECONDS
    published = f"; published: {_POP_PUBLISHED}" if jobs == 2048 else ""
    yield Figure(
        "O7",
        f"POP's space sharing, {jobs:,} jobs (comparison's own code: types joined, not the market)",
        "≥ .9983 in < 12.6 s",
        f"{mine.seconds:.3f} s, {least / mine.objective:.4f} of the optimum",
        f"POP-{parts} {solver} longest part {split.longest_s:.2f} s, all {split.seconds:.1f} s; {quality:.4f}{published}",
        f"{split.longest_s / mine.seconds:.0f} x",
        verdict(reached=reached, loses=split.longest_s < mine.seconds),
        {"optimum": mine.objective, "columns": len(mine.total), "split": split._asdict()},
    )


def sia_choice(speeds: Speeds, jobs: int, seed: int, limit_s: float) -> Iterator[Figure]:
    """Compare Sia's ILP: the peer's whole choice against our proved bound on it."""
    problem = instances.configurations(speeds, jobs, seed)
    outcome, seconds = ours.solved(instances.market_of_configurations(problem), repeats=3)
    objective = problem.none_cost * jobs - outcome.welfare / instances.VALUE_SCALE
    lower = problem.none_cost * jobs - outcome.bound / instances.VALUE_SCALE
    for solver in sia.solvers():
        peer = sia.minimise(problem, solver, limit_s)
        if peer.objective < lower * (1 - EQUAL):
            raise SystemExit(
                f"O7: Sia's choice costs {peer.objective!r}, below our bound {lower!r}. One side is wrong."
            )
        better = objective <= peer.objective * (1 + sia.RELATIVE_GAP)
        yield Figure(
            "O7",
            f"Sia's ILP, {jobs:,} jobs x {problem.cost.shape[1]}, least cost",
            "equal to Sia's gap of 1e-4",
            f"{seconds:.3f} s, {objective:.3f}: {objective / lower - 1:.3%} above the bound",
            f"{solver} {peer.seconds:.2f} s (solver {peer.solver_s:.2f}), {peer.objective:.3f}: {peer.objective / lower - 1:.3%} above",
            f"{peer.seconds / seconds:.1f} x",
            verdict(reached=better and seconds <= peer.seconds, loses=not better or seconds > peer.seconds),
            {"lower_bound": lower, "ours": objective, "peer": peer.objective, "phases_s": outcome.seconds},
        )


def greedy_rules(name: str, market: Instance, orders: tuple[str, ...]) -> Iterator[Figure]:
    """Compare whole placements' welfare with what each greedy rule reaches."""
    mine, seconds = ours.solved(market, repeats=1)
    shares = {}
    for order in orders:
        answer = greedy.place(market, order)
        if answer.welfare > mine.bound:
            raise SystemExit(f"O6: greedy by {order} has {answer.welfare!r}, above our bound {mine.bound!r}.")
        shares[order] = answer.welfare / mine.welfare
    best = max(shares, key=lambda order: shares[order])
    over = 1 / shares[best] - 1
    yield Figure(
        "O6",
        f"welfare over greedy rules, {name}",
        "+4.5 % over the best",
        f"{mine.welfare / 1e6:,.1f}, {mine.gap:.3%} below the bound, {seconds:.2f} s",
        "of ours: " + "; ".join(f"{order} {share:.1%}" for order, share in shares.items()),
        f"+{over:.2%} over {best}",
        verdict(reached=over >= _OVER_GREEDY, loses=over < 0),
        {"shares_of_ours": shares, "bound": mine.bound, "welfare": mine.welfare, "seconds": seconds},
    )
