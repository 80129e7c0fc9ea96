"""Measured speeds: what jobs of a family reached on each GPU type, from the leases that ran them.

Every lease keeps the samples and GPU time that its site reported (`broker.metering`), so the
measurements are already there and survive a restart; this module reads them, those of leases that still
run too, and asks `training.speeds` what they say. Two reports with samples give a pace without the start of the
script; where there are fewer, the whole lease counts, its start in it. A family is a tenant's jobs with one model: speeds
of one tenant never show in another's quote, but for the ratio between two GPU types, which is a median over all.

A lease that was part of a span paces like its slowest member and waits for the links: what the links were predicted
to take is subtracted, and it tells something of a GPU type only where all members had that one.

Before a family ran on a GPU type, the profile in its job file stands in (`hansa profile`).

The market values a job at the lower quartile of its measured speed. Where nothing was measured, it
counts with the figure that the site offers or the catalogue's, as before: both are careful already.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import func, literal, or_, select
from sqlalchemy.orm import Session, aliased

from broker.allocation.configuration import Configuration
from broker.allocation.snapshot import BITS_PER_S_MAX, FLOPS_PER_S_MAX, JobSpeed
from broker.database.tables import Job, Lease, Placement
from training.spec import JobSpec, MarketTerms, Workload
from training.speeds import (
    PACE_SECONDS_MIN,
    SECONDS_MIN,
    MeasuredRun,
    SpeedEstimate,
    carried,
    cold,
    estimate,
    near,
    ratios_between,
    samples_per_s,
)

# The newest leases that a round looks at: it must stay short, and old runs say little of today's hosts.
LEASES_READ_MAX: Final = 5_000
# A family's newest runs on a GPU type say it all; a round asks for many families.
RUNS_MAX: Final = 64
# What the links add where a configuration spans sites: their bandwidth is probed, not promised.
LINKS_HALF_WIDTH_LOG: Final = 0.1
# How far a profile's step lies from that in a site's sandbox, on its host, among its neighbours.
PROFILE_OPEN_SHARE: Final = 0.15
# Of a span's measured step at least this much is its GPUs', whatever the links were predicted to take.
_COMPUTED_SHARE_MIN: Final = 0.2

Family = tuple[str, int, float]


@dataclass(frozen=True, slots=True)
class ExpectedSpeed:
    """What a configuration is expected to reach in samples/s by what was measured so far, with a 90 % interval."""

    samples_per_s: float
    half_width_log: float

    @property
    def low(self) -> float:
        """The interval's low end."""
        return self.samples_per_s / math.exp(self.half_width_log)

    @property
    def high(self) -> float:
        """The interval's high end."""
        return self.samples_per_s * math.exp(self.half_width_log)


