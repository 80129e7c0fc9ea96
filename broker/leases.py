"""Step 4: leases. Proposed by a round, confirmed by every site of the gang, active, ended.

A placement is a gang; each of its leases is one site's part. The broker proposes GPUs by name, so
that the row `leased_gpus` lets none serve two. Ending a lease is a commercial act; its GPUs stay
taken until the site has reported its processes dead, or the liveness has run out on the broker's
own monotonic clock, which waits longer than the agent's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from cryptography import x509
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from broker.allocation.clearing import Placement as Award
from broker.allocation.configuration import Part
from broker.database.moves import Move
from broker.database.standing import PLACEMENT_STANDS
from broker.database.tables import (
    Gpu,
    Job,
    JobArtifact,
    Lease,
    LeasedGpu,
    Placement,
    UsageReport,
)
from broker.lease_clock import stamp_active, stamp_ended
from broker.market import Market
from broker.refusals import remember
from broker.terms import begin_first_term, open_first_term
from broker.transitions import (
    FINAL_JOB_STATES,
    EndCause,
    JobState,
    LeaseState,
    MoveState,
    PlacementState,
    change_state,
    note_change,
    record_event,
)
from broker.views import issue_first_view
from sites.protocol import Confirmation, RefusalScope, Veto
from training.roundlog.view import GENESIS_HASH
from training.spec import JobSpec


def live_placement(session: Session, job_id: str) -> Placement | None:
    """Return the job's placement that is proposed or active, None where it has none."""
    return session.scalar(select(Placement).where(Placement.job_id == job_id, PLACEMENT_STANDS))


def leases_of(session: Session, placement: Placement) -> list[Lease]:
    """Return the leases of a placement in site order."""
    return list(
        session.scalars(select(Lease).where(Lease.placement_id == placement.placement_id).order_by(Lease.site_id))
    )


def free_gpus(session: Session, pool_id: str) -> list[str]:
    """Return the ids of the pool's present GPUs that serve no live lease, in order."""
    taken = select(LeasedGpu.gpu_id).where(
        LeasedGpu.site_id == Gpu.site_id, LeasedGpu.gpu_id == Gpu.gpu_id, LeasedGpu.live
    )
    return list(
        session.scalars(
            select(Gpu.gpu_id).where(Gpu.pool_id == pool_id, Gpu.present, ~taken.exists()).order_by(Gpu.gpu_id)
        )
    )


def choose_gpus(session: Session, parts: Sequence[Part]) -> dict[str, list[str]] | None:
    """Return free GPUs for each part by pool, None where a pool has too few."""
    chosen: dict[str, list[str]] = {}
    for part in parts:
        free = free_gpus(session, part.pool_id)
        if len(free) < part.gpus:
            return None
        chosen[part.pool_id] = free[: part.gpus]
    return chosen


def propose(  # noqa: PLR0917  what a placement is
    session: Session,
    market: Market,
    job: Job,
    award: Award,
    round_number: int,
    lane: str = "round",
    *,
    heirs: Mapping[str, str] = MappingProxyType({}),
) -> list[str] | None:
    """Write the placement that `job` won and its proposed leases; return the sites to wake.

    `lane` is instant where it was placed between rounds, at the prices of `round_number`. `heirs` maps a site to the
    one whose place it takes, and whose checkpoint is its own.

    Returns None, and writes nothing, where the GPUs are no longer free.
    """
    now_ms = market.clock.now_ms()
    chosen = choose_gpus(session, award.configuration.parts)
    if chosen is None:
        return None
    checkpoint = newest_checkpoint(session, job.job_id)
    job.epoch += 1
    placement = Placement(
        placement_id=market.ids.new("placement"),
        job_id=job.job_id,
        epoch=job.epoch,
        round_number=round_number,
        lane=lane,
        state="",
        configuration=award.configuration.model_dump_json(),
        configuration_key=award.configuration.key,
        award=award.model_dump_json(),
        why=award.why[:1000],
        samples_per_s_predicted=award.samples_per_s,
        value_micros_per_hour=award.value_micros_per_hour,
        charge_micros_per_hour=award.charge_micros_per_hour,
        uplift_micros_per_hour=award.uplift_micros_per_hour,
        term_s=award.term_s,
        reserved_micros=award.reservation_micros,
        charged_micros=0,
        proposed_ms=now_ms,
        proposal_ends_ms=now_ms + round(market.settings.proposal_s * 1000),
        base_round=0 if checkpoint is None else checkpoint.round_number,
        base_hash=GENESIS_HASH if checkpoint is None else (checkpoint.chain_hash or GENESIS_HASH),
        base_samples=0 if checkpoint is None else checkpoint.samples_done,
        end_cause="",
    )
    session.add(placement)
    change_state(session, placement, PlacementState.PROPOSED, now_ms=now_ms, tenant_id=job.tenant_id)
    open_first_term(session, placement, award)
    job.reason_code, job.reason = "proposed", award.why[:1000]
    change_state(session, job, JobState.PROPOSED, now_ms=now_ms, round_number=round_number)
    session.flush()
    for part in award.configuration.parts:
        started = None if checkpoint is None else _start_for(session, checkpoint, part.site_id, heirs.get(part.site_id))
        propose_lease(session, market, job, placement, part, chosen[part.pool_id], started or Start())
    return [part.site_id for part in award.configuration.parts]


