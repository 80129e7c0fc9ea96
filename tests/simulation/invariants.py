"""What is looked for after every step: the tables by `broker.audit`, and the truth beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import select
from sqlalchemy.orm import Session

from broker.audit import audit
from broker.database.tables import Hold, Job, Lease
from broker.transitions import FINAL_JOB_STATES, LeaseState

if TYPE_CHECKING:
    from tests.simulation.world import World


class InvariantError(AssertionError):
    """Something that must never happen did; the message names it."""


def check_tables(world: World) -> None:
    """Run the broker's own audit over the database."""
    findings = world.market.database.read(audit)
    if findings:
        raise InvariantError("; ".join(str(finding) for finding in findings))


def check_truth(world: World) -> None:
    """Compare what really ran with what was charged: no site is paid for time that did not pass."""

    def work(session: Session) -> list[str]:
        wrong = []
        for lease in session.scalars(select(Lease)):
            ran_ms = world.really_ran_ms.get(lease.lease_id, 0.0) + world.running_ms(lease.lease_id)
            if lease.delivered_gpu_milliseconds > ran_ms + 1:
                wrong.append(
                    f"{lease.lease_id} was charged {lease.delivered_gpu_milliseconds} GPU-ms and ran {ran_ms:.0f}"
                )
        return wrong

    wrong = world.market.database.read(work)
    if wrong:
        raise InvariantError("; ".join(wrong))


def check_ended(world: World) -> None:
    """After the faults are over: every job is final, every hold closed, no lease live."""

    def work(session: Session) -> list[str]:
        wrong = [
            f"job {job.job_id} is still {job.state} ({job.reason_code}: {job.reason})"
            for job in session.scalars(select(Job))
            if job.state not in FINAL_JOB_STATES
        ]
        wrong += [
            f"the hold of {hold.job_id} is open" for hold in session.scalars(select(Hold)) if hold.closed_ms is None
        ]
        wrong += [
            f"{lease.lease_id} is {lease.state}"
            for lease in session.scalars(select(Lease))
            if lease.state != LeaseState.ENDED
        ]
        return wrong

    wrong = world.market.database.read(work)
    if wrong:
        raise InvariantError("; ".join(wrong))
