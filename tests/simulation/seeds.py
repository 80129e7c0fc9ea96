"""One seed from end to end: a world in a folder of its own, run, closed and removed."""

from __future__ import annotations

import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from broker.database.engine import CommitHook, Database
from tests.simulation.world import World


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one seed came to."""

    seed: int
    steps: int
    seconds: float
    failure: str
    story: tuple[str, ...] = ()


def run_seed(
    seed: int,
    steps: int,
    template: Path,
    *,
    tell: bool = False,
    open_database: Callable[[CommitHook], Database] | None = None,
) -> Outcome:
    """Run one seed in a folder of its own, on SQLite or what `open_database` opens, and return what came of it."""
    folder = Path(tempfile.mkdtemp(prefix="hansa-simulation-", dir=fast_folder()))
    started_s = time.perf_counter()
    world = World(seed, folder, template, tell=tell, open_database=open_database)
    failure = ""
    try:
        world.run(steps)
    except Exception:  # noqa: BLE001  whatever went wrong is this seed's failure
        failure = traceback.format_exc(limit=-8)
    finally:
        world.close()
        shutil.rmtree(folder, ignore_errors=True)
    return Outcome(seed, world.steps, time.perf_counter() - started_s, failure, tuple(world.story.lines))


def fast_folder() -> str | None:
    """Return a folder in memory where there is one: a simulated crash loses no page cache."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108  a folder of our own is made in it


def run_in_pool(work: tuple[int, int, Path]) -> Outcome:
    """Run one of many; a module of its own, since a spawned worker cannot import `__main__`."""
    return run_seed(*work)
