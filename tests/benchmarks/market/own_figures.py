"""O1, O2, O5 and O8 as far as the LP goes: time, memory, proof, and what PuLP costs.

Whole rounds (O3, O4, the MIP side of O5, O9, O10) are not measured here yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from broker.allocation.instance import Instance
from tests.benchmarks.market import ours
from tests.benchmarks.market.figures import Figure, peak_mib, verdict
from tests.benchmarks.market.peers import enumeration

GAP: Final = 1e-6
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
