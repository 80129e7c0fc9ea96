"""What a job should ask for, given its goal: GPU type, count, sites, batch, strategy, codec and period, and why.

Every candidate of the quote is looked at under every batch whose cost is known (the job's own and those of its
profile) and, where its plan leaves that open, under several plans between sites; `training.goals` chooses. What a sample
counts for follows from the noise scale that runs of the family reported and from the strategy (`training.goodput`);
without a reported noise scale all batches count alike, and the job's own stands.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from broker.database.tables import Job, Lease
from broker.errors import RefusedError
from broker.market import Market
from broker.quote import QuotedRow, quote_jobs
from broker.speeds import family_of
from broker.streams import StreamStore, streams_of
from training import goodput
from training.goals import Choice, Goal, Option, Wanted, choose
from training.spec import JobSpec, SyncPlan, Workload

# Periods and codecs that are tried where the plan leaves the strategy open; beyond, quotes would take seconds.
PERIODS: Final = (20, 100, 500)
CODECS: Final = ("int8", "topk2")
BATCHES_MAX: Final = 3
# A topk2 contribution leaves most of the work in its carry: what rounds at a like loss cost more, a prior.
CODEC_EFFICIENCY: Final = {"topk2": 0.95}
NOISE_LEASES: Final = 8
_TAIL_BYTES: Final = 16_384


class NoDeadlineError(RefusedError):
    """A goal that needs a deadline, of a job without one."""

    code = "quote.no_deadline"


@dataclass(frozen=True, slots=True)
class Advice:
    """The chosen candidate with what the job file should say, and the choice's reason.

    `counts` is the share of its samples that count, `noise_batch` the reported noise scale in samples (None: not
    reported), `candidates` how many were looked at.
    """

    row: QuotedRow
    batch_per_gpu: int
    sync: SyncPlan
    counts: float
    noise_batch: float | None
    candidates: int
    reached: bool
    why: str


def advise(market: Market, spec: JobSpec, tenant_id: str, goal: Goal) -> Advice | None:
    """Return the best candidate for a goal at the last prices, None where no site could run the job now.

    Raises NoDeadlineError where the job states no deadline and the goal is to meet it.
    """
    if goal is Goal.DEADLINE and spec.market.deadline_ms is None:
        raise NoDeadlineError("the goal is a deadline, and the job has none; give market.deadline")
    noise = market.database.read(lambda session: reported_noise(session, streams_of(market), tenant_id, spec))
    tried = list(variants(spec))
    rows = [
        (row, variant, counting_share(spec.market.workload, variant, row, noise))
        for variant, found in zip(tried, quote_jobs(market, tried, tenant_id), strict=True)
        for row in found
        if row.possible
    ]
    deadline_ms = spec.market.deadline_ms
    wanted = Wanted(
        goal,
        float(spec.market.workload.samples),
        seconds=None if deadline_ms is None else (deadline_ms - market.clock.now_ms()) / 1000,
        budget_micros=spec.market.budget_micros,
        bid_micros_per_million=spec.bid_micros_per_million_samples,
    )
    chosen = choose([_option(*row) for row in rows], wanted)
    return None if chosen is None else _advice(rows[chosen.place], chosen, noise, len(rows))


def variants(spec: JobSpec) -> Iterator[JobSpec]:
    """Yield the job with each batch and plan that may be tried; its own first.

    Without its deadline, which the choice weighs by chances and not by the rules' yes or no.
    """
    own = spec.market.workload.batch_per_gpu
    others = sorted({row.batch_per_gpu for row in spec.market.profile} - {own})
    plans = [spec.market.sync]
    if spec.market.sync.strategy == "auto" and spec.market.sites_max > 1:
        asked = spec.market.sync
        codecs = CODECS if asked.codec == "auto" else (asked.codec,)
        periods = sorted({asked.period_steps, *PERIODS})
        plans = [
            asked.model_copy(update={"codec": codec, "period_steps": period}) for period in periods for codec in codecs
        ]
        plans.append(SyncPlan(strategy="every_step", patience_s=asked.patience_s))
    for batch in (own, *others[: BATCHES_MAX - 1]):
        workload = spec.market.workload.model_copy(update={"batch_per_gpu": batch})
        for plan in plans:
            yield spec.model_copy(
                update={
                    "market": spec.market.model_copy(update={"workload": workload, "sync": plan, "deadline_ms": None})
                }
            )


def counting_share(stated: Workload, variant: JobSpec, row: QuotedRow, noise_batch: float | None) -> float:
    """Return what a sample of a candidate counts, in samples of the batch that the job's target was stated for.

    That is the job's batch on the fewest GPUs that it accepts.
    """
    sold = row.configuration
    share = goodput.strategy_efficiency(len(sold.parts), sold.sync.period_steps if len(sold.parts) > 1 else 1)
    if len(sold.parts) > 1:
        share *= CODEC_EFFICIENCY.get(sold.sync.codec, 1.0)
    if noise_batch is None:
        return share
    least = min(request.count_min for request in variant.resources.accelerators)
    batch = variant.market.workload.batch_per_gpu * sold.gpus
    return share * goodput.efficiency(noise_batch, batch, stated.batch_per_gpu * least)


def reported_noise(session: Session, streams: StreamStore, tenant_id: str, spec: JobSpec) -> float | None:
    """Return the noise scale in samples that the newest runs of a job's family reported, None where none did."""
    family = family_of(tenant_id, spec.market.workload)
    leases = session.execute(
        select(Lease.lease_id, Job.spec)
        .join(Job, Job.job_id == Lease.job_id)
        .where(Job.tenant_id == tenant_id, Lease.delivered_samples > 0)
        .order_by(Lease.active_ms.desc(), Lease.lease_id)
        .limit(8 * NOISE_LEASES)
    )
    found: list[float] = []
    for lease_id, text in leases:
        workload = Workload.model_validate(json.loads(text)["market"]["workload"])
        if family_of(tenant_id, workload) == family and len(found) < NOISE_LEASES:
            value = newest_noise(streams, lease_id)
            found += [] if value is None else [value]
    return median(found) if found else None


