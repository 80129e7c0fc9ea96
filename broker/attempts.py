"""Step 5, the broker's side: what a site is to run under a lease, and what came of it.

`order_for` states what should be; `take_report` draws the consequences of what is. An attempt
that is over says why (`ExitCause`), and that decides: the tenant's own failure ends the job, a
lost site leaves the survivors to go on, a gang lost whole waits for another round and resumes
from its newest checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from broker.allocation.clearing import Placement as Award
from broker.database.tables import Artifact, Job, JobArtifact, Lease, LeasedGpu, Placement
from broker.database.uploads import SiteUpload
from broker.errors import ConflictError
from broker.leases import end_lease, end_placement, free_leased_gpus, leases_of, requeue
from broker.market import Market
from broker.moves import leaving_of, look_at_move
from broker.transitions import (
    EndCause,
    JobState,
    LeaseState,
    PlacementState,
    ViewState,
    change_state,
    note_change,
    record_event,
)
from broker.views import (
    check_view,
    issued_view,
    knows_the_chain,
    newest_view,
    take_complaints,
    take_promise,
    weight_max,
)
from sites.protocol import (
    AttemptOrder,
    AttemptPhase,
    AttemptReport,
    CheckpointReference,
    ExitCause,
    LeaseOrder,
    LeasePhase,
    Skill,
)
from training.roundlog.signing import SignedDocument
from training.spec import JobSpec

# The tenant's own doing: another attempt would end the same way.
TENANTS_CAUSES: Final = frozenset(
    {ExitCause.SCRIPT, ExitCause.SETUP, ExitCause.BUNDLE, ExitCause.INPUT, ExitCause.LIMIT}
)

_PHASES: Final = {
    LeaseState.PROPOSED: LeasePhase.PROPOSED,
    LeaseState.CONFIRMED: LeasePhase.PROPOSED,
    LeaseState.ACTIVE: LeasePhase.ACTIVE,
    LeaseState.ENDED: LeasePhase.ENDED,
}


class AttemptOverError(ConflictError):
    """A report that an attempt runs whose end was reported before."""

    code = "attempt.over"


def order_for(session: Session, market: Market, lease: Lease, skills: Collection[str] = ()) -> LeaseOrder:
    """Return the lease as the broker wants it, with what to run where it is active; no more than the agent understands."""
    placement = session.get_one(Placement, lease.placement_id)
    job = session.get_one(Job, lease.job_id)
    spec = JobSpec.model_validate_json(job.spec)
    phase = _PHASES[LeaseState(lease.state)]
    gpu_ids = session.scalars(
        select(LeasedGpu.gpu_id).where(LeasedGpu.lease_id == lease.lease_id).order_by(LeasedGpu.gpu_id)
    )
    return LeaseOrder(
        lease_id=lease.lease_id,
        job_id=lease.job_id,
        tenant_id=job.tenant_id,
        epoch=lease.epoch,
        phase=phase,
        gpu_type=lease.gpu_type,
        gpu_ids=tuple(gpu_ids),
        price_micros_per_gpu_hour=lease.price_micros_per_gpu_hour,
        term_ends_ms=placement.term_ends_ms or placement.proposal_ends_ms,
        liveness_s=market.settings.liveness_s,
        peers=_peers(session, lease) if phase is LeasePhase.PROPOSED and Skill.GANG in skills else None,
        term_s=placement.term_s if Skill.GANG in skills else None,
        spec=spec if phase is LeasePhase.PROPOSED else None,
        attempt=_attempt_order(session, placement, lease, spec, skills) if phase is LeasePhase.ACTIVE else None,
    )


def _peers(session: Session, lease: Lease) -> tuple[str, ...]:
    gang = select(Lease.site_id).where(
        Lease.placement_id == lease.placement_id, Lease.site_id != lease.site_id, Lease.state != LeaseState.ENDED
    )
    return tuple(session.scalars(gang.order_by(Lease.site_id)))


def take_report(session: Session, market: Market, lease: Lease, report: AttemptReport) -> list[str]:
    """Take an attempt's state as its site sees it; return the other sites to wake.

    Raises AttemptOverError for an attempt that rises from the dead: its GPUs may serve others.
    """
    if lease.active_ms is None:
        return []  # nothing runs before a lease is active: there is no state to take
    if lease.phase == AttemptPhase.EXITED and report.phase is not AttemptPhase.EXITED:
        message = f"the attempt of lease {lease.lease_id} has exited already, it cannot be {report.phase}; kill it"
        raise AttemptOverError(message)
    now_ms = market.clock.now_ms()
    lease.phase = report.phase
    lease.attempt = report.model_dump_json()
    job = session.get_one(Job, lease.job_id)
    if report.checkpoint is not None:
        _keep_artifact(
            session,
            JobArtifact(
                job_id=job.job_id,
                kind="checkpoint",
                name=lease.site_id,
                digest=report.checkpoint.digest,
                site_id=lease.site_id,
                epoch=lease.epoch,
                round_number=report.checkpoint.round_number,
                chain_hash=report.checkpoint.chain_hash,
                outer_hash=report.checkpoint.outer_hash,
                samples_done=report.checkpoint.samples_done,
                created_ms=now_ms,
            ),
        )
    for name, digest in sorted(report.outputs.items()):
        _keep_output(session, lease, name, digest, now_ms)
    wake: list[str] = []
    if lease.state == LeaseState.ACTIVE:
        if report.gateway is not None:
            job.samples_done = max(job.samples_done, report.gateway.samples_done)
        if report.promise is not None:
            wake += take_promise(session, market, lease, report.promise)
        if report.phase is AttemptPhase.EXITED:
            wake += _conclude(session, market, lease, report)
        else:
            wake += take_complaints(session, market, lease, report)
            wake += look_at_move(session, market, session.get_one(Placement, lease.placement_id))
    elif lease.state == LeaseState.ENDED and report.phase is AttemptPhase.EXITED:
        free_leased_gpus(session, lease)
    return wake


def lose_lease(session: Session, market: Market, lease: Lease, cause: EndCause, reason: str) -> list[str]:
    """End a lease whose site is lost or gave up; survivors go on, else the job waits again."""
    end_lease(session, market, lease, cause)
    session.flush()
    placement = session.get_one(Placement, lease.placement_id)
    return _after_loss(session, market, placement, reason)


def _conclude(session: Session, market: Market, lease: Lease, report: AttemptReport) -> list[str]:
    placement = session.get_one(Placement, lease.placement_id)
    cause = report.cause or ExitCause.SITE
    if cause is ExitCause.DONE:
        return _conclude_done(session, market, placement)
    if cause is ExitCause.LEFT and leaving_of(session, lease) is not None:
        # Its gateway stays until the lease ends: those that go on may still fetch the last round from it.
        return look_at_move(session, market, placement)
    if cause in TENANTS_CAUSES:
        wake = end_placement(session, market, placement, EndCause(cause.value))
        free_leased_gpus(session, lease)
        detail = report.detail or f"exit code {report.exit_code}"
        end_job(session, market, placement.job_id, Ending(JobState.FAILED, str(cause), f"at {lease.site_id}: {detail}"))
        return wake
    end_lease(session, market, lease, EndCause(cause.value))
    free_leased_gpus(session, lease)
    session.flush()
    return _after_loss(session, market, placement, f"the attempt at {lease.site_id} ended ({cause}): {report.detail}")


def _conclude_done(session: Session, market: Market, placement: Placement) -> list[str]:
    # A site whose ranks are done keeps its gateway until the lease ends, because others may still
    # fetch the last round from it: so the leases end together.
    gang = [lease for lease in leases_of(session, placement) if lease.state == LeaseState.ACTIVE]
    if not all(_is_done(lease) for lease in gang):
        return []
    wake = end_placement(session, market, placement, EndCause.DONE)
    for lease in gang:
        free_leased_gpus(session, lease)
    end_job(
        session, market, placement.job_id, Ending(JobState.FINISHED, "finished", "all samples are in the round log")
    )
    return wake


def _after_loss(session: Session, market: Market, placement: Placement, reason: str) -> list[str]:
    if placement.state != PlacementState.ACTIVE:
        return []
    job = session.get_one(Job, placement.job_id)
    gang = leases_of(session, placement)
    active = [lease for lease in gang if lease.state == LeaseState.ACTIVE]
    if active and knows_the_chain(session, job.job_id, placement.epoch, [lease.site_id for lease in active]):
        if all(_is_done(lease) for lease in active):
            return _conclude_done(session, market, placement)
        record_event(
            session,
            "gang",
            now_ms=market.clock.now_ms(),
            job_id=job.job_id,
            tenant_id=job.tenant_id,
            after="reduced",
            detail=reason[:1000],
        )
        return [*check_view(session, market, placement), *look_at_move(session, market, placement)]
    # A site that was left out of the last view may still hold its lease, but not what was sealed without it.
    wake = end_placement(session, market, placement, EndCause.LOST)
    job.failures += 1
    if job.failures >= market.settings.attempts_max:
        sentence = f"{job.failures} attempts were lost, the last one: {reason}"
        end_job(session, market, placement.job_id, Ending(JobState.FAILED, "attempts_exhausted", sentence))
    else:
        requeue(session, market, job, "lost", f"{reason}; resumes from its newest checkpoint")
    return wake


@dataclass(frozen=True, slots=True)
class Ending:
    """How a job ends, and why."""

    state: JobState
    code: str
    reason: str


def end_job(session: Session, market: Market, job_id: str, ending: Ending) -> None:
    """Bring a job without a live placement to a final state."""
    job = session.get_one(Job, job_id)
    job.ended_ms = market.clock.now_ms()
    job.reason_code, job.reason = ending.code, ending.reason[:1000]
    if ending.state is JobState.FINISHED:
        job.samples_done = JobSpec.model_validate_json(job.spec).market.workload.samples
    change_state(session, job, ending.state, now_ms=market.clock.now_ms(), detail=ending.reason)
    note_change(session)


def _is_done(lease: Lease) -> bool:
    if not lease.attempt:
        return False
    report = AttemptReport.model_validate_json(lease.attempt)
    return report.phase is AttemptPhase.EXITED and report.cause is ExitCause.DONE


def _attempt_order(
    session: Session, placement: Placement, lease: Lease, spec: JobSpec, skills: Collection[str]
) -> AttemptOrder:
    award = Award.model_validate_json(placement.award)
    issued = issued_view(session, lease.job_id, placement.epoch)
    newest = newest_view(session, lease.job_id, placement.epoch)
    if lease.epoch != placement.epoch and issued is not None and lease.site_id not in json.loads(issued.sites):
        issued = None  # it joins a gang that runs: the first view that it sees is the one that has it
    assert lease.certificate_pem is not None, "an active lease has its attempt's certificate"
    return AttemptOrder(
        spec=spec,
        sync=spec.market.sync.placed(award.configuration.sync),
        seed=_seed_of(lease.job_id),
        weight_max=weight_max(spec, award, lease),
        certificate_pem=lease.certificate_pem,
        checkpoint=_checkpoint_reference(session, lease, skills),
        view=SignedDocument.model_validate_json(issued.document) if issued is not None else None,
        promise=newest.number if newest is not None and newest.state == ViewState.PROMISING else None,
        leaving=leaving_of(session, lease) if Skill.LEAVE in skills else None,
    )


def _checkpoint_reference(session: Session, lease: Lease, skills: Collection[str]) -> CheckpointReference | None:
    if lease.checkpoint_digest is None:
        return None
    artifact = session.get_one(Artifact, lease.checkpoint_digest)
    placement = session.get_one(Placement, lease.placement_id)
    return CheckpointReference(
        digest=artifact.digest,
        size_bytes=artifact.size_bytes,
        round_number=placement.base_round,
        heir_of=lease.heir_of if Skill.LEAVE in skills else None,
    )


def _seed_of(job_id: str) -> int:
    # The same on every site and in every attempt, so that all deal the same samples.
    return int.from_bytes(job_id.encode()[-6:], "big")


def _keep_artifact(session: Session, row: JobArtifact) -> None:
    stored = session.get(Artifact, row.digest)
    if stored is None or not stored.complete:
        return  # reported before it was stored: the next heartbeat says it again
    if session.get(SiteUpload, (row.site_id, row.digest)) is None:
        return  # a digest alone is no pass: what others brought becomes no site's by naming it
    held = session.get(JobArtifact, (row.job_id, row.kind, row.name))
    if held is not None and held.epoch >= row.epoch and held.round_number >= row.round_number:
        return
    session.merge(row)


def _keep_output(session: Session, lease: Lease, name: str, digest: str, now_ms: int) -> None:
    # Outer states are equal on all sites, so their files usually are one artifact; where a file
    # differs it is kept under its site's name.
    held = session.get(JobArtifact, (lease.job_id, "output", name))
    if held is not None and held.digest != digest and held.site_id != lease.site_id:
        name = f"{lease.site_id}/{name}"
    _keep_artifact(
        session,
        JobArtifact(
            job_id=lease.job_id,
            kind="output",
            name=name,
            digest=digest,
            site_id=lease.site_id,
            epoch=lease.epoch,
            round_number=0,
            samples_done=0,
            created_ms=now_ms,
        ),
    )
