"""What a family of jobs was measured to reach on a GPU type, from what sites report while they train.

The market's closed form (`training.throughput`) knows a job's speed inside a site by two figures: the
FLOP/s that one GPU achieves, and the bits/s of the ring. Reports say how many samples so many GPUs
did in how long; `estimate` finds the two figures that agree with them best, starting from the
catalogue, and how far they are still open. What was never measured on one GPU type is carried there
from another by the ratio that other families showed, else by the catalogue's (`carried`).

Plain floats, no numpy: it runs for every job of a round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist, median
from typing import Final

from training.catalogue import GPU_TYPES
from training.spec import Workload
from training.throughput import RING_HOP_S, all_reduce_s, compute_s

# The catalogue is within a factor of e^0.8 for nine families of ten, the ring's bandwidth within e^1.2.
COLD_HALF_WIDTH_LOG: Final = 0.8
_NINE_OF_TEN: Final = 1.645
_PRIOR_FLOPS: Final = COLD_HALF_WIDTH_LOG / _NINE_OF_TEN
_PRIOR_RING: Final = 1.2 / _NINE_OF_TEN
# What a step's mean over a lease scatters between hosts and times.
SCATTER: Final = 0.05
# A lease's time has its start in it: imports, the first batches, a checkpoint read back.
STARTING_S: Final = 20.0
# A run shorter than three times what its time is open by says more about that than about training.
OPEN_SHARE_MAX: Final = 1 / 3
# The least of a run that is counted with its start, and of one that is counted from report to report.
SECONDS_MIN: Final = STARTING_S / OPEN_SHARE_MAX
PACE_SECONDS_MIN: Final = 5.0
# How far a speed is open that was measured at another batch, for each factor of e between them: what a step
# costs whatever its batch is not in the form.
_OTHER_BATCH: Final = 0.25
# How much further a figure is open once it was carried from another GPU type.
CARRIED_HALF_WIDTH_LOG: Final = 0.3
# The market values what is open at this quantile of its speed.
VALUED_QUANTILE: Final = 0.25
_ROUNDS: Final = 25
# Fewer runs than these have no scatter to speak of; more say how unlike the hosts of a type are.
_RUNS_FOR_SCATTER: Final = 4
# How far one count's measurements may pull from the form of all, as a logarithm: a factor of four.
_OFF_MAX: Final = math.log(4)


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    """What `gpus` GPUs of one site did together: samples, and seconds of wall time.

    `open_s` is by how much the time may be off: the start, where it is in it; else about the time between two
    reports. `batch_per_gpu` is None where it was the workload's own.
    """

    gpus: int
    samples: float
    seconds: float
    open_s: float = STARTING_S
    batch_per_gpu: int | None = None

    @property
    def is_usable(self) -> bool:
        """Whether it says something about training."""
        long_enough = self.seconds >= max(self.open_s / OPEN_SHARE_MAX, PACE_SECONDS_MIN)
        return long_enough and self.samples > 0 and self.gpus > 0


@dataclass(frozen=True, slots=True)
class SpeedEstimate:
    """Speeds of one family on one GPU type; `half_width_log` is a 90 % interval of its throughput.

    `measured` is False where the catalogue or another GPU type stands in.
    """

    flops_per_s: float
    ring_bits_per_s: float
    half_width_log: float
    measured: bool

    def at_quantile(self, quantile: float = VALUED_QUANTILE) -> SpeedEstimate:
        """Return the estimate with both speeds moved to a quantile of what they may be."""
        factor = math.exp(NormalDist().inv_cdf(quantile) * self.half_width_log / _NINE_OF_TEN)
        return SpeedEstimate(
            self.flops_per_s * factor, self.ring_bits_per_s * factor, self.half_width_log, self.measured
        )


def cold(gpu_type: str, flops_per_s: float | None = None, ring_bits_per_s: float | None = None) -> SpeedEstimate:
    """Return what is assumed before a family ran on a GPU type: the site's own figures, else the catalogue's."""
    gpu = GPU_TYPES[gpu_type]
    flops = flops_per_s or gpu.peak_flops_per_s * gpu.achieved_share
    return SpeedEstimate(flops, ring_bits_per_s or gpu.intra_site_bits_per_s, COLD_HALF_WIDTH_LOG, measured=False)


def estimate(workload: Workload, runs: Sequence[MeasuredRun], start: SpeedEstimate) -> SpeedEstimate:
    """Return the two speeds that agree best with `runs`, drawn towards `start` where they leave them open.

    Runs that are not usable are left out; without any other, `start` is returned. Gauss-Newton on log
    steps with a pseudo-Huber loss, so that one run beside a noisy neighbour does not move it far.
    """
    usable = [run for run in runs if run.is_usable]
    if not usable:
        return start
    at_start = math.log(start.flops_per_s), math.log(start.ring_bits_per_s)
    log_flops, log_ring = at_start
    precision = (0.0, 0.0, 0.0)
    for _ in range(_ROUNDS):
        a, b, c = 1 / _PRIOR_FLOPS**2, 0.0, 1 / _PRIOR_RING**2
        p = (at_start[0] - log_flops) * a
        q = (at_start[1] - log_ring) * c
        for run in usable:
            batch = run.batch_per_gpu or workload.batch_per_gpu
            step, computing, moving = _step(workload, batch, run.gpus, math.exp(log_flops), math.exp(log_ring))
            residual = math.log(_measured_step_s(workload, run) / step)
            unlike = _OTHER_BATCH * math.log(batch / workload.batch_per_gpu)
            sigma = math.hypot(SCATTER, run.open_s / run.seconds, unlike)
            weight = 1 / sigma**2 / math.sqrt(1 + (residual / (2 * sigma)) ** 2)
            by_flops, by_ring = -computing / step, -moving / step
            a += weight * by_flops**2
            b += weight * by_flops * by_ring
            c += weight * by_ring**2
            p += weight * by_flops * residual
            q += weight * by_ring * residual
        determinant = a * c - b * b
        precision = (a, b, c)
        # A step is kept short, since the form is not linear in the logarithms.
        log_flops += max(-1.0, min(1.0, (c * p - b * q) / determinant))
        log_ring += max(-1.0, min(1.0, (a * q - b * p) / determinant))
    a, b, c = precision
    largest = max(usable, key=lambda run: (run.gpus, run.seconds))
    step, computing, moving = _step(
        workload, workload.batch_per_gpu, largest.gpus, math.exp(log_flops), math.exp(log_ring)
    )
    g, h = computing / step, moving / step
    scatter = max(SCATTER, _scatter(workload, usable, math.exp(log_flops), math.exp(log_ring)))
    open_still = (c * g * g - 2 * b * g * h + a * h * h) / (a * c - b * b)
    half = _NINE_OF_TEN * math.sqrt(open_still + scatter**2)
    return SpeedEstimate(math.exp(log_flops), math.exp(log_ring), min(half, COLD_HALF_WIDTH_LOG), measured=True)


def near(workload: Workload, found: SpeedEstimate, runs: Sequence[MeasuredRun], gpus: float) -> SpeedEstimate:
    """Return an estimate that agrees with what was measured at the count nearest to `gpus`.

    The closed form cannot bend everywhere as real scaling does (caches that fit, links that share);
    near a measured count the measurement is the better witness. Both speeds move by one factor, so
    that the form keeps its shape around it. Long runs count for more, those at another batch not at all.
    """
    usable = [run for run in runs if run.is_usable and run.batch_per_gpu in {None, workload.batch_per_gpu}]
    if not usable or not found.measured:
        return found
    nearest = min({run.gpus for run in usable}, key=lambda count: (abs(math.log(count / gpus)), -count))
    there = [run for run in usable if run.gpus == nearest]
    form = samples_per_s(workload, nearest, found)
    time_s = sum(run.seconds for run in there)
    off = sum(run.seconds * math.log(run.samples / run.seconds / form) for run in there) / time_s
    factor = math.exp(max(-_OFF_MAX, min(_OFF_MAX, off)))
    return replace(found, flops_per_s=found.flops_per_s * factor, ring_bits_per_s=found.ring_bits_per_s * factor)


def carried(source: SpeedEstimate, from_type: str, to_type: str, ratios: Sequence[float]) -> SpeedEstimate:
    """Return a family's speeds on a GPU type where it has not run, from one where it has.

    `ratios` are other families' FLOP/s on `to_type` over `from_type`; their median counts.
    """
    there, here = cold(to_type), cold(from_type)
    ratio = median(ratios) if ratios else there.flops_per_s / here.flops_per_s
    half = math.hypot(source.half_width_log, CARRIED_HALF_WIDTH_LOG)
    return SpeedEstimate(
        source.flops_per_s * ratio, there.ring_bits_per_s, min(half, COLD_HALF_WIDTH_LOG), measured=False
    )


def ratios_between(families: Sequence[Mapping[str, SpeedEstimate]], from_type: str, to_type: str) -> list[float]:
    """Return the FLOP/s on `to_type` over those on `from_type` of each family measured on both."""
    return [
        family[to_type].flops_per_s / family[from_type].flops_per_s
        for family in families
        if from_type in family and to_type in family and family[from_type].measured and family[to_type].measured
    ]


def samples_per_s(workload: Workload, gpus: int, speeds: SpeedEstimate) -> float:
    """Return the throughput of `gpus` GPUs of one site."""
    step_s, _, _ = _step(workload, workload.batch_per_gpu, gpus, speeds.flops_per_s, speeds.ring_bits_per_s)
    return workload.batch_per_gpu * gpus / step_s


def chance_within(seconds_predicted: float, seconds_allowed: float, half_width_log: float) -> float:
    """Return the probability that work predicted to take so long is done within what is allowed."""
    if seconds_allowed <= 0:
        return 0.0
    if seconds_predicted <= 0:
        return 1.0
    return NormalDist().cdf(math.log(seconds_allowed / seconds_predicted) * _NINE_OF_TEN / max(half_width_log, 1e-9))


def _scatter(workload: Workload, runs: Sequence[MeasuredRun], flops_per_s: float, ring_bits_per_s: float) -> float:
    """Return how far runs lie from the form, as a robust standard deviation; nought where there are too few."""
    if len(runs) < _RUNS_FOR_SCATTER:
        return 0.0
    off = [
        abs(math.log(_measured_step_s(workload, run) / step))
        for run in runs
        for step, _, _ in (
            _step(workload, run.batch_per_gpu or workload.batch_per_gpu, run.gpus, flops_per_s, ring_bits_per_s),
        )
    ]
    return 1.4826 * median(off)


def _measured_step_s(workload: Workload, run: MeasuredRun) -> float:
    return (run.batch_per_gpu or workload.batch_per_gpu) * run.gpus * run.seconds / run.samples


def _step(
    workload: Workload, batch_per_gpu: int, gpus: int, flops_per_s: float, ring_bits_per_s: float
) -> tuple[float, float, float]:
    """Return a step's seconds, those of computing, and those that the ring's bandwidth sets."""
    computing = compute_s(float(batch_per_gpu), workload.flops_per_sample, flops_per_s)
    reducing = all_reduce_s(float(workload.parameters), gpus, ring_bits_per_s)
    return computing + reducing, computing, reducing - 2 * (gpus - 1) * RING_HOP_S