def newest_noise(streams: StreamStore, lease_id: str) -> float | None:
    """Return the last noise scale in the end of a lease's measurements; a tenant's file, so anything may stand there."""
    held = streams.state(lease_id, "metrics").held_bytes
    tail = streams.read(lease_id, "metrics", max(0, held - _TAIL_BYTES), _TAIL_BYTES)
    for line in reversed(tail.splitlines()):
        try:
            value = json.loads(line).get("noise_scale_samples")
            found = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        except (ValueError, AttributeError, RecursionError, OverflowError):
            continue
        if math.isfinite(found) and found > 0:
            return found
    return None


def _option(row: QuotedRow, variant: JobSpec, counts: float) -> Option:
    half = math.log(row.samples_per_s_high / row.samples_per_s_expected)
    return Option(_name(row, variant), row.samples_per_s_expected * counts, half, row.price_micros_per_hour)


def _name(row: QuotedRow, variant: JobSpec) -> str:
    sold = row.configuration
    where = " + ".join(f"{part.gpus} {part.gpu_type} at {part.site_id}" for part in sold.parts)
    name = f"{where}, batch {variant.market.workload.batch_per_gpu}"
    if len(sold.parts) == 1:
        return name
    return f"{name}, {sold.sync.strategy} every {sold.sync.period_steps} steps in {sold.sync.codec}"


def _advice(row: tuple[QuotedRow, JobSpec, float], chosen: Choice, noise: float | None, candidates: int) -> Advice:
    quoted, variant, counts = row
    return Advice(
        row=quoted,
        batch_per_gpu=variant.market.workload.batch_per_gpu,
        sync=quoted.configuration.sync,
        counts=counts,
        noise_batch=noise,
        candidates=candidates,
        reached=chosen.reached,
        why=f"{_name(quoted, variant)}: {chosen.why}",
    )
