"""Training across sites against its targets and its references, on this machine, now.

    make bench-training                    everything
    make bench-training QUICK=1            some three minutes
    make bench-training ONLY=T1            one part
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

from rich.console import Console

from tests.benchmarks.market.figures import Figure, show, write
from tests.benchmarks.training import wire

Group = Callable[[], Iterator[Figure]]


def groups(*, quick: bool) -> dict[str, Group]:
    """Return the parts by their names in the targets."""
    return {
        "T1, T2": partial(wire.measured, more_sites=() if quick else (3, 8)),
    }


def main() -> None:
    """Measure the chosen parts, print the table, write the record."""
    parser = argparse.ArgumentParser(description="Training across sites, measured.")
    parser.add_argument("--quick", action="store_true", help="small sizes, some three minutes")
    parser.add_argument("--only", default="", help="parts whose name contains this")
    parser.add_argument("--json", type=Path, help="where to write everything measured")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    figures: list[Figure] = []
    failed = False
    for name, group in groups(quick=arguments.quick).items():
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
