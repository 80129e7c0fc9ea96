"""The audit of states: GPUs, placements, epochs, usage, and the history behind every state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from broker.audit.finding import Finding
from broker.database.moves import Move
from broker.database.standing import LEASE_STANDS
from broker.database.tables import (
    Event,
    Job,
    JobArtifact,
    Lease,
    LeasedGpu,
    Placement,
    Site,
    UsageReport,
    ViewChange,
)
from broker.transitions import LEGAL, EndCause, MoveState, PlacementState

Step = tuple[str, str]


def check_gpus(session: Session) -> Iterator[Finding]:
    """Invariant 4: no GPU serves two leases, and a lease that lives has the GPUs that it was sold."""
    twice = (
        select(LeasedGpu.site_id, LeasedGpu.gpu_id, func.count())
        .where(LeasedGpu.live)
        .group_by(LeasedGpu.site_id, LeasedGpu.gpu_id)
        .having(func.count() > 1)
    )
    for site_id, gpu_id, count in session.execute(twice):
        yield Finding(4, f"{site_id}/{gpu_id}", f"it serves {count} live leases at once")
    held: dict[str, set[tuple[str, str]]] = {}
    for row in session.scalars(select(LeasedGpu).where(LeasedGpu.live)):
        held.setdefault(row.lease_id, set()).add((row.site_id, row.gpu_id))
    for lease in session.scalars(select(Lease).where(LEASE_STANDS)):
        gpus = held.get(lease.lease_id, set())
        elsewhere = sorted({site_id for site_id, _ in gpus} - {lease.site_id})
        if len(gpus) != lease.gpus or elsewhere:
            where = f", some at {', '.join(elsewhere)}" if elsewhere else ""
            yield Finding(4, lease.lease_id, f"it was sold {lease.gpus} GPUs and holds {len(gpus)}{where}")


def check_epochs(session: Session) -> Iterator[Finding]:
    """Invariant 5: a job has at most one live placement, and epochs only rise.

    A placement has the epoch of its first gang; a site that joined it while it ran has a later one of its own.
    """
    newest: dict[str, int] = {}
    for lease in session.scalars(select(Lease)):
        newest[lease.placement_id] = max(lease.epoch, newest.get(lease.placement_id, 0))
    rows = session.scalars(select(Placement).order_by(Placement.job_id, Placement.epoch)).all()
    for job_id, group in groupby(rows, key=lambda row: row.job_id):
        placements = list(group)
        job = session.get_one(Job, job_id)
        live = [row.placement_id for row in placements if row.state != PlacementState.ENDED]
        if len(live) > 1:
            yield Finding(5, job_id, f"it has {len(live)} live placements: {', '.join(live)}")
        given = newest.get(placements[-1].placement_id, placements[-1].epoch)
        if job.epoch != given:
            yield Finding(5, job_id, f"its epoch is {job.epoch}, its newest placement has given out {given}")
        for earlier, later in pairwise(placements):
            if (
                later.epoch <= newest.get(earlier.placement_id, earlier.epoch)
                or later.round_number < earlier.round_number
            ):
                detail = (
                    f"epoch {earlier.epoch} of round {earlier.round_number} is followed by "
                    f"epoch {later.epoch} of round {later.round_number}"
                )
                yield Finding(5, job_id, detail)
            if earlier.state != PlacementState.ENDED:
                yield Finding(5, job_id, f"epoch {earlier.epoch} lives though epoch {later.epoch} was given out")
    joined = set(session.scalars(select(Move.placement_id).where(Move.in_place, Move.state == MoveState.DONE)))
    mismatched = select(Lease, Placement.epoch).join(Placement, Placement.placement_id == Lease.placement_id)
    for lease, of_placement in session.execute(mismatched.where(Lease.epoch != Placement.epoch)):
        if lease.epoch < of_placement or lease.placement_id not in joined:
            yield Finding(5, lease.lease_id, f"its epoch is {lease.epoch}, its placement's {of_placement}")


def check_usage(session: Session) -> Iterator[Finding]:
    """Invariant 6: reports carry their lease's epoch, no gap and no number twice, and none came after expiry."""
    reports: dict[str, list[UsageReport]] = {}
    for report in session.scalars(select(UsageReport).order_by(UsageReport.lease_id, UsageReport.sequence)):
        reports.setdefault(report.lease_id, []).append(report)
    for lease in session.scalars(select(Lease)):
        yield from _check_usage_of(lease, reports.get(lease.lease_id, []))


def _check_usage_of(lease: Lease, reports: Sequence[UsageReport]) -> Iterator[Finding]:
    numbers = sorted({report.sequence for report in reports})  # one that straddles a term's end has a row for each
    if numbers != list(range(1, lease.usage_sequence + 1)):
        yield Finding(6, lease.lease_id, f"it has taken {lease.usage_sequence} reports, the rows are {numbers[:20]}")
    sums = (
        ("GPU-milliseconds", lease.delivered_gpu_milliseconds, sum(report.gpu_milliseconds for report in reports)),
        ("samples", lease.delivered_samples, sum(report.samples for report in reports)),
    )
    for unit, says, reported in sums:
        if says != reported:
            yield Finding(6, lease.lease_id, f"it says {says} {unit} delivered, its reports say {reported}")
    for report in reports:
        name = f"{lease.lease_id} report {report.sequence}"
        if report.epoch != lease.epoch:
            yield Finding(6, name, f"it was taken for epoch {report.epoch}, the lease has {lease.epoch}")
        if lease.active_ms is None:
            yield Finding(6, name, "it was taken for a lease that never was active")
        elif lease.end_cause == EndCause.EXPIRED and report.received_ms > (lease.ended_ms or 0):
            yield Finding(6, name, f"it was taken at {report.received_ms}, the lease expired at {lease.ended_ms}")


