"""When jobs will start and finish: stated as intervals, kept as stated, scored by what came.

Level-triggered: each pass states what is missing (a start and a finish for each job that waits, a finish anew for each
epoch in which it runs) and scores what is known by now. Nothing of the market depends on it.

How a wait is guessed: where enough GPUs of an accepted type are free, a few heartbeats; else until what runs has
freed enough for those that wait before it and for itself. Prices are not looked at: the record of former guesses says
how far off that is (`broker.intervals`), and the interval widens by it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from broker.database.forecasts import Forecast
from broker.database.standing import PLACEMENT_STANDS
from broker.database.tables import Gpu, Job, Lease, LeasedGpu, Placement, Pool, Site
from broker.intervals import Interval, Outcome, interval
from broker.market import Market
from broker.transitions import FINAL_JOB_STATES, JobState, PlacementState, SiteState
from training.spec import JobSpec
from training.speeds import STARTING_S, cold, samples_per_s

# Of each kind in one pass; what is left over comes with the next.
STATED_MAX: Final = 100
SCORED_MAX: Final = 500
RECORD_READ_MAX: Final = 200
START, FINISH = "start", "finish"
# A round when the bell rings, the proposal with the next heartbeat, the confirmation, and what comes back to it.
HEARTBEATS_TO_START: Final = 3
# How far a first guess may be off, as a logarithm, before a family has a record of its own.
FIRST_HALF_WIDTHS: Final = {"start/free": 1.2, "start/queue": 1.6, "finish/waiting": 1.8, "finish/running": 0.9}


@dataclass(frozen=True, slots=True)
class _Running:
    """A placement that runs: when its job should be done, and the GPUs of each type that it frees then."""

    left_s: float
    gpus: dict[str, int]


def keep_forecasts(market: Market) -> int:
    """State and score what is due; return how many rows were written."""
    # What it takes to say something new, a look at every job that waits or runs, holds up nobody's write.
    stated = market.database.read(lambda session: _stated(session, market))
    if not stated and not market.database.read(lambda session: _unscored(session, 1)):
        return 0

    def work(session: Session) -> int:
        fresh = [values for values in stated if _is_due(session, values)]
        session.add_all(Forecast(**values) for values in fresh)
        session.flush()
        return len(fresh) + _score(session, market.clock.now_ms())

    return market.database.write("forecasts", work)


def _is_due(session: Session, values: dict[str, Any]) -> bool:
    """Return whether nobody has stated it meanwhile, and the job has not gone on."""
    if session.get(Forecast, (values["job_id"], values["what"], values["number"])) is not None:
        return False
    state, epoch = session.execute(select(Job.state, Job.epoch).where(Job.job_id == values["job_id"])).one()
    return bool(state == JobState.QUEUED if values["number"] == 0 else epoch == values["number"])


def _stated(session: Session, market: Market) -> list[dict[str, Any]]:
    """Return the forecasts that are missing, as rows."""
    jobs = _unstated(session, STATED_MAX)
    if not jobs:
        return []
    now_ms = market.clock.now_ms()
    free, running = _free_gpus(session), _running(session)
    waiting = _waiting(session)
    records = {family: _record(session, family) for family in FIRST_HALF_WIDTHS}
    rows = []
    for job in jobs:
        spec = JobSpec.model_validate_json(job.spec)
        if job.state == JobState.RUNNING:
            placement = session.scalar(
                select(Placement).where(Placement.job_id == job.job_id, Placement.state == PlacementState.ACTIVE)
            )
            if placement is not None:
                left_s = _left_s(job, placement)
                rows.append(
                    _row(job, FINISH, "finish/running", left_s, number=job.epoch, now_ms=now_ms, records=records)
                )
            continue
        family, wait_s = _wait(spec, free, running, waiting.get(job.job_id, 0), market.settings.heartbeat_s)
        rows.append(_row(job, START, family, wait_s, now_ms=now_ms, records=records))
        work_s = wait_s + _work_s(spec, job.samples_done)
        rows.append(_row(job, FINISH, "finish/waiting", work_s, now_ms=now_ms, records=records))
    return rows


def _score(session: Session, now_ms: int) -> int:
    found = _unscored(session, SCORED_MAX)
    for row, state, started_ms, ended_ms in found:
        row.scored_ms = now_ms
        if row.what == START:
            row.actual_ms = started_ms
        else:
            row.actual_ms = ended_ms if state == JobState.FINISHED else None
    return len(found)


def _unstated(session: Session, limit: int) -> list[Job]:
    """Return jobs that wait and were never told when they start, or run in an epoch without a forecast of its end."""
    stated = select(Forecast.job_id).where(Forecast.job_id == Job.job_id)
    waits = select(Job).where(
        Job.state == JobState.QUEUED, Job.started_ms.is_(None), ~stated.where(Forecast.what == START).exists()
    )
    runs = select(Job).where(
        Job.state == JobState.RUNNING, ~stated.where(Forecast.what == FINISH, Forecast.number == Job.epoch).exists()
    )
    jobs = list(session.scalars(waits.order_by(Job.submitted_ms, Job.job_id).limit(limit)))
    return jobs + list(session.scalars(runs.order_by(Job.job_id).limit(limit)))


def _unscored(session: Session, limit: int) -> list[tuple[Forecast, str, int | None, int | None]]:
    """Return forecasts whose outcome is known, each with its job's state, start and end."""
    over = Job.state.in_(sorted(FINAL_JOB_STATES))
    rows = session.execute(
        select(Forecast, Job.state, Job.started_ms, Job.ended_ms)
        .join(Job, Job.job_id == Forecast.job_id)
        .where(Forecast.scored_ms.is_(None), over | ((Forecast.what == START) & Job.started_ms.is_not(None)))
        .limit(limit)
    )
    return [(row, state, started_ms, ended_ms) for row, state, started_ms, ended_ms in rows]