@dataclass(frozen=True, slots=True)
class Start:
    """The checkpoint that a site starts from, and the site that wrote it where this one takes its place."""

    checkpoint_digest: str | None = None
    heir_of: str | None = None


def propose_lease(  # noqa: PLR0917  what a lease is
    session: Session, market: Market, job: Job, placement: Placement, part: Part, gpu_ids: Sequence[str], start: Start
) -> None:
    """Write one site's proposed lease under the job's newest epoch, and take its GPUs."""
    award = Award.model_validate_json(placement.award)
    price = next(row.price_micros_per_gpu_hour for row in award.pools if row.pool_id == part.pool_id)
    lease = Lease(
        lease_id=market.ids.new("lease"),
        placement_id=placement.placement_id,
        job_id=job.job_id,
        epoch=job.epoch,
        site_id=part.site_id,
        pool_id=part.pool_id,
        gpu_type=part.gpu_type,
        gpus=part.gpus,
        price_micros_per_gpu_hour=price,
        state="",
        checkpoint_digest=start.checkpoint_digest,
        heir_of=start.heir_of,
        phase="",
        attempt="",
        end_cause="",
    )
    session.add(lease)
    change_state(session, lease, LeaseState.PROPOSED, now_ms=market.clock.now_ms(), tenant_id=job.tenant_id)
    session.flush()
    for gpu_id in gpu_ids:
        session.add(LeasedGpu(lease_id=lease.lease_id, site_id=part.site_id, gpu_id=gpu_id, live=True))
    session.flush()


def confirm(session: Session, market: Market, lease: Lease, confirmation: Confirmation) -> list[str]:
    """Take a site's word for its part; with the last one the whole gang becomes active.

    Returns the sites to wake.
    """
    if lease.state != LeaseState.PROPOSED:
        return []  # said again, or too late: the answer to this heartbeat shows how things stand
    now_ms = market.clock.now_ms()
    lease.attempt_key = confirmation.attempt_key
    lease.csr_pem = confirmation.csr_pem
    lease.gateway_address = confirmation.gateway_address
    _certify(market, lease)
    change_state(session, lease, LeaseState.CONFIRMED, now_ms=now_ms)
    renew_liveness(market, lease)
    session.flush()
    placement = session.get_one(Placement, lease.placement_id)
    if placement.state == PlacementState.ACTIVE:
        return _join(session, market, lease)
    gang = leases_of(session, placement)
    if all(member.state == LeaseState.CONFIRMED for member in gang):
        _activate(session, market, placement, gang)
        return [member.site_id for member in gang]
    return []


def renew_certificate(market: Market, lease: Lease) -> None:
    """Certify an active lease's gateway anew once two thirds of its certificate's life are over.

    The key stays, so peers accept either; a lease may be renewed for longer than a certificate lives.
    """
    assert lease.certificate_pem is not None, "an active lease has its attempt's certificate"
    certificate = x509.load_pem_x509_certificate(lease.certificate_pem.encode())
    left_s = certificate.not_valid_after_utc.timestamp() - market.clock.now_ms() / 1000
    if left_s * 3 <= market.settings.attempt_certificate_s:
        _certify(market, lease)


