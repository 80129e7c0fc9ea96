"""Decision value of predicted speeds, and how fast configurations are priced.

    python tests/benchmarks/bench_throughput.py [gavel_isolated_throughputs.csv]

With a table of measured speeds (Gavel's form) as the truth, jobs are placed three times by the same
exact assignment (HiGHS): on the truth, on predictions, and blindly (every GPU type alike). Welfare is
counted with the truth each time. Predictions come from `training.speeds`, as the market has them:

    one type    a profile of one V100 alone; other types by the ratio that other families showed
    each type   a profile of one GPU of each type (Sia's bootstrap); larger counts by the closed form
    after a run the same, and what the jobs then reported where they were placed
    four runs   the same after four such rounds, each placed by what was known before it
    by shape    four rounds again, where the measurement at the nearest count of GPUs is believed
                (`speeds.near`, as the market has it for a job that asks for about that many)

No family's own speeds are in the ratios that it is carried by. Without a table only pricing is measured.
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from training.spec import Workload
from training.speeds import MeasuredRun, SpeedEstimate, estimate, near, samples_per_s
from training.steptimes.fit import prior
from training.steptimes.form import OWN, Form
from training.steptimes.table import StepTable

TYPES = ("k80", "p100", "v100")
COUNTS = (1, 2, 4, 8)
DRAWS, JOBS, CAPACITY = 10, 60, 36
# Single-precision peaks of the vendors' sheets, as the table's programs ran in fp32, and a common share.
COLD = {
    "k80": SpeedEstimate(0.35 * 4.1e12, 2.0e10, 0.8, measured=False),
    "p100": SpeedEstimate(0.35 * 9.3e12, 5.0e10, 0.8, measured=False),
    "v100": SpeedEstimate(0.35 * 15.7e12, 1.0e11, 0.8, measured=False),
}
# Parameters of each family (millions, papers'); what a sample costs is what the profile says, so
# that any figure does: six FLOPs a parameter.
PARAMETERS_M = {"ResNet-18": 11.2, "ResNet-50": 25.6, "Transformer": 60.0, "LM": 30.0, "Recommendation": 5.0}
PROFILE_S = 600.0
LEARNED = ("after a run", "four runs", "by shape")

Truth = Mapping[tuple[str, str, int], float]
Speed = Callable[[str, str, int], float]


@dataclass(frozen=True)
class Job:
    """A job of a family that may have up to `most` GPUs of one type, worth `weight` at one V100's speed."""

    family: str
    most: int
    weight: float


def read(path: Path) -> dict[tuple[str, str, int], float]:
    """Return samples/s by (family, type, GPUs) in one node, where steps of all workers count; families measured at every type and count."""
    found = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["consolidated"] == "yes" and float(row["steps_per_s"]) > 0:
                key = row["job_type"], row["gpu_type"], int(row["gpus"])
                found[key] = float(row["steps_per_s"]) * batch_of(key[0])
    whole = {key[0] for key in found if all((key[0], kind, n) in found for kind in TYPES for n in COUNTS)}
    return {key: value for key, value in found.items() if key[0] in whole}


def batch_of(family: str) -> int:
    """Return the batch size that a family's name states."""
    return int(family.split("batch size ")[1].rstrip(")")) if "batch size" in family else 1


def workload_of(family: str) -> Workload:
    """Return a workload with the family's batch and parameters."""
    parameters = PARAMETERS_M.get(family.split(" (", maxsplit=1)[0], 20.0) * 1e6
    return Workload(
        samples=1, batch_per_gpu=batch_of(family), parameters=int(parameters), flops_per_sample=6 * parameters
    )


def predictions(
    truth: Truth, types: tuple[str, ...], seen: Mapping[tuple[str, str, int], float], *, by_shape: bool = False
) -> Speed:
    """Return predicted samples/s from profiles of one GPU of `types`, and from what runs have shown since."""
    families = sorted({key[0] for key in truth})
    known: dict[tuple[str, str], SpeedEstimate] = {}
    ran: dict[tuple[str, str], list[MeasuredRun]] = {}
    for family in families:
        for kind in TYPES:
            rates = {1: truth[family, kind, 1]} if kind in types else {}
            rates |= {n: rate for (name, other, n), rate in seen.items() if (name, other) == (family, kind)}
            # A profile fixes what a sample costs here, whatever the catalogue says: the start follows it.
            runs = [MeasuredRun(n, rate * PROFILE_S, PROFILE_S) for n, rate in rates.items()]
            if runs:
                base = max(rate / n for n, rate in rates.items())
                start = SpeedEstimate(
                    base * workload_of(family).flops_per_sample, COLD[kind].ring_bits_per_s, 0.8, measured=False
                )
                ran[family, kind] = runs
                known[family, kind] = estimate(workload_of(family), runs, start)

    def speed(family: str, kind: str, n: int) -> float:
        if (family, kind) in known:
            found = known[family, kind]
            if by_shape:
                found = near(workload_of(family), found, ran[family, kind], n)
            return samples_per_s(workload_of(family), n, found)
        source = next(other for other in reversed(TYPES) if (family, other) in known)
        # All but the family's own row, by the truth of what other families were measured at.
        ratios = [
            truth[other, kind, 1] / truth[other, source, 1]
            for other in families
            if other.split(" (")[0] != family.split(" (", maxsplit=1)[0]
        ]
        ratio = float(np.median(ratios))
        moved = known[family, source]
        there = SpeedEstimate(moved.flops_per_s * ratio, COLD[kind].ring_bits_per_s, 0.8, measured=False)
        return samples_per_s(workload_of(family), n, there)

    return speed


