"""Training across sites against its targets and its references, on this machine, now.

    make bench-training                    everything
    make bench-training QUICK=1            some three minutes
    make bench-training ONLY=T1            one part
    make bench-training ONLY=peers         beside torchft and hivemind, which it installs where pip has them
    make bench-training LONG=1 ONLY=T3     held-out loss against DDP, as many hours as the budget asks for

Sites are network namespaces joined by an emulated wide-area network (`training.lab.wan`), which needs root. Every figure
stands beside a reference of the same run; each names the link and TCP's congestion control where they matter.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

from rich.console import Console

from tests.benchmarks.market.figures import Figure, show, write
from tests.benchmarks.training import faults, link_fill, peers, quality, utilisation, wire
from tests.benchmarks.training.utilisation import Case

Group = Callable[[], Iterator[Figure]]


# The last one stands against the target. One group in flight for nearly its whole block is the most overlap there is; four
# groups of five steps show what a link's round trips cost where less travels at a time.
_CURVE: Final = (
    *(Case("diloco", codec, steps) for codec in ("fp32", "int8") for steps in (10, 30)),
    *(Case("sparse", "topk2", steps) for steps in (10, 30)),
    Case("streaming", "fp32", 28, 4, 6),
    Case("streaming", "fp32", 10, 1, 9),
    Case("streaming", "fp32", 30, 1, 29),
)


def groups(*, quick: bool, long: bool, chart: Path | None) -> dict[str, Group]:
    """Return the parts by their names in the targets."""
    return {
        "T1, T2": partial(
            wire.measured, period_steps=2 if quick else wire.PERIOD_STEPS, more_sites=() if quick else (3, 8)
        ),
        **({} if quick else {"T2 with whole periods": wire.whole_periods}),
        "T4": partial(
            utilisation.measured, cases=_CURVE[-1:] if quick else _CURVE, blocks=4 if quick else 8, chart=chart
        ),
        "T5": partial(
            link_fill.measured,
            size_bytes=150_000_000 if quick else 1_000_000_000,
            controls=("cubic",) if quick else ("cubic", "bbr"),
            connections=(16,) if quick else (4, 16),
        ),
        "T7": faults.site_dies,
        "T8": faults.hub_dies,
        "peers": peers.measured,
        **({"T3": partial(quality.measured, steps=40 if quick else 6000, seeds=1 if quick else 3)} if long else {}),
    }


def main() -> None:
    """Measure the chosen parts, print the table, write the record."""
    parser = argparse.ArgumentParser(description="Training across sites, measured.")
    parser.add_argument("--quick", action="store_true", help="small sizes, some three minutes")
    parser.add_argument("--long", action="store_true", help="T3 too: hours, if its budget is to mean something")
    parser.add_argument("--only", default="", help="parts whose name contains this")
    parser.add_argument("--chart", type=Path, default=Path("bench-training-t4.png"), help="T4's curve")
    parser.add_argument("--json", type=Path, help="where to write everything measured")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    figures: list[Figure] = []
    failed = False
    for name, group in groups(quick=arguments.quick, long=arguments.long, chart=arguments.chart).items():
        if arguments.only not in name:
            continue
        started = time.perf_counter()
        try:
            figures += group()
        except Exception as failure:  # noqa: BLE001 (one part's failure is shown, the others still run)
            failed = True
            figures.append(
                Figure(name, "did not finish", "", "", f"{type(failure).__name__}: {failure}", "", "failed", {})
            )
        console.print(f"{name}: {time.perf_counter() - started:.0f} s")
    show(figures, title="Training across sites")
    if arguments.json:
        write(arguments.json, figures, {"quick": arguments.quick, "only": arguments.only})
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