@dataclass(frozen=True, slots=True)
class Speeds:
    """What was measured: the runs by family and GPU type, and the speeds that agree with them.

    `market` is what all families measured, where `runs` are one family's with its job's profile.
    """

    runs: Mapping[Family, Mapping[str, Sequence[MeasuredRun]]]
    market: Speeds | None = None
    _families: dict[tuple[Family, int], dict[str, SpeedEstimate]] = field(default_factory=dict)
    _ratios: dict[tuple[str, str], Sequence[float]] = field(default_factory=dict)

    def of(self, tenant_id: str, spec: JobSpec) -> dict[str, SpeedEstimate]:
        """Return what is known of a job on each GPU type that it accepts; types that nothing is known of are left out."""
        profiled = self._profiled(tenant_id, spec)
        if profiled is not None:
            return profiled.of(tenant_id, spec.model_copy(update={"market": _unprofiled(spec.market)}))
        family = family_of(tenant_id, spec.market.workload)
        known = self._family(family, spec.market.workload.batch_per_gpu)
        found = {}
        for request in spec.resources.accelerators:
            if request.gpu_type in known:
                middle = math.sqrt(request.count_min * request.count_max)
                runs = self.runs[family][request.gpu_type]
                found[request.gpu_type] = near(spec.market.workload, known[request.gpu_type], runs, middle)
            elif known:
                nearest = min(known, key=lambda name: (known[name].half_width_log, name))
                ratios = (self.market or self).ratios(nearest, request.gpu_type)
                found[request.gpu_type] = carried(known[nearest], nearest, request.gpu_type, ratios)
        return found

    def valued(self, tenant_id: str, spec: JobSpec) -> tuple[JobSpeed, ...]:
        """Return the speeds that the market counts with: the lower quartile of what is known."""
        family = family_of(tenant_id, spec.market.workload)
        rows = []
        for gpu_type, known in sorted(self.of(tenant_id, spec).items()):
            lower = known.at_quantile()
            # A family that ran on single GPUs alone says nothing of a ring: the pool's own counts.
            several = any(run.gpus > 1 for run in self.runs.get(family, {}).get(gpu_type, ()))
            ring = min(lower.ring_bits_per_s, BITS_PER_S_MAX) if several else None
            rows.append(
                JobSpeed(gpu_type=gpu_type, flops_per_s=min(lower.flops_per_s, FLOPS_PER_S_MAX), ring_bits_per_s=ring)
            )
        return tuple(rows)

    def expected(self, tenant_id: str, spec: JobSpec, sold: Configuration) -> ExpectedSpeed | None:
        """Return what a placed configuration will reach by now's measurements; None where its family has none there."""
        workload = spec.market.workload
        family = family_of(tenant_id, workload)
        known = self._family(family, workload.batch_per_gpu)
        if any(part.gpu_type not in known for part in sold.parts):
            return None
        step_s, half = 0.0, 0.0
        for part in sold.parts:
            runs = self.runs[family][part.gpu_type]
            there = near(workload, known[part.gpu_type], runs, part.gpus)
            step_s = max(step_s, workload.batch_per_gpu * part.gpus / samples_per_s(workload, part.gpus, there))
            half = max(half, there.half_width_log)
        if len(sold.parts) > 1:
            half = math.hypot(half, LINKS_HALF_WIDTH_LOG)
        return ExpectedSpeed(workload.batch_per_gpu * sold.gpus / (step_s + sold.inter_site_s), half)

    def _profiled(self, tenant_id: str, spec: JobSpec) -> Speeds | None:
        """Return what is known with the job's own profile, which counts where its family has not run; None without one.

        A profile is of one GPU, in the tenant's own hands.
        """
        family = family_of(tenant_id, spec.market.workload)
        known = self.runs.get(family, {})
        rows = [row for row in spec.market.profile if row.gpu_type not in known]
        if not rows:
            return None
        own: dict[str, list[MeasuredRun]] = {}
        for row in rows:
            seconds = row.steps * row.step_s
            open_s = PROFILE_OPEN_SHARE * seconds
            run = MeasuredRun(1, float(row.steps * row.batch_per_gpu), seconds, open_s, row.batch_per_gpu)
            own.setdefault(row.gpu_type, []).append(run)
        return Speeds({family: {**known, **own}}, market=self)

    def _family(self, family: Family, batch_per_gpu: int) -> dict[str, SpeedEstimate]:
        """Return a family's speeds at a batch; runs at others count too, for less."""
        key = family, batch_per_gpu
        if key not in self._families:
            _, parameters, flops_per_sample = family
            workload = Workload(
                samples=1, parameters=parameters, flops_per_sample=flops_per_sample, batch_per_gpu=batch_per_gpu
            )
            found = {
                gpu_type: estimate(workload, runs, cold(gpu_type))
                for gpu_type, runs in self.runs.get(family, {}).items()
            }
            self._families[key] = {gpu_type: each for gpu_type, each in found.items() if each.measured}
        return self._families[key]

    def ratios(self, known: str, wanted: str) -> Sequence[float]:
        """Return how two GPU types compare in every family that ran on both, each at the batch that it ran at last.

        Kept: a round asks for many jobs, and each answer looks at all families.
        """
        if (known, wanted) not in self._ratios:
            newest = {family: next(iter(by_type.values()))[0] for family, by_type in self.runs.items()}
            families = [self._family(family, run.batch_per_gpu or 1) for family, run in newest.items()]
            self._ratios[known, wanted] = ratios_between(families, known, wanted)
        return self._ratios[known, wanted]


def _unprofiled(terms: MarketTerms) -> MarketTerms:
    return terms.model_copy(update={"profile": ()})


