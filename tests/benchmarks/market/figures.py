"""One line of the benchmark's table, the table, and the same as JSON with date, machine and versions."""

from __future__ import annotations

import json
import os
import platform
import resource
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, NamedTuple

from rich.console import Console
from rich.table import Table

_PACKAGES: Final = ("clarabel", "cvxpy", "ecos", "hansa", "highspy", "numba", "numpy", "pulp", "scipy", "torch")


class Figure(NamedTuple):
    """What was measured, beside its reference of the same run.

    `verdict` is "reached", "behind", "loses" (the reference is better than we are) or "shown".
    """

    name: str
    what: str
    target: str
    ours: str
    reference: str
    ratio: str
    verdict: str
    detail: dict[str, Any]


def verdict(*, reached: bool, loses: bool = False) -> str:
    """Return the word for a figure against its target and its reference."""
    return "reached" if reached else "loses" if loses else "behind"


def peak_mib() -> float:
    """Return the most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def show(figures: Iterable[Figure], *, title: str = "CPU seconds, one thread") -> None:
    """Print the table."""
    colours = {"reached": "green", "behind": "yellow", "loses": "red"}
    table = Table("", "figure", "ours", "reference, same run", "ratio", "target", "verdict", title=title)
    for figure in figures:
        colour = colours.get(figure.verdict, "default")
        word = f"[{colour}]{figure.verdict}[/{colour}]"
        table.add_row(figure.name, figure.what, figure.ours, figure.reference, figure.ratio, figure.target, word)
    Console(width=None if Console().is_terminal else 170).print(table)


def write(path: Path, figures: Iterable[Figure], settings: dict[str, Any]) -> None:
    """Write everything measured as JSON."""
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cores": os.cpu_count(),
            "cpu": _cpu_name(),
            "system": platform.platform(),
            "load": os.getloadavg(),
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "settings": settings,
        "figures": [figure._asdict() for figure in figures],
    }
    path.write_text(json.dumps(record, indent=1, default=float) + "\n")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