def veto(session: Session, market: Market, lease: Lease, refusal: Veto) -> list[str]:
    """Void the whole gang, keep its next rounds away from what was refused, and return the sites to wake.

    Of an active lease the site refuses the renewal: it runs to the end of its term. A site that was to join a running
    gang stays away; the others go on.
    """
    placement = session.get_one(Placement, lease.placement_id)
    if placement.state == PlacementState.ACTIVE and lease.state in {LeaseState.PROPOSED, LeaseState.CONFIRMED}:
        remember(session, market, lease, refusal)
        stay_away(session, market, lease, EndCause.VETOED, f"declined ({refusal.code}): {refusal.reason}")
        return []
    if placement.state == PlacementState.ACTIVE and refusal.scope is not RefusalScope.CONFIGURATION:
        remember(session, market, lease, refusal)
        return []
    if placement.state != PlacementState.PROPOSED:
        return []
    remember(session, market, lease, refusal)
    reason = f"site {lease.site_id} declined ({refusal.code}): {refusal.reason}"
    return void_proposal(session, market, placement, EndCause.VETOED, reason)


def stay_away(session: Session, market: Market, lease: Lease, cause: EndCause, reason: str) -> None:
    """End the proposal of a site that was to join a running gang; a round finds it another."""
    end_lease(session, market, lease, cause)
    record_event(
        session,
        "gang",
        now_ms=market.clock.now_ms(),
        job_id=lease.job_id,
        tenant_id=session.get_one(Job, lease.job_id).tenant_id,
        after="reduced",
        detail=f"{lease.site_id} does not join: {reason}"[:1000],
    )
    note_change(session)


def void_proposal(session: Session, market: Market, placement: Placement, cause: EndCause, reason: str) -> list[str]:
    """End a proposal that fell through; its job waits again. Returns the sites to wake."""
    sites = end_placement(session, market, placement, cause)
    requeue(session, market, session.get_one(Job, placement.job_id), cause, reason)
    return sites


def requeue(session: Session, market: Market, job: Job, code: str, reason: str) -> None:
    """Put a job back in the queue for the next round."""
    if job.state in FINAL_JOB_STATES:
        return
    job.samples_done = _resumable_samples(session, job)
    job.reason_code, job.reason = code, reason[:1000]
    change_state(session, job, JobState.QUEUED, now_ms=market.clock.now_ms(), detail=reason)
    note_change(session)


def end_placement(session: Session, market: Market, placement: Placement, cause: EndCause) -> list[str]:
    """End a placement and all its leases; return the sites to wake. Ending twice changes nothing."""
    if placement.state == PlacementState.ENDED:
        return []
    now_ms = market.clock.now_ms()
    for move in session.scalars(
        select(Move).where(Move.placement_id == placement.placement_id, Move.state == MoveState.LEAVING)
    ):
        move.ended_ms = now_ms
        change_state(session, move, MoveState.ABANDONED, now_ms=now_ms, detail=f"its placement ended ({cause})")
    placement.ended_ms, placement.end_cause = now_ms, cause
    change_state(session, placement, PlacementState.ENDED, now_ms=now_ms, detail=cause)
    gang = leases_of(session, placement)
    for lease in gang:
        end_lease(session, market, lease, cause)
    return [lease.site_id for lease in gang]


def end_lease(session: Session, market: Market, lease: Lease, cause: EndCause) -> None:
    """End one site's part. Its GPUs are freed at once only where nothing can have started there."""
    if lease.state == LeaseState.ENDED:
        return
    now_ms = market.clock.now_ms()
    never_started = lease.state in {LeaseState.PROPOSED, LeaseState.CONFIRMED}
    # UTC may have been stepped back: a lease never ends before what was taken for it while it lived.
    stamp_ended(lease, market.clock, earliest_ms=_newest_report_ms(session, lease))
    lease.end_cause = cause
    change_state(session, lease, LeaseState.ENDED, now_ms=now_ms, detail=cause)
    if never_started:
        # A site starts only on seeing `active`, which this lease never was.
        free_leased_gpus(session, lease)


def _newest_report_ms(session: Session, lease: Lease) -> int:
    newest = select(func.max(UsageReport.received_ms)).where(UsageReport.lease_id == lease.lease_id)
    return session.scalar(newest) or 0


def free_leased_gpus(session: Session, lease: Lease) -> None:
    """Let the GPUs of an ended lease serve again: its processes are known to be dead."""
    assert lease.state == LeaseState.ENDED, "a live lease keeps its GPUs"
    held = list(session.scalars(select(LeasedGpu).where(LeasedGpu.lease_id == lease.lease_id, LeasedGpu.live)))
    for row in held:
        row.live = False
    if held:
        session.flush()
        note_change(session)


def renew_liveness(market: Market, lease: Lease) -> None:
    """Count the lease's liveness anew, from now, longer than its agent does."""
    settings = market.settings
    lease.liveness_monotonic_ms = round(
        (market.clock.monotonic_s() + settings.liveness_s + settings.liveness_margin_s) * 1000
    )
    lease.liveness_era = market.clock.era()