def family_of(tenant_id: str, workload: Workload) -> Family:
    """Return what jobs must have in common to share their measurements: whose they are, and which model."""
    return tenant_id, workload.parameters, workload.flops_per_sample


def read_speeds(
    session: Session, *, tenant_id: str | None = None, but_site: str | None = None, before_ms: int | None = None
) -> Speeds:
    """Return what the newest leases measured, if asked only a tenant's, without a site, or ended before a time."""
    member = aliased(Lease)
    sites = select(func.count()).where(member.placement_id == Lease.placement_id).scalar_subquery()
    # Of a gang of several types one's pace is the other's.
    mixed = select(member.lease_id).where(member.placement_id == Lease.placement_id, member.gpu_type != Lease.gpu_type)
    asked = [] if but_site is None else [Lease.site_id != but_site]
    asked += [] if before_ms is None else [Lease.ended_ms < before_ms]
    asked += [] if tenant_id is None else [Job.tenant_id == tenant_id]
    rows = session.execute(
        select(Lease, sites, Placement.award, Job.tenant_id, Job.spec)
        .join(Placement, Placement.placement_id == Lease.placement_id)
        .join(Job, Job.job_id == Lease.job_id)
        .where(
            Lease.delivered_samples > literal(0, literal_execute=True),  # as the index `leases_by_start` states it
            ~mixed.exists(),
            or_(
                Lease.delivered_gpu_milliseconds >= Lease.gpus * round(SECONDS_MIN * 1000),
                Lease.pace_to_gpu_milliseconds - Lease.pace_from_gpu_milliseconds
                >= Lease.gpus * round(PACE_SECONDS_MIN * 1000),
            ),
            *asked,
        )
        .order_by(Lease.active_ms.desc(), Lease.lease_id)
        .limit(LEASES_READ_MAX)
    )
    runs: dict[Family, dict[str, list[MeasuredRun]]] = {}
    workloads: dict[str, Workload] = {}
    for lease, sites, award, owner, spec in rows:
        if lease.job_id not in workloads:
            workloads[lease.job_id] = Workload.model_validate(json.loads(spec)["market"]["workload"])
        workload = workloads[lease.job_id]
        inter_site_s = _inter_site_s(json.loads(award)) if sites > 1 else 0.0
        run = measured_run(lease, workload.batch_per_gpu, inter_site_s)
        known = runs.setdefault(family_of(owner, workload), {}).setdefault(lease.gpu_type, [])
        if run.is_usable and len(known) < RUNS_MAX:
            known.append(run)
    return Speeds(
        {
            family: {gpu_type: found for gpu_type, found in by_type.items() if found}
            for family, by_type in runs.items()
            if any(by_type.values())
        }
    )


def measured_run(lease: Lease, batch_per_gpu: int, inter_site_s: float) -> MeasuredRun:
    """Return what a lease's reports say of its GPUs, without what its span's links were predicted to take of a step."""
    began = lease.pace_from_gpu_milliseconds
    paced = MeasuredRun(0, 0.0, 0.0)
    if began is not None and lease.pace_reports:
        seconds = (lease.pace_to_gpu_milliseconds - began) / 1000 / lease.gpus
        samples = float(lease.delivered_samples - lease.pace_from_samples)
        paced = MeasuredRun(lease.gpus, samples, seconds, seconds / lease.pace_reports, batch_per_gpu)
    whole_s = lease.delivered_gpu_milliseconds / 1000 / lease.gpus
    whole = MeasuredRun(lease.gpus, float(lease.delivered_samples), whole_s, batch_per_gpu=batch_per_gpu)
    run = paced if paced.is_usable else whole
    if inter_site_s <= 0:
        return run
    between_s = run.samples / (batch_per_gpu * lease.gpus) * inter_site_s
    computing_s = max(run.seconds - between_s, _COMPUTED_SHARE_MIN * run.seconds)
    # Links are open by themselves: what they took is known as well as they are.
    open_s = min(run.open_s, run.seconds) * computing_s / run.seconds + LINKS_HALF_WIDTH_LOG * (
        run.seconds - computing_s
    )
    return MeasuredRun(run.gpus, run.samples, computing_s, open_s, batch_per_gpu)


def _inter_site_s(award: dict[str, Any]) -> float:
    return float(award["configuration"]["inter_site_s"])
