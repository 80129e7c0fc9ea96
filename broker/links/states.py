"""The legal changes of a probe's state, and the one way to make them: with an event.

A probe is no part of what is sold, so its table stands beside that of `broker.transitions`.
"""

from __future__ import annotations

import enum
from typing import Final

from sqlalchemy.orm import Session

from broker.database.probes import LinkProbe
from broker.errors import IllegalTransitionError
from broker.transitions import record_event


class ProbeState(enum.StrEnum):
    """Where a probe of a link stands; the last two are final."""

    ASKED = "asked"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


LEGAL: Final = frozenset(
    {("", "asked"), ("asked", "running"), ("asked", "failed"), ("running", "done"), ("running", "failed")}
)


def change_probe(session: Session, probe: LinkProbe, after: ProbeState, *, now_ms: int) -> None:
    """Move `probe` to state `after` and record the event, with the probe's detail. A new one has no state before it.

    Raises IllegalTransitionError where the table does not hold the change.
    """
    before = probe.state or ""
    if (before, after) not in LEGAL:
        raise IllegalTransitionError(f"a probe cannot go from {before or 'nothing'} to {after}")
    probe.state = after
    if after in (ProbeState.DONE, ProbeState.FAILED):
        probe.ended_ms = now_ms
    record_event(
        session,
        "link_probe",
        now_ms=now_ms,
        before=before,
        after=after,
        site_id=probe.listener,
        detail=f"{probe.dialler} to {probe.listener} and back" + (f": {probe.detail}" if probe.detail else ""),
    )
