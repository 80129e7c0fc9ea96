"""Which LP solver stands behind `engine.Engine`, by name: HiGHS, which is always there, or CLP where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Final

import highspy

from broker.allocation.clp import ClpEngine
from broker.allocation.engine import Engine, HighsEngine
from broker.allocation.errors import EngineMissingError

HIGHS: Final = "highs"
CLP: Final = "clp"
ENGINES: Final = (HIGHS, CLP)


def engine_maker(name: str) -> Callable[[], Engine]:
    """Return what makes engines of that name. Raises EngineMissingError where it is not known or not installed."""
    if name == HIGHS:
        return HighsEngine
    if name == CLP:
        ClpEngine()  # says at once where it cannot be
        return ClpEngine
    raise EngineMissingError(f"there is no LP engine {name[:40]!r}; choose one of {', '.join(ENGINES)}")


def engine_of(solver: str, *, otherwise: str = HIGHS) -> str:
    """Return the engine that a clearing's `solver` names, to solve it again; `otherwise` where it is not installed here."""
    name = CLP if f" {CLP}/" in solver else HIGHS
    try:
        engine_maker(name)
    except EngineMissingError:
        return otherwise
    return name


def engine_version(name: str) -> str:
    """Return the versions that decide the bits of a solve with that engine. HiGHS solves every MIP."""
    highs = highspy.Highs()  # type: ignore[no-untyped-call]  # highspy's own signature lacks types
    mine = f"highs/{highs.version()}"
    return mine if name == HIGHS else f"{mine} {name}/cylp-{version('cylp')}"
