"""How often what a waiting job is told is true: 200 counterfactuals of generated markets, each round solved again.

    HANSA_COMPILE=1 python tests/benchmarks/bench_counterfactuals.py

Beside it, for comparison, how often the bid that the clearing's own sentence names (from its prices alone) is true.
"""

from __future__ import annotations

import collections
import time

from broker.allocation.clearing import Clearing
from broker.allocation.counterfactuals import counterfactuals
from broker.allocation.generate import generate
from broker.allocation.snapshot import JobState, Snapshot
from broker.allocation.solve import clear
from broker.allocation.table_rows import to_snapshot

WANTED = 200
JOBS, SITES = 24, 4


def main() -> None:
    told: collections.Counter[str] = collections.Counter()
    true: collections.Counter[str] = collections.Counter()
    answered, left_out_all, seed, began_s = 0, 0, 0, time.process_time()
    while sum(told.values()) - told["sentence"] < WANTED:
        seed += 1
        snapshot = to_snapshot(generate("AB"[seed % 2], JOBS, SITES, seed))  # type: ignore[arg-type]
        for left_out in clear(snapshot).unplaced:
            if sum(told.values()) - told["sentence"] >= WANTED:
                break
            named = left_out.bid_needed_micros_per_million_samples
            if named is not None:
                job = next(row for row in snapshot.jobs if row.job_id == left_out.job_id)
                told["sentence"] += 1
                true["sentence"] += _places(snapshot, job.model_copy(update={"bid_micros_per_million_samples": named}))
            rows = counterfactuals(snapshot, left_out)
            left_out_all, answered = left_out_all + 1, answered + bool(rows)
            for row in rows:
                told[row.kind] += 1
                true[row.kind] += _places(snapshot, row.job)
    print(f"{'what is told':22} {'told':>5} {'true':>5}")
    for kind in sorted(told):
        name = "the sentence's own bid" if kind == "sentence" else kind
        print(f"{name:22} {told[kind]:5} {true[kind]:5}")
    checked = sum(told.values()) - told["sentence"]
    print(f"{'checked, all together':22} {checked:5} {sum(true.values()) - true['sentence']:5}")
    print(f"{answered} of {left_out_all} jobs left out have an answer; {time.process_time() - began_s:.0f} s of CPU")


def _places(snapshot: Snapshot, changed: JobState) -> bool:
    """Solve the round again from its document, as anyone would who was handed it."""
    jobs = tuple(changed if row.job_id == changed.job_id else row for row in snapshot.jobs)
    again: Clearing = clear(Snapshot.from_json(snapshot.model_copy(update={"jobs": jobs}).to_json()))
    return any(row.job_id == changed.job_id for row in again.placements)


if __name__ == "__main__":
    main()
