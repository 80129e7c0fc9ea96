"""One round from end to end: read the snapshot, solve with no transaction open, commit, ring.

Level-triggered and safe to run twice: a round is held only when something changed since the last
one, and of two workers that solve the same round one commits and the other's work is dropped.
"""

from __future__ import annotations

import structlog
from sqlalchemy.orm import Session

from broker.allocation.clearing import Clearing
from broker.allocation.snapshot import Snapshot
from broker.allocation.solve import clear
from broker.database.tables import Round
from broker.market import Market
from broker.rounds.commit import Committed, RoundOvertakenError, commit
from broker.rounds.snapshot import TakenSnapshot, take
from broker.transitions import is_round_due

_log = structlog.get_logger(__name__)


def hold_round(market: Market) -> Round | None:
    """Hold a round if anything changed since the last; return its row, None where none was due."""
    taken = market.database.read(lambda session: _take_if_due(session, market))
    if taken is None:
        return None
    started_s = market.clock.monotonic_s()
    phases: dict[str, float] = {}
    clearing = clear(
        taken.snapshot,
        engine=market.settings.lp_engine,
        tick=market.clock.monotonic_s,
        watch=lambda outcome: phases.update(outcome.seconds),
    )
    solve_s = market.clock.monotonic_s() - started_s
    snapshot_digest = keep_document(market, taken.snapshot)
    keep_document(market, clearing)

    def work(session: Session) -> Committed:
        return commit(session, market, taken, clearing, snapshot_digest=snapshot_digest, solve_s=solve_s, phases=phases)

    try:
        committed = market.database.write("round", work)
    except RoundOvertakenError as error:
        _log.warning("round.overtaken", round_number=clearing.round_number, reason=str(error))
        return None
    for site_id in sorted(committed.wake):
        market.doorbell.wake_site(site_id)
    for job_id in sorted(committed.jobs):
        market.doorbell.wake_watchers(job_id)
    return committed.round


def keep_document(market: Market, document: Snapshot | Clearing) -> str:
    """Store a snapshot or a clearing under its digest, which is returned."""
    digest = market.artifacts.put_bytes(document.to_json())
    assert digest == document.digest(), "a document's digest is that of its canonical JSON"
    return digest


def _take_if_due(session: Session, market: Market) -> TakenSnapshot | None:
    return take(session, market) if is_round_due(session) else None