def _record(session: Session, family: str) -> list[Outcome]:
    rows = session.execute(
        select(Forecast.predicted_s, Forecast.actual_ms, Forecast.stated_ms)
        .where(Forecast.family == family, Forecast.scored_ms.is_not(None), Forecast.actual_ms.is_not(None))
        .order_by(Forecast.scored_ms.desc(), Forecast.job_id)
        .limit(RECORD_READ_MAX)
    )
    return [Outcome(predicted, max(0, (actual or 0) - stated) / 1000) for predicted, actual, stated in rows]


def _row(
    job: Job,
    what: str,
    family: str,
    predicted_s: float,
    *,
    number: int = 0,
    now_ms: int,
    records: dict[str, list[Outcome]],
) -> dict[str, Any]:
    found: Interval = interval(predicted_s, records[family], first_half_width_log=FIRST_HALF_WIDTHS[family])
    return {
        "job_id": job.job_id,
        "what": what,
        "number": number,
        "family": family,
        "stated_ms": now_ms,
        "predicted_s": predicted_s,
        "low_ms": now_ms + math.floor(found.low_s * 1000),
        "middle_ms": now_ms + round(found.middle_s * 1000),
        "high_ms": now_ms + math.ceil(found.high_s * 1000),
    }


def _wait(
    spec: JobSpec, free: dict[str, list[int]], running: Sequence[_Running], ahead: int, heartbeat_s: float
) -> tuple[str, float]:
    """Return the family and the guess of a job's wait; `ahead` GPUs are wanted by those that wait before it."""
    soon_s = HEARTBEATS_TO_START * heartbeat_s
    types = {request.gpu_type: request.count_min for request in spec.resources.accelerators}
    for gpu_type, least in types.items():
        most = sorted(free.get(gpu_type, ()), reverse=True)[: spec.market.sites_max]
        if sum(most) >= least + ahead:
            return "start/free", soon_s
    needed = min(types.values()) + ahead - sum(sum(free.get(gpu_type, ())) for gpu_type in types)
    last_s, freed = 0.0, 0
    for row in running:
        gives = sum(row.gpus.get(gpu_type, 0) for gpu_type in types)
        if gives:
            last_s, freed = row.left_s, freed + gives
        if freed >= needed:
            break
    # Beyond what runs now, as many again are taken to run for as long again.
    laps = max(1.0, needed / freed) if freed else 1.0
    return "start/queue", soon_s + last_s * laps


def _work_s(spec: JobSpec, done: int) -> float:
    """Return how long the job would take on the GPUs that it accepts, between its least and its most."""
    workload = spec.market.workload
    rates = [
        samples_per_s(workload, round(math.sqrt(request.count_min * request.count_max)), cold(request.gpu_type))
        for request in spec.resources.accelerators
    ]
    return STARTING_S + max(0, workload.samples - done) / max(*rates, 1e-9)


def _left_s(job: Job, placement: Placement) -> float:
    left = max(0, JobSpec.model_validate_json(job.spec).market.workload.samples - job.samples_done)
    return STARTING_S + left / max(placement.samples_per_s_predicted, 1e-9)


def _free_gpus(session: Session) -> dict[str, list[int]]:
    """Return the GPUs that no lease holds at each pool of a live site, by type."""
    held = select(LeasedGpu.gpu_id).where(
        LeasedGpu.site_id == Gpu.site_id, LeasedGpu.gpu_id == Gpu.gpu_id, LeasedGpu.live
    )
    rows = session.execute(
        select(Pool.gpu_type, func.count())
        .join(Gpu, Gpu.pool_id == Pool.pool_id)
        .join(Site, Site.site_id == Pool.site_id)
        .where(Site.state == SiteState.LIVE, Gpu.present, ~held.exists())
        .group_by(Pool.pool_id, Pool.gpu_type)
    )
    free: dict[str, list[int]] = {}
    for gpu_type, count in rows:
        free.setdefault(gpu_type, []).append(count)
    return free


def _running(session: Session) -> list[_Running]:
    rows = session.execute(
        select(Placement, Job, Lease.gpu_type, Lease.gpus)
        .join(Job, Job.job_id == Placement.job_id)
        .join(Lease, Lease.placement_id == Placement.placement_id)
        .where(PLACEMENT_STANDS)
    )
    found: dict[str, tuple[float, dict[str, int]]] = {}
    for placement, job, gpu_type, gpus in rows:
        if placement.placement_id not in found:
            found[placement.placement_id] = (_left_s(job, placement), {})
        held = found[placement.placement_id][1]
        held[gpu_type] = held.get(gpu_type, 0) + gpus
    return sorted((_Running(left_s, held) for left_s, held in found.values()), key=lambda row: row.left_s)


def _waiting(session: Session) -> dict[str, int]:
    """Return for each waiting job the GPUs that those before it want at least, of whatever type."""
    ahead: dict[str, int] = {}
    total = 0
    queued = select(Job.job_id, Job.spec).where(Job.state == JobState.QUEUED)
    for job_id, text in session.execute(queued.order_by(Job.submitted_ms, Job.job_id)):
        ahead[job_id] = total
        total += min(row.count_min for row in JobSpec.model_validate_json(text).resources.accelerators)
    return ahead
