"""Measured speeds: what jobs of a family reached on each GPU type, from the leases that ran them.

Every lease keeps the samples and GPU time that its site reported (`broker.metering`), so the
measurements are already there and survive a restart; this module reads them and asks
`training.speeds` what they say. A family is a tenant's jobs with one workload: speeds of one tenant
never show in another's quote, but for the ratio between two GPU types, which is a median over all.

The market values a job at the lower quartile of its measured speed. Where nothing was measured, it
counts with the figure that the site offers or the catalogue's, as before: both are careful already.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from broker.allocation.snapshot import BITS_PER_S_MAX, FLOPS_PER_S_MAX, JobSpeed
from broker.database.tables import Job, Lease
from training.spec import JobSpec, Workload
from training.speeds import SECONDS_MIN, MeasuredRun, SpeedEstimate, carried, cold, estimate, near, ratios_between

# The newest leases that a round looks at: it must stay short, and old runs say little of today's hosts.
LEASES_READ_MAX: Final = 5_000

Family = tuple[str, int, float, int]


@dataclass(frozen=True, slots=True)
class Speeds:
    """What was measured, by family and GPU type: the runs, and the speeds that agree with them."""

    families: Mapping[Family, Mapping[str, SpeedEstimate]]
    runs: Mapping[Family, Mapping[str, Sequence[MeasuredRun]]]

    def of(self, tenant_id: str, spec: JobSpec) -> dict[str, SpeedEstimate]:
        """Return what is known of a job on each GPU type that it accepts; types that nothing is known of are left out."""
        family = family_of(tenant_id, spec.market.workload)
        known = self.families.get(family, {})
        found = {}
        for request in spec.resources.accelerators:
            if request.gpu_type in known:
                middle = math.sqrt(request.count_min * request.count_max)
                runs = self.runs[family][request.gpu_type]
                found[request.gpu_type] = near(spec.market.workload, known[request.gpu_type], runs, middle)
            elif known:
                nearest = min(known, key=lambda name: (known[name].half_width_log, name))
                ratios = ratios_between(list(self.families.values()), nearest, request.gpu_type)
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


def family_of(tenant_id: str, workload: Workload) -> Family:
    """Return what jobs must have in common to share their measurements."""
    return tenant_id, workload.parameters, workload.flops_per_sample, workload.batch_per_gpu


def read_speeds(session: Session, *, but_site: str | None = None, before_ms: int | None = None) -> Speeds:
    """Return what the newest leases on a single site measured, if asked without a site, and ended before a time."""
    sites = (
        select(Lease.placement_id)
        .group_by(Lease.placement_id)
        .having(func.count() == 1)  # across sites, a lease's pace is the slowest site's and the links'
        .subquery()
    )
    asked = [] if but_site is None else [Lease.site_id != but_site]
    asked += [] if before_ms is None else [Lease.ended_ms < before_ms]
    rows = session.execute(
        select(
            Lease.job_id,
            Lease.gpu_type,
            Lease.gpus,
            Lease.delivered_samples,
            Lease.delivered_gpu_milliseconds,
            Job.tenant_id,
            Job.spec,
        )
        .join(Job, Job.job_id == Lease.job_id)
        .where(
            Lease.placement_id.in_(select(sites.c.placement_id)),
            Lease.delivered_samples > 0,
            Lease.delivered_gpu_milliseconds >= Lease.gpus * int(SECONDS_MIN * 1000),
            *asked,
        )
        .order_by(Lease.active_ms.desc(), Lease.lease_id)
        .limit(LEASES_READ_MAX)
    )
    runs: dict[Family, dict[str, list[MeasuredRun]]] = {}
    workloads: dict[str, Workload] = {}
    for job_id, gpu_type, gpus, samples, gpu_milliseconds, tenant_id, spec in rows:
        if job_id not in workloads:
            workloads[job_id] = Workload.model_validate(json.loads(spec)["market"]["workload"])
        family = family_of(tenant_id, workloads[job_id])
        measured = MeasuredRun(gpus, float(samples), gpu_milliseconds / 1000 / gpus)
        runs.setdefault(family, {}).setdefault(gpu_type, []).append(measured)
    families = {
        family: {gpu_type: estimate(_workload(family), found, cold(gpu_type)) for gpu_type, found in by_type.items()}
        for family, by_type in runs.items()
    }
    return Speeds(families, runs)


def _workload(family: Family) -> Workload:
    _, parameters, flops_per_sample, batch_per_gpu = family
    return Workload(samples=1, parameters=parameters, flops_per_sample=flops_per_sample, batch_per_gpu=batch_per_gpu)
