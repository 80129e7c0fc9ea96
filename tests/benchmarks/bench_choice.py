"""Choices by goal on predicted speeds, beside the best of all configurations tried.

    python tests/benchmarks/bench_choice.py [--steps step_times.csv] [--types gavel_throughputs.csv]

The reference is exhaustive: every configuration of a table with its measured speed. `training.goals` chooses among the same
configurations on predictions, as `hansa quote --goal` does. What a choice comes to is always counted with the measured
speeds: for a deadline and a budget the best cost or time over that of the choice, for value the surplus over the best.
A choice that misses its deadline or budget by more than 5 % counts as nothing.

    --steps   step times by nodes, GPUs and batch: fitted on up to 4 nodes, chosen among all up to 16
    --types   Gavel's form, three GPU types by count: a profile of one GPU of each type, larger counts by the closed form

`once more` is the same after the chosen configurations have run once and were measured, as the market learns them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from tests.benchmarks.bench_throughput import COLD, COUNTS, TYPES, read, workload_of
from training.goals import Goal, Option, Wanted, choose
from training.speeds import SCATTER, MeasuredRun, SpeedEstimate, estimate, near, samples_per_s
from training.steptimes.model import fit_model
from training.steptimes.table import read_table

# Prices are made up: nodes are rented whole; types cost as cloud lists had them, in about these ratios.
T4_MICROS_PER_HOUR = 600_000
TYPE_MICROS_PER_HOUR = {"k80": 450_000, "p100": 1_460_000, "v100": 2_480_000}
SAMPLES = 1e8
TOLERANCE = 1.05
MEASURED_HALF = 1.645 * SCATTER
# Figures of a goal, from tight to loose: where the goal's figure lies between its best and its worst possible value.
PLACES = (0.1, 0.3, 0.5, 0.7, 0.9)
MORE_RUNS = 3

Truth = Sequence[float]
Score = tuple[float, bool]


def cases(options: Sequence[Option], truth: Truth) -> list[Wanted]:
    """Return goals that are neither free nor out of reach for a model, by its measured speeds."""
    real = [
        Option(o.name, speed, MEASURED_HALF, o.price_micros_per_hour) for o, speed in zip(options, truth, strict=True)
    ]
    times = sorted(SAMPLES / option.samples_per_s for option in real)
    costs = sorted(option.total_micros(SAMPLES) for option in real)
    a_million = sorted(cost / SAMPLES * 1e6 for cost in costs)

    def between(values: list[float], place: float) -> float:
        return math.exp((1 - place) * math.log(values[0] * 1.1) + place * math.log(values[-1]))

    found = []
    for place in PLACES:
        found.append(Wanted(Goal.DEADLINE, SAMPLES, seconds=between(times, place)))
        found.append(Wanted(Goal.BUDGET, SAMPLES, budget_micros=round(between(costs, place))))
        found.append(Wanted(Goal.VALUE, SAMPLES, bid_micros_per_million=round(2 * between(a_million, place))))
    return found


def worth(option: Option, wanted: Wanted) -> float:
    """Return what a configuration is worth to a goal by its measured speed: more is better, nought where it misses."""
    seconds, cost = SAMPLES / option.samples_per_s, option.total_micros(SAMPLES)
    if wanted.goal is Goal.DEADLINE:
        assert wanted.seconds is not None
        return 1 / cost if seconds <= TOLERANCE * wanted.seconds else 0.0
    if wanted.goal is Goal.BUDGET:
        assert wanted.budget_micros is not None
        return 1 / seconds if cost <= TOLERANCE * wanted.budget_micros else 0.0
    surplus = option.samples_per_s * 3600 * (wanted.bid_micros_per_million or 0) / 1e6 - option.price_micros_per_hour
    return max(0.0, surplus)


def best_of(options: Sequence[Option], wanted: Wanted) -> float:
    """Return the most that any configuration is worth, none of them by the tolerance."""
    strict = [
        worth(option, wanted)
        for option in options
        if wanted.goal is not Goal.DEADLINE or SAMPLES / option.samples_per_s <= (wanted.seconds or 0)
        if wanted.goal is not Goal.BUDGET or option.total_micros(SAMPLES) <= (wanted.budget_micros or 0)
    ]
    return max(strict, default=0.0)


def scores(options: Sequence[Option], truth: Truth, more_runs: int) -> dict[Goal, list[float]]:
    """Return worth of choice over worth of best, after so many runs of what was chosen before."""
    real = [
        Option(o.name, speed, MEASURED_HALF, o.price_micros_per_hour) for o, speed in zip(options, truth, strict=True)
    ]
    found: dict[Goal, list[float]] = {goal: [] for goal in Goal}
    for wanted in cases(options, truth):
        best = best_of(real, wanted)
        if best <= 0:
            continue
        known = list(options)
        place = -1
        for _ in range(more_runs + 1):
            choice = choose(known, wanted)
            assert choice is not None
            if choice.place == place:
                break
            place = choice.place
            known[place] = real[place]
        found[wanted.goal].append(min(1.0, worth(real[place], wanted) / best))
    return found


def of_steps(path: Path) -> list[tuple[str, list[Option], list[float]]]:
    """Return each model's configurations with predictions of a fit on up to 4 nodes, and their measured speeds."""
    table = read_table(path)
    model = fit_model(table.where(table.nodes <= 4))
    step, half = model.predict_table(table)
    found = []
    for index, name in enumerate(table.models):
        shapes: dict[tuple[float, float, float], list[int]] = {}
        for row in np.flatnonzero(table.model == index):
            if table.gpus[row] == table.nodes[row] * table.node_gpus[row]:
                shapes.setdefault((table.nodes[row], table.gpus[row], table.batch[row]), []).append(int(row))
        options, truth = [], []
        for (nodes, gpus, batch), rows in sorted(shapes.items()):
            samples = batch * gpus
            options.append(
                Option(
                    f"{nodes:.0f} nodes x {gpus / nodes:.0f}, batch {batch:.0f}",
                    samples / float(np.median(step[rows])),
                    float(np.median(half[rows])),
                    round(T4_MICROS_PER_HOUR * gpus),
                )
            )
            truth.append(samples / float(np.median(table.step_s[rows])))
        found.append((name, options, truth))
    return found


