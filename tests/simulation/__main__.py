"""Runs many seeds, or one again and tells its story.

python -m tests.simulation --seeds 2000 --steps 250
python -m tests.simulation --minutes 20
python -m tests.simulation --seed 4711 --trace
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from tests.simulation.founding import make_template
from tests.simulation.seeds import fast_folder, run_in_pool, run_seed


def main() -> int:
    """Parse the command line, run, and report; 1 where a seed failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2000)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--minutes", type=float, default=None, help="stop after this long instead of after --seeds")
    parser.add_argument("--seed", type=int, default=None, help="replay this one")
    parser.add_argument("--trace", action="store_true", help="tell the story of --seed")
    arguments = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory(prefix="hansa-template-", dir=fast_folder()) as folder:
        template = make_template(Path(folder))
        if arguments.seed is not None:
            outcome = run_seed(arguments.seed, arguments.steps, template, tell=arguments.trace)
            console.print("\n".join(outcome.story), markup=False, highlight=False)
            console.print(outcome.failure or f"seed {outcome.seed}: {outcome.steps} steps, nothing wrong", markup=False)
            return 1 if outcome.failure else 0
        return _run_many(console, arguments, template)


def _run_many(console: Console, arguments: argparse.Namespace, template: Path) -> int:
    started_s = time.perf_counter()
    failed, done, steps = [], 0, 0
    with multiprocessing.get_context("spawn").Pool() as pool, Progress(console=console) as progress:
        total = None if arguments.minutes else arguments.seeds
        bar = progress.add_task("seeds", total=total)
        # The pool takes work as fast as it is given: without a bound, minutes' worth of seeds would be days' worth.
        ahead = threading.Semaphore(2 * multiprocessing.cpu_count())
        for outcome in pool.imap_unordered(run_in_pool, _work(arguments, template, ahead)):
            ahead.release()
            done, steps = done + 1, steps + outcome.steps
            elapsed_s = time.perf_counter() - started_s
            progress.update(
                bar, advance=1, description=f"{done} seeds, {steps / elapsed_s:.0f} steps/s, {len(failed)} failed"
            )
            if outcome.failure:
                failed.append(outcome.seed)
                console.print(f"seed {outcome.seed}:\n{outcome.failure}", markup=False)
    elapsed_s = time.perf_counter() - started_s
    console.print(f"{done} seeds, {steps} steps, {steps / elapsed_s:.0f} steps/s, {len(failed)} failed {failed or ''}")
    return 1 if failed else 0


def _work(arguments: argparse.Namespace, template: Path, ahead: threading.Semaphore) -> Iterator[tuple[int, int, Path]]:
    ends_s = time.perf_counter() + arguments.minutes * 60 if arguments.minutes else None
    seed = arguments.first
    while (ends_s is None and seed < arguments.first + arguments.seeds) or (
        ends_s is not None and time.perf_counter() < ends_s
    ):
        ahead.acquire()
        yield seed, arguments.steps, template
        seed += 1


if __name__ == "__main__":
    raise SystemExit(main())
