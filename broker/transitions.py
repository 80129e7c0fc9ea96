"""The legal changes of state, and the one way to make them: guarded, versioned, with an event.

A job:        queued -> proposed -> running -> finished | failed | cancelled, and back to queued
              when a proposal falls through or all its sites are lost
A placement:  proposed -> active -> ended
A lease:      proposed -> confirmed -> active -> ended
A site:       live <-> silent, and removed for good
A view:       promising -> issued, or abandoned when another change overtakes it
A move:       leaving -> done, or abandoned when its placement ends before
"""

from __future__ import annotations

import enum
from typing import Final

from sqlalchemy.orm import Session

from broker.database.moves import Move
from broker.database.tables import Event, Job, Lease, MarketState, Placement, Site, ViewChange
from broker.errors import IllegalTransitionError


class JobState(enum.StrEnum):
    """Where a job stands; the last three are final."""

    QUEUED = "queued"
    PROPOSED = "proposed"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


class PlacementState(enum.StrEnum):
    """Where a placement stands."""

    PROPOSED = "proposed"
    ACTIVE = "active"
    ENDED = "ended"


class LeaseState(enum.StrEnum):
    """Where a lease stands; `confirmed` waits for the rest of its gang."""

    PROPOSED = "proposed"
    CONFIRMED = "confirmed"
    ACTIVE = "active"
    ENDED = "ended"


class EndCause(enum.StrEnum):
    """Why a placement or a lease ended; money follows it: what expired is not paid late, what a site lost it refunds.

    The second part is what sites report (`sites.protocol.ExitCause`), but for `done` and `expired`, which are both.
    """

    DONE = "done"  # every site of the gang is done
    EXPIRED = "expired"  # its site was not heard for longer than the liveness, or fenced itself
    LOST = "lost"  # the gang was lost whole
    VETOED = "vetoed"
    UNCONFIRMED = "unconfirmed"
    TERM_ENDED = "term_ended"
    MOVED = "moved"  # another configuration beat it
    CANCELLED = "cancelled"

    SCRIPT = "script"
    SETUP = "setup"
    BUNDLE = "bundle"
    INPUT = "input"
    LIMIT = "limit"
    EXCHANGE = "exchange"
    ORDERED = "ordered"
    LEFT = "left"
    SITE = "site"


class SiteState(enum.StrEnum):
    """Whether a site is heard."""

    LIVE = "live"
    SILENT = "silent"
    REMOVED = "removed"


class ViewState(enum.StrEnum):
    """Where a view stands."""

    PROMISING = "promising"
    ISSUED = "issued"
    ABANDONED = "abandoned"


class MoveState(enum.StrEnum):
    """Where a move stands; while sites are leaving, what the job had and what it gets are both its own."""

    LEAVING = "leaving"
    DONE = "done"
    ABANDONED = "abandoned"


FINAL_JOB_STATES: Final = frozenset({JobState.FINISHED, JobState.FAILED, JobState.CANCELLED})

LEGAL: Final[dict[str, frozenset[tuple[str, str]]]] = {
    "job": frozenset(
        {
            ("", "queued"),
            ("queued", "proposed"),
            ("queued", "cancelled"),
            ("queued", "failed"),
            ("proposed", "running"),
            ("proposed", "queued"),
            ("proposed", "cancelled"),
            ("running", "finished"),
            ("running", "failed"),
            ("running", "cancelled"),
            ("running", "queued"),
        }
    ),
    "placement": frozenset(
        {("", "proposed"), ("proposed", "active"), ("proposed", "ended"), ("active", "ended")},
    ),
    "lease": frozenset(
        {
            ("", "proposed"),
            ("proposed", "confirmed"),
            ("proposed", "ended"),
            ("confirmed", "active"),
            ("confirmed", "ended"),
            ("active", "ended"),
        }
    ),
    "site": frozenset(
        {("", "live"), ("live", "silent"), ("silent", "live"), ("live", "removed"), ("silent", "removed")},
    ),
    "view": frozenset(
        {("", "promising"), ("", "issued"), ("promising", "issued"), ("promising", "abandoned")},
    ),
    "move": frozenset({("", "leaving"), ("leaving", "done"), ("leaving", "abandoned")}),
}

Stateful = Job | Placement | Lease | Site | ViewChange | Move


def change_state(
    session: Session,
    thing: Stateful,
    after: str,
    *,
    now_ms: int,
    detail: str = "",
    tenant_id: str | None = None,
    round_number: int | None = None,
    actor: str | None = None,
) -> None:
    """Move `thing` to state `after` and record the event. A new thing has no state before it.

    Raises IllegalTransitionError where the table does not hold the change.
    """
    kind = _kind(thing)
    before = thing.state or ""
    if (before, after) not in LEGAL[kind]:
        message = f"a {kind} cannot go from {before or 'nothing'} to {after}"
        raise IllegalTransitionError(message)
    thing.state = after
    if isinstance(thing, Job | Site):
        thing.version = (thing.version or 0) + 1
    record_event(
        session,
        kind,
        now_ms=now_ms,
        before=before,
        after=after,
        detail=detail,
        tenant_id=tenant_id or (thing.tenant_id if isinstance(thing, Job) else None),
        job_id=None if isinstance(thing, Site) else thing.job_id,
        site_id=thing.site_id if isinstance(thing, Site | Lease) else None,
        lease_id=thing.lease_id if isinstance(thing, Lease) else None,
        round_number=round_number if round_number is not None else _round_of(thing),
        actor=actor,
    )


def record_event(
    session: Session,
    kind: str,
    *,
    now_ms: int,
    before: str = "",
    after: str = "",
    detail: str = "",
    tenant_id: str | None = None,
    job_id: str | None = None,
    site_id: str | None = None,
    lease_id: str | None = None,
    round_number: int | None = None,
    actor: str | None = None,
) -> None:
    """Append one event; `kind` names what it is about, `actor` who asked for it where a person or a token did."""
    session.add(
        Event(
            kind=kind,
            before=before,
            after=after,
            detail=detail[:1000],
            tenant_id=tenant_id,
            job_id=job_id,
            site_id=site_id,
            lease_id=lease_id,
            round_number=round_number,
            actor=actor,
            created_ms=now_ms,
        )
    )


def note_change(session: Session) -> None:
    """Count a change that the next round should see; a round with nothing new is not held."""
    state = session.get(MarketState, 1)
    if state is None:
        session.add(MarketState(one=1, changes=1, changes_cleared=0, seed=0))
        session.flush()
    else:
        state.changes += 1


def is_round_due(session: Session) -> bool:
    """Say whether something has changed since the last round, and rounds are not frozen."""
    state = session.get(MarketState, 1)
    return state is not None and state.frozen_ms is None and state.changes != state.changes_cleared


def _kind(thing: Stateful) -> str:
    kinds: dict[type[Stateful], str] = {
        Job: "job",
        Placement: "placement",
        Lease: "lease",
        Site: "site",
        ViewChange: "view",
        Move: "move",
    }
    return kinds[type(thing)]


def _round_of(thing: Stateful) -> int | None:
    return thing.round_number if isinstance(thing, Placement | Move) else None
