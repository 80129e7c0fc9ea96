"""O1, O2, O5 and O8 as far as the LP goes: time, memory, proof, and what PuLP costs. O3: rounds that follow another.

Other whole rounds (O4, the MIP side of O5, O9, O10) are not measured here yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from broker.allocation.instance import BUNDLE, Instance, Int
from tests.benchmarks.market import ours
from tests.benchmarks.market.figures import Figure, peak_mib, verdict
from tests.benchmarks.market.peers import enumeration

GAP: Final = 1e-6
FOLLOWED_S: Final = 0.1
KEPT_MIN: Final = 0.985
PULP_SHARE_MAX: Final = 0.10
LP_EQUAL: Final = 1e-6
MIP_LIMIT_S: Final = 60.0


def relaxation(figure: str, name: str, market: Instance, target_s: float, repeats: int) -> Iterator[Figure]:
    """Measure the LP to its proved gap, by phase."""
    mine = ours.relaxed(market, repeats)
    phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in mine.found.seconds.items())
    yield Figure(
        figure,
        f"LP of {name}",
        f"gap ≤ 1e-6; whole round ≤ {target_s:g} s",
        f"{mine.seconds:.2f} s (first {mine.first_s:.2f}), gap {mine.found.gap:.1e}, {peak_mib():.0f} MiB",
        f"{phases}; {mine.found.iterations} LPs, {mine.found.columns:,} columns",
        f"{mine.seconds / target_s:.2f} of the round's time",
        verdict(reached=mine.found.optimal and mine.found.gap <= GAP and mine.seconds <= target_s),
        {"seconds": mine.seconds, "phases_s": mine.found.seconds, "gap": mine.found.gap, "peak_mib": peak_mib()},
    )


def incremental(name: str, market: Instance, last_prices: Int, repeats: int) -> Iterator[Figure]:
    """Hold a round that follows the last one's prices against the same round from nothing.

    In `market` jobs have changed and leases stand since the round with `last_prices`.
    """
    cold, cold_s = ours.solved(market, repeats=1)
    mine, seconds = ours.followed(market, last_prices, repeats)
    had = market.jobs.own >= 0
    stayed, moved_by_cold = (
        float(((found.choice.form == BUNDLE) & (found.choice.item == market.jobs.own))[had].mean())
        for found in (mine, cold)
    )
    yield Figure(
        "O3",
        f"round that follows, {name}, 1 % of jobs changed",
        f"≤ {FOLLOWED_S:g} s, ≥ {KEPT_MIN:.1%} of places kept",
        f"{seconds:.3f} s, {stayed:.1%} kept, {mine.gap:.2%} below its bound, bound {mine.bound / cold.bound - 1:.3%} above",
        f"from nothing {cold_s:.2f} s, {moved_by_cold:.1%} kept, {cold.gap:.2%} below",
        f"{cold_s / seconds:.0f} x",
        verdict(reached=seconds <= FOLLOWED_S and stayed >= KEPT_MIN),
        {"seconds": seconds, "phases_s": mine.seconds, "kept": stayed, "gap": mine.gap, "cold_s": cold_s},
    )


def against_enumeration(name: str, market: Instance) -> Iterator[Figure]:
    """Hold the LP against all columns in one PuLP model, and show how far the MIP is below it."""
    mine = ours.relaxed(market, repeats=3)
    full = enumeration.solve(market, whole=False, limit_s=MIP_LIMIT_S)
    if not abs(full.welfare - mine.found.lp_objective) <= LP_EQUAL * abs(full.welfare):
        raise SystemExit(
            f"O5: our LP is worth {mine.found.lp_objective!r}, enumeration's {full.welfare!r}. One side is wrong."
        )
    whole = enumeration.solve(market, whole=True, limit_s=MIP_LIMIT_S)
    yield Figure(
        "O5",
        f"LP against full enumeration, {name}",
        "equal to 1e-6",
        f"{mine.seconds:.3f} s, {mine.found.columns:,} columns",
        f"PuLP + HiGHS LP {full.seconds:.2f} s, {full.columns:,} columns; MIP {whole.seconds:.1f} s, {1 - whole.welfare / full.welfare:.3%} below",
        f"{full.seconds / mine.seconds:.0f} x",
        verdict(reached=True),
        {"lp": full._asdict(), "mip": whole._asdict(), "objective": mine.found.lp_objective},
    )


def pulp_layer(name: str, market: Instance, repeats: int) -> Iterator[Figure]:
    """Measure what the PuLP skeleton adds to a round's LP."""
    added, rest = ours.pulp_cost(market, repeats)
    yield Figure(
        "O8",
        f"PuLP over direct highspy, {name}",
        "≤ 10 %",
        f"{added:.4f} s",
        f"all else {rest:.3f} s",
        f"+{added / rest:.1%}",
        verdict(reached=added <= PULP_SHARE_MAX * rest),
        {"added_s": added, "rest_s": rest},
    )