def check_outer_states(session: Session) -> Iterator[Finding]:
    """Invariant 12: checkpoints of one job that follow the same chain of seals hold the same outer state."""
    states: dict[tuple[str, str], dict[str, list[str]]] = {}
    checkpoints = select(JobArtifact).where(
        JobArtifact.kind == "checkpoint", JobArtifact.chain_hash.is_not(None), JobArtifact.outer_hash.is_not(None)
    )
    for row in session.scalars(checkpoints.order_by(JobArtifact.job_id, JobArtifact.name)):
        by_hash = states.setdefault((row.job_id, str(row.chain_hash)), {})
        by_hash.setdefault(str(row.outer_hash), []).append(f"{row.name} (round {row.round_number})")
    for (job_id, _), by_hash in states.items():
        if len(by_hash) > 1:
            sides = "; ".join(f"{', '.join(names)}: {outer_hash[:12]}…" for outer_hash, names in by_hash.items())
            yield Finding(12, job_id, f"its sites' checkpoints after the same seals hold unlike outer states: {sides}")


def check_histories(session: Session) -> Iterator[Finding]:
    """Invariant 7: every state is the end of a chain of legal changes, each with its event."""
    chains = _chains(session)
    for job in session.scalars(select(Job)):
        yield from _check_chain("job", job.job_id, chains.pop(("job", job.job_id), []), job.state)
    for lease in session.scalars(select(Lease)):
        yield from _check_chain("lease", lease.lease_id, chains.pop(("lease", lease.lease_id), []), lease.state)
    for site in session.scalars(select(Site)):
        yield from _check_chain("site", site.site_id, chains.pop(("site", site.site_id), []), site.state)
    placements = session.scalars(select(Placement).order_by(Placement.job_id, Placement.epoch)).all()
    for job_id, group in groupby(placements, key=lambda row: row.job_id):
        # A job has one live placement at a time, so its placements' chains follow one another.
        lives = _split_at_births(chains.pop(("placement", job_id), []))
        rows = list(group)
        if len(lives) != len(rows):
            yield Finding(7, job_id, f"it has {len(rows)} placements and the events of {len(lives)}")
        for row, steps in zip(rows, lives, strict=False):
            yield from _check_chain("placement", row.placement_id, steps, row.state)
    moves = session.scalars(select(Move).order_by(Move.job_id)).all()
    for job_id, moved in groupby(moves, key=lambda row: row.job_id):
        yield from _check_counts("move", job_id, chains.pop(("move", job_id), []), [move.state for move in moved])
    views = session.scalars(select(ViewChange).order_by(ViewChange.job_id)).all()
    for job_id, changes in groupby(views, key=lambda row: row.job_id):
        states = [change.state for change in changes]
        yield from _check_counts("view", job_id, chains.pop(("view", job_id), []), states)
    for kind, subject in sorted(chains):
        yield Finding(7, subject, f"there are events of a {kind} that does not exist")


def _chains(session: Session) -> dict[tuple[str, str], list[Step]]:
    """Return all changes of state in order, by kind and by the id under which that kind is found."""
    chains: dict[tuple[str, str], list[Step]] = {}
    query = select(Event.kind, Event.job_id, Event.site_id, Event.lease_id, Event.before, Event.after)
    for kind, job_id, site_id, lease_id, before, after in session.execute(
        query.where(Event.kind.in_(sorted(LEGAL))).order_by(Event.event_id)
    ):
        subject = {"lease": lease_id, "site": site_id}.get(kind, job_id)
        chains.setdefault((kind, str(subject)), []).append((before, after))
    return chains


def _check_chain(kind: str, subject: str, steps: Sequence[Step], state: str) -> Iterator[Finding]:
    if not steps:
        yield Finding(7, subject, f"the {kind} is {state} and no event says so")
        return
    stands = ""
    for before, after in steps:
        if (before, after) not in LEGAL[kind]:
            yield Finding(7, subject, f"a {kind} went from {before or 'nothing'} to {after}, which is not legal")
        if before != stands:
            yield Finding(7, subject, f"the {kind} left {before or 'nothing'} while it was {stands or 'nothing'}")
        stands = after
    if stands != state:
        yield Finding(7, subject, f"the {kind} is {state}, its last event left it {stands}")


def _split_at_births(steps: Sequence[Step]) -> list[list[Step]]:
    lives: list[list[Step]] = []
    for step in steps:
        if not step[0] or not lives:
            lives.append([])
        lives[-1].append(step)
    return lives


def _check_counts(kind: str, job_id: str, steps: Sequence[Step], states: Sequence[str]) -> Iterator[Finding]:
    """Count events rather than follow them, for the views of a job may overlap, and its moves have one id in events.

    What entered a state and did not leave it is in it.
    """
    for before, after in steps:
        if (before, after) not in LEGAL[kind]:
            yield Finding(7, job_id, f"a {kind} went from {before or 'nothing'} to {after}, which is not legal")
    entered = Counter(after for _, after in steps)
    entered.subtract(before for before, _ in steps if before)
    stand = Counter(states)
    for state in sorted({*entered, *stand}):
        if entered[state] != stand[state]:
            yield Finding(7, job_id, f"{stand[state]} of its {kind}s are {state}, events say {entered[state]}")