def of_types(path: Path) -> list[tuple[str, list[Option], list[float]]]:
    """Return each family's configurations, all batches of a model together, predicted from one GPU of each type."""
    truth = read(path)
    families: dict[str, list[str]] = {}
    for family in sorted({key[0] for key in truth}):
        families.setdefault(family.split(" (", maxsplit=1)[0], []).append(family)
    found = []
    for model, batches in families.items():
        options, speeds = [], []
        for family in batches:
            for kind in TYPES:
                one = truth[family, kind, 1]
                run = MeasuredRun(1, one * 600, 600.0)
                work = workload_of(family)
                start = SpeedEstimate(one * work.flops_per_sample, COLD[kind].ring_bits_per_s, 0.8, measured=False)
                known = near(work, estimate(work, [run], start), [run], 1)
                for count in COUNTS:
                    options.append(
                        Option(
                            f"{count} {kind}, {family}",
                            samples_per_s(work, count, known),
                            known.half_width_log if count == 1 else 0.3,
                            TYPE_MICROS_PER_HOUR[kind] * count,
                        )
                    )
                    speeds.append(truth[family, kind, count])
        found.append((model, options, speeds))
    return found


def show(title: str, models: Sequence[tuple[str, list[Option], list[float]]]) -> None:
    """Print a table of choices over the best of all, at once and after some runs."""
    tried = sum(len(options) for _, options, _ in models)
    print(f"{title}: {len(models)} models, {tried} configurations; choice over the best of all")
    print(f"{'goal':10} {'runs':>4} {'cases':>6} {'mean':>8} {'median':>8} {'within 5 %':>11} {'missed':>7}")
    for runs in (0, MORE_RUNS):
        gathered: Mapping[Goal, list[float]] = {goal: [] for goal in Goal}
        for _, options, truth in models:
            for goal, ratios in scores(options, truth, runs).items():
                gathered[goal].extend(ratios)
        everything = [ratio for ratios in gathered.values() for ratio in ratios]
        for name, ratios in (*((str(goal), gathered[goal]) for goal in Goal), ("all", everything)):
            print(
                f"{name:10} {runs:>4} {len(ratios):>6} {100 * np.mean(ratios):>6.1f} % {100 * np.median(ratios):>6.1f} % "
                f"{100 * np.mean(np.array(ratios) >= 0.95):>9.0f} % {sum(ratio == 0 for ratio in ratios):>7}"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=Path)
    parser.add_argument("--types", type=Path)
    asked = parser.parse_args()
    sources: list[tuple[str, Path | None, Callable[[Path], list[tuple[str, list[Option], list[float]]]]]] = [
        ("nodes and batch", asked.steps, of_steps),
        ("GPU type, count and batch", asked.types, of_types),
    ]
    for title, path, load in sources:
        if path is not None:
            show(title, load(path))
    if asked.steps is None and asked.types is None:
        print("choices by goal: give --steps or --types, tables of measured speeds")