def assigned(jobs: list[Job], speed: Speed, unit: Speed) -> list[tuple[str, int] | None]:
    """Return each job's (type, count) of the exact assignment that is worth most by `speed`."""
    options = [(row, kind, n) for row, job in enumerate(jobs) for kind in TYPES for n in COUNTS if n <= job.most]
    worth = np.array([jobs[r].weight * speed(jobs[r].family, k, n) / unit(jobs[r].family, k, n) for r, k, n in options])
    once = np.zeros((len(jobs), len(options)))
    room = np.zeros((len(TYPES), len(options)))
    for column, (row, kind, n) in enumerate(options):
        once[row, column] = 1
        room[TYPES.index(kind), column] = n
    solved = milp(
        -worth,
        constraints=[LinearConstraint(once, ub=1), LinearConstraint(room, ub=CAPACITY)],
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-4, "time_limit": 20},
    )
    result: list[tuple[str, int] | None] = [None] * len(jobs)
    for column in np.flatnonzero(solved.x > 0.5):
        row, kind, n = options[column]
        result[row] = (kind, n)
    return result


def learned(jobs: list[Job], truth: Truth, unit: Speed, *, rounds: int, by_shape: bool) -> list[tuple[str, int] | None]:
    """Return the assignment after `rounds` in which every placed job reported how fast it ran."""
    seen: dict[tuple[str, str, int], float] = {}
    places = assigned(jobs, predictions(truth, TYPES, seen), unit)
    for _ in range(rounds):
        for job, place in zip(jobs, places, strict=True):
            if place is not None:
                key = job.family, place[0], place[1]
                seen[key] = truth[key]
        places = assigned(jobs, predictions(truth, TYPES, seen, by_shape=by_shape), unit)
    return places


def welfare(jobs: list[Job], places: list[tuple[str, int] | None], truth: Truth) -> float:
    """Return what an assignment is worth by the truth."""
    return sum(
        job.weight * truth[job.family, place[0], place[1]] / truth[job.family, "v100", 1]
        for job, place in zip(jobs, places, strict=True)
        if place is not None
    )


def decision_value(truth: Truth) -> None:
    """Print welfare on predictions over welfare on the truth, per draw of jobs."""
    families = sorted({key[0] for key in truth})
    rows: dict[str, list[float]] = {"blind": [], "one type": [], "each type": []} | {name: [] for name in LEARNED}
    errors: dict[str, list[float]] = {"one type": [], "each type": []}
    each = predictions(truth, TYPES, {})
    one = predictions(truth, ("v100",), {})
    for name, speed in (("one type", one), ("each type", each)):
        errors[name] = [abs(speed(*key) / value - 1) for key, value in truth.items()]

    def unit(family: str, kind: str, n: int) -> float:
        return truth[family, "v100", 1]

    for draw in range(DRAWS):
        random = np.random.default_rng(draw)
        jobs = [
            Job(str(random.choice(families)), int(random.choice(COUNTS)), float(random.lognormal(0, 0.5)))
            for _ in range(JOBS)
        ]
        best = welfare(jobs, assigned(jobs, lambda *key: truth[key], unit), truth)
        chosen = {
            "blind": assigned(jobs, lambda family, _kind, n: truth[family, "v100", 1] * n, unit),
            "one type": assigned(jobs, one, unit),
            "each type": assigned(jobs, each, unit),
        }
        chosen |= {
            "after a run": learned(jobs, truth, unit, rounds=1, by_shape=False),
            "four runs": learned(jobs, truth, unit, rounds=4, by_shape=False),
            "by shape": learned(jobs, truth, unit, rounds=4, by_shape=True),
        }
        for name, places in chosen.items():
            rows[name].append(welfare(jobs, places, truth) / best)
    print(f"decision value: {len(families)} families, {JOBS} jobs on {CAPACITY} GPUs of each of {len(TYPES)} types")
    print(f"{'predictions':12} {'mean error':>10} {'welfare mean':>13} {'worst draw':>11}   of welfare on the truth")
    for name, ratios in rows.items():
        error = f"{100 * np.mean(errors[name]):.1f} %" if name in errors else "-"
        print(f"{name:12} {error:>10} {100 * np.mean(ratios):>11.1f} % {100 * min(ratios):>9.1f} %")


def pricing(rows: int = 1_000_000) -> None:
    """Print how many configurations a core prices in a second, by CPU time."""
    random = np.random.default_rng(0)
    models = 64
    mean, shared = prior()
    own = np.tile(mean, (models, 1))
    own[:, [OWN.index("overhead_s"), OWN.index("sample_s"), OWN.index("transfer_s")]] = np.log([0.05, 0.002, 0.05])
    nodes = random.integers(1, 17, rows).astype(float)
    per_node = random.integers(1, 9, rows).astype(float)
    blank = np.full(rows, np.nan)
    table = StepTable(
        tuple(str(n) for n in range(models)),
        random.integers(0, models, rows),
        (),
        nodes,
        nodes * per_node,
        per_node,
        random.integers(1, 257, rows).astype(float),
        blank,
        blank,
    )
    price = random.random(rows)
    started = time.process_time()
    step, _ = Form(table, 0.1).steps(own, shared)
    surplus = 3.0 * table.batch * table.gpus / step - price * table.gpus
    best = int(np.argmax(surplus))
    spent = time.process_time() - started
    print(f"pricing: {rows / spent / 1e6:.2f} million configurations per second and core ({rows} in {spent:.2f} s CPU)")
    assert surplus[best] == surplus.max()


if __name__ == "__main__":
    pricing()
    if len(sys.argv) > 1:
        decision_value(read(Path(sys.argv[1])))
    else:
        print("decision value: give a table of measured speeds (gpu_type,consolidated,job_type,gpus,steps_per_s)")