def liveness_over(market: Market, lease: Lease) -> bool:
    """Say whether the lease's site must have killed its processes by now.

    A deadline from another era cannot be compared: it is counted anew, which only delays.
    """
    if lease.liveness_monotonic_ms is None:
        return False
    if lease.liveness_era != market.clock.era():
        renew_liveness(market, lease)
        return False
    return market.clock.monotonic_s() * 1000 >= lease.liveness_monotonic_ms


def newest_checkpoint(session: Session, job_id: str) -> JobArtifact | None:
    """Return the job's checkpoint after the highest round, None where it has none."""
    return session.scalar(
        select(JobArtifact)
        .where(JobArtifact.job_id == job_id, JobArtifact.kind == "checkpoint")
        .order_by(JobArtifact.round_number.desc(), JobArtifact.name)
        .limit(1)
    )


def _certify(market: Market, lease: Lease) -> None:
    assert lease.csr_pem is not None, "a site sends its request with its confirmation"
    assert lease.attempt_key is not None, "a site sends its attempt's key with its confirmation"
    lease.certificate_pem = market.authority.issue_attempt_certificate(
        lease.csr_pem,
        job_id=lease.job_id,
        epoch=lease.epoch,
        site_id=lease.site_id,
        life_s=market.settings.attempt_certificate_s,
        attempt_key=lease.attempt_key,
    ).pem


def _resumable_samples(session: Session, job: Job) -> int:
    """Return the samples that the newest checkpoint holds: what was sealed after it is done again.

    A job whose last checkpoint holds them all still needs GPUs for a moment, to bring its outputs.
    """
    checkpoint = newest_checkpoint(session, job.job_id)
    if checkpoint is None:
        return 0
    samples = JobSpec.model_validate_json(job.spec).market.workload.samples
    return min(checkpoint.samples_done, samples - 1)


def _start_for(session: Session, newest: JobArtifact, site_id: str, heir_of: str | None) -> Start:
    # A site that has its own checkpoint of that very round, or its predecessor's, keeps the carry and the moments.
    for owner in (site_id, heir_of):
        digest = None if owner is None else _checkpoint_of(session, newest, owner)
        if digest is not None:
            return Start(digest, heir_of if owner == heir_of else None)
    return Start(newest.digest)


def _checkpoint_of(session: Session, newest: JobArtifact, site_id: str) -> str | None:
    own = session.scalar(
        select(JobArtifact).where(
            JobArtifact.job_id == newest.job_id,
            JobArtifact.kind == "checkpoint",
            JobArtifact.site_id == site_id,
            JobArtifact.round_number == newest.round_number,
            JobArtifact.chain_hash == newest.chain_hash,
        )
    )
    return None if own is None else own.digest


def _join(session: Session, market: Market, lease: Lease) -> list[str]:
    """Let a site take its part in a gang that runs; `broker.views` takes it into the log once its gateway answers."""
    now_ms = market.clock.now_ms()
    stamp_active(lease, market.clock)
    change_state(session, lease, LeaseState.ACTIVE, now_ms=now_ms)
    follows = f" in the place of {lease.heir_of}" if lease.heir_of else ""
    record_event(
        session,
        "gang",
        now_ms=now_ms,
        job_id=lease.job_id,
        tenant_id=session.get_one(Job, lease.job_id).tenant_id,
        site_id=lease.site_id,
        after="joining",
        detail=f"{lease.site_id} joins the running gang{follows}",
    )
    return [lease.site_id]


def _activate(session: Session, market: Market, placement: Placement, gang: Sequence[Lease]) -> None:
    now_ms = market.clock.now_ms()
    placement.active_ms = now_ms
    placement.term_ends_ms = now_ms + placement.term_s * 1000
    begin_first_term(session, placement)
    change_state(session, placement, PlacementState.ACTIVE, now_ms=now_ms)
    for lease in gang:
        stamp_active(lease, market.clock)
        change_state(session, lease, LeaseState.ACTIVE, now_ms=now_ms)
    job = session.get_one(Job, placement.job_id)
    job.started_ms = job.started_ms or now_ms
    job.reason_code, job.reason = "running", placement.why
    change_state(session, job, JobState.RUNNING, now_ms=now_ms)
    session.flush()
    issue_first_view(session, market, placement, gang)
    record_event(
        session,
        "gang",
        now_ms=now_ms,
        job_id=job.job_id,
        tenant_id=job.tenant_id,
        after="active",
        detail=f"all of {', '.join(lease.site_id for lease in gang)} confirmed",
    )
