"""Why a job stands where it stands, and what would change it, each answer a round solved again.

Solving a round again costs what the round cost, up to seventeen times: it is done when somebody asks, for one job at a time in
each process, for rounds up to a size, and remembered until the next round.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Final

from pydantic import BaseModel, Field
from sqlalchemy.orm import Session

from broker.allocation.clearing import Clearing
from broker.allocation.counterfactuals import Counterfactual, counterfactuals
from broker.allocation.snapshot import Snapshot
from broker.artifacts import ArtifactMissingError
from broker.database.tables import Job, Round
from broker.errors import BusyError
from broker.market import Market
from broker.queries.jobs import job_row
from broker.queries.market import last_round

# Beyond this many jobs in a round an answer takes too long to wait for in a browser.
JOBS_MAX: Final = 1_000
WAIT_S: Final = 20.0
REMEMBERED_MAX: Final = 256

_solving = threading.Lock()
_remembered: OrderedDict[tuple[str, str], tuple[Counterfactual, ...]] = OrderedDict()


class Change(BaseModel):
    """One change under which the last round would have placed the job."""

    kind: str = Field(description="bid, budget, gpu_type, sites or fewer")
    sentence: str
    charge_micros_per_hour: int
    bid_micros_per_million_samples: int
    sites_max: int


class Explanation(BaseModel):
    """Where a job stands and why; `checked` says whether changes were looked for by solving the round again."""

    job_id: str
    state: str
    code: str
    sentence: str
    round_number: int | None
    checked: bool
    changes: list[Change]


def explain(market: Market, tenant_id: str | None, job_id: str) -> Explanation:
    """Explain a job of `tenant_id` (or of anyone, where that is None) by the last round.

    Raises NotFoundError for another tenant's job, BusyError while others' explanations are being worked out.
    """

    def work(session: Session) -> tuple[Job, Round | None]:
        return job_row(session, job_id, tenant_id), last_round(session)

    job, newest = market.database.read(work)
    changes = None if newest is None else _changes(market, newest, job_id)
    return Explanation(
        job_id=job_id,
        state=job.state,
        code=job.reason_code,
        sentence=job.reason,
        round_number=None if newest is None else newest.round_number,
        checked=changes is not None,
        changes=[
            Change(
                kind=row.kind,
                sentence=row.sentence,
                charge_micros_per_hour=row.charge_micros_per_hour,
                bid_micros_per_million_samples=row.job.bid_micros_per_million_samples,
                sites_max=row.job.sites_max,
            )
            for row in changes or ()
        ],
    )


def _changes(market: Market, newest: Round, job_id: str) -> tuple[Counterfactual, ...] | None:
    """Return what would have placed the job, None where that cannot be said: not left out, too large, forgotten."""
    if newest.jobs_considered > JOBS_MAX:
        return None
    key = (newest.snapshot_digest, job_id)
    known = _remembered.get(key)
    if known is not None:
        return known
    try:
        clearing = Clearing.from_json(market.artifacts.get_bytes(newest.clearing_digest))
        left_out = next((row for row in clearing.unplaced if row.job_id == job_id), None)
        if left_out is None:
            return None
        snapshot = Snapshot.from_json(market.artifacts.get_bytes(newest.snapshot_digest))
    except ArtifactMissingError:
        return None
    if not _solving.acquire(timeout=WAIT_S):
        raise BusyError("other jobs are being explained just now; ask again in a moment")
    try:
        found = _remembered[key] = tuple(counterfactuals(snapshot, left_out))
        while len(_remembered) > REMEMBERED_MAX:
            _remembered.popitem(last=False)
    finally:
        _solving.release()
    return found
