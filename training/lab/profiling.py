"""Measure what a step of a script costs on this machine, by running the script itself as one rank for some seconds.

The script runs as in the market: through `training.join`, with a gateway of its own, as the only rank of one site. Two
batch sizes tell what a step costs whatever its batch is. What comes out stands in the job file as `market.profile`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from training.clock import Clock, SystemClock
from training.lab.errors import LabError
from training.lab.federation import Federation, read_rows
from training.spec import SAMPLES_MAX, JobSpec, ProfileTerms, SyncPlan

# A slot is kept for no longer than this, both batches together.
SECONDS_MAX: Final = 20.0
# Short rounds, so that many steps are timed in little time; the first rounds warm up and are not counted.
_PERIOD_STEPS: Final = 4
_WARMING_ROUNDS: Final = 2
_ROUNDS_MIN: Final = 3
_POLL_S: Final = 0.1
# Until the script joins: imports and its data are the machine's affair, not the slot's.
_JOIN_S_MAX: Final = 300.0

Progress = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class StepCost:
    """What steps of one batch took: the median step, and how many were timed."""

    batch_per_gpu: int
    step_s: float
    steps: int


@dataclass(frozen=True, slots=True)
class Profile:
    """A script's cost on one slot of a GPU type; `used_s` is for how long it trained there."""

    gpu_type: str
    costs: tuple[StepCost, ...]
    used_s: float

    @property
    def sample_s(self) -> float:
        """What one sample more costs a step: of two batches, the slope; of one, all of the step."""
        small, big = self.costs[0], self.costs[-1]
        if small.batch_per_gpu == big.batch_per_gpu:
            return big.step_s / big.batch_per_gpu
        return max(0.0, (big.step_s - small.step_s) / (big.batch_per_gpu - small.batch_per_gpu))

    @property
    def overhead_s(self) -> float:
        """What a step costs whatever its batch is."""
        return max(0.0, self.costs[-1].step_s - self.sample_s * self.costs[-1].batch_per_gpu)

    def terms(self) -> tuple[ProfileTerms, ...]:
        """Return the rows of a job file's `market.profile`."""
        return tuple(
            ProfileTerms(
                gpu_type=self.gpu_type,
                batch_per_gpu=cost.batch_per_gpu,
                steps=cost.steps,
                step_s=float(f"{cost.step_s:.4g}"),
            )
            for cost in self.costs
        )


def profile(
    spec: JobSpec,
    workdir: Path,
    gpu_type: str,
    *,
    progress: Progress,
    seconds: float = SECONDS_MAX,
    seed: int = 1,
    clock: Clock | None = None,
) -> Profile:
    """Run the job's script on one slot for at most `seconds` of training, at its own batch and at half of it.

    `progress` is told the seconds used so far. Raises LabError where the script fails or is too slow to time.
    """
    batch = spec.market.workload.batch_per_gpu
    batches = sorted({max(1, batch // 2), batch})
    left_s, costs = min(seconds, SECONDS_MAX), list[StepCost]()
    watch = _Watch(clock or SystemClock(), progress)
    for place, each in enumerate(batches):
        costs.append(_timed(spec, workdir, each, (left_s - watch.used_s) / (len(batches) - place), seed, watch))
    return Profile(gpu_type, tuple(costs), watch.used_s)


def cost_of(rows: Sequence[dict[str, Any]], batch_per_gpu: int) -> StepCost | None:
    """Return what the metrics of a rank say of its steps; None while there are too few rounds."""
    steps = [float(row["step_s"]) for row in rows if row.get("sites_merged") is not None and row.get("step_s")]
    counted = steps[_WARMING_ROUNDS:]
    if len(counted) < _ROUNDS_MIN:
        return None
    return StepCost(batch_per_gpu, median(counted), len(counted) * _PERIOD_STEPS)


@dataclass(slots=True)
class _Watch:
    """Counts the seconds that a slot trained, over both runs."""

    clock: Clock
    progress: Progress
    used_s: float = 0.0

    def run(self, federation: Federation, seconds: float) -> None:
        """Let the script train for so long from its first report on, and count it."""
        waits_until_s = self.clock.monotonic_s() + _JOIN_S_MAX
        while federation.running() and not read_rows(federation.sites[0].metrics):
            if self.clock.monotonic_s() > waits_until_s:
                raise LabError(f"the script trained no step within {_JOIN_S_MAX:.0f} s; does it call training.join?")
            federation.wait(_POLL_S)
        before_s, started_s = self.used_s, self.clock.monotonic_s()
        while federation.running() and (now_s := self.clock.monotonic_s() - started_s) < seconds:
            self.used_s = before_s + now_s
            self.progress(self.used_s)
            federation.wait(min(_POLL_S, seconds - now_s))
        self.used_s = before_s + self.clock.monotonic_s() - started_s
        self.progress(self.used_s)


def _timed(spec: JobSpec, workdir: Path, batch: int, seconds: float, seed: int, watch: _Watch) -> StepCost:  # noqa: PLR0917  what one run is
    """Run the script with a batch for some seconds and return what its steps cost."""
    workload = spec.market.workload.model_copy(update={"batch_per_gpu": batch, "samples": SAMPLES_MAX})
    long = spec.model_copy(update={"market": spec.market.model_copy(update={"workload": workload})})
    plan = SyncPlan(strategy="local", codec="fp32", period_steps=_PERIOD_STEPS, checkpoint_rounds=10_000)
    with Federation.of(long, plan, workdir, sites=1, seed=seed) as federation:
        watch.run(federation, seconds)
        cost = cost_of(read_rows(federation.sites[0].metrics), batch)
    if cost is None:
        needed = (_WARMING_ROUNDS + _ROUNDS_MIN) * _PERIOD_STEPS
        raise LabError(
            f"the script took fewer than {needed} steps of {batch} samples in {seconds:.1f} s; lower batch_per_gpu, or "
            "profile on a faster slot"
        )
    return cost
