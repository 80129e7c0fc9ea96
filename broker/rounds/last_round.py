"""What a round knows of the last one: its prices, and whether they may stand.

    few jobs changed ─ not too many rounds since one from nothing ─ enough jobs that it matters: follow

Everything it decides by is in the database, and what it decides is in the snapshot: a replay decides nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from sqlalchemy import distinct, func, select
from sqlalchemy.orm import Session

from broker.allocation.clearing import Clearing
from broker.database.tables import Event, Round
from broker.settings import Settings
from broker.transitions import JobState

# A round whose LP was cut short, or that sold nothing, has no prices for others to keep.
FOLLOWABLE: Final = frozenset({"optimal", "feasible", "followed"})
# A job that waits again, or is over, is not where the last round left it; one that was proposed and started is.
CHANGES: Final = (JobState.QUEUED, JobState.FINISHED, JobState.FAILED, JobState.CANCELLED)

SitePair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class LastRound:
    """The last round as the next one needs it.

    `link_prices` are per ten-thousandth of a directed link for an hour, None of rounds from before they were stored.
    `statuses` are of the newest rounds, newest first; `jobs_changed` counts those that came or went since it read the
    market, up to event `events_seen`.
    """

    prices: dict[str, int] = field(default_factory=dict)
    link_prices: dict[SitePair, int] | None = None
    statuses: tuple[str, ...] = ()
    jobs_changed: int = 0
    events_seen: int = 0


def read_last_round(session: Session, settings: Settings) -> LastRound:
    """Read what the next round needs of the newest one; an empty answer before the first."""
    events_seen = session.scalar(select(func.max(Event.event_id))) or 0
    newest_first = select(Round).order_by(Round.round_number.desc())
    newest = session.scalar(newest_first.limit(1))
    if newest is None:
        return LastRound(events_seen=events_seen)
    statuses = newest_first.with_only_columns(Round.status).limit(settings.follow_rounds_max)
    changed = session.scalar(
        select(func.count(distinct(Event.job_id))).where(
            Event.event_id > newest.events_seen, Event.kind == "job", Event.after.in_(CHANGES)
        )
    )
    return LastRound(
        prices={pool: int(price) for pool, price in json.loads(newest.prices).items()},
        link_prices=None if newest.link_prices is None else _read_links(newest.link_prices),
        statuses=tuple(session.scalars(statuses)),
        jobs_changed=changed or 0,
        events_seen=events_seen,
    )


def may_follow(last: LastRound, *, jobs: int, settings: Settings) -> bool:
    """Say whether a round of `jobs` jobs may let the last prices stand.

    Of `follow_rounds_max` + 1 rounds in a row at least one is solved from nothing; so is any round that finds these
    prices too far off (`broker.allocation.following`).
    """
    if last.link_prices is None or not last.statuses or last.statuses[0] not in FOLLOWABLE:
        return False
    if settings.follow_rounds_max == 0 or _followed_in_a_row(last.statuses) >= settings.follow_rounds_max:
        return False
    return jobs >= settings.follow_jobs_min and last.jobs_changed <= settings.follow_changed_share_max * jobs


def write_links(clearing: Clearing) -> str:
    """Return the link prices of a clearing as a round's row keeps them: from, to, price."""
    rows = [(row.from_site, row.to_site, row.price_micros_per_share_hour) for row in clearing.link_prices]
    return json.dumps(sorted(rows), separators=(",", ":"))


def _read_links(text: str) -> dict[SitePair, int]:
    return {(start, end): int(price) for start, end, price in json.loads(text)}


def _followed_in_a_row(statuses: Sequence[str]) -> int:
    return next((count for count, status in enumerate(statuses) if status != "followed"), len(statuses))
