"""What a site would have sold and earned in recent rounds at other asks: its stored snapshots, cleared again.

Each round is solved anew from what it really found, so what would have piled up over several rounds is not followed: a
job that ran here then runs here in the next round's snapshot too, at the price that its term had locked.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from broker.allocation.clearing import Clearing
from broker.allocation.engines import engine_of
from broker.allocation.snapshot import PoolState, Snapshot
from broker.allocation.solve import clear
from broker.artifacts import ArtifactMissingError
from broker.database.tables import Round, Site
from broker.errors import BusyError, NotFoundError
from broker.market import Market
from broker.wishes import check_asks

ROUNDS_MAX: Final = 20
# As with explanations: beyond this many jobs a round takes too long to solve while somebody waits.
JOBS_MAX: Final = 1_000
SECONDS_MAX: Final = 8.0
WAIT_S: Final = 10.0
REMEMBERED_MAX: Final = 64

_solving = threading.Lock()
_remembered: OrderedDict[tuple[object, ...], WhatIf] = OrderedDict()


@dataclass(frozen=True, slots=True)
class Sold:
    """What a site sold in one clearing, by the hour: GPUs in placements, and what they pay the site."""

    gpus: float
    payout_micros_per_hour: int


@dataclass(frozen=True, slots=True)
class RoundWhatIf:
    """One round as it was and as it would have been."""

    round_number: int
    was: Sold
    would_be: Sold


@dataclass(frozen=True, slots=True)
class WhatIf:
    """What the last rounds would have been at other asks, newest first.

    `skipped` rounds were too large or past their retention; `cut` says that time ran out before all were solved.
    """

    asks: dict[str, int]
    rounds: tuple[RoundWhatIf, ...]
    skipped: int
    cut: bool

    @property
    def was(self) -> Sold:
        """The mean round as it was."""
        return _mean([row.was for row in self.rounds])

    @property
    def would_be(self) -> Sold:
        """The mean round as it would have been."""
        return _mean([row.would_be for row in self.rounds])


def what_if(market: Market, site_id: str, asks: Mapping[str, int], *, rounds: int = ROUNDS_MAX) -> WhatIf:
    """Clear the last `rounds` rounds again with `asks` (micro-credits per GPU-hour by type) at one site.

    Raises NotFoundError for an unknown site, RefusedError for a type that it does not offer or an ask out of range,
    BusyError while others' questions are being worked out.
    """
    assert 0 < rounds <= ROUNDS_MAX, f"1 to {ROUNDS_MAX} rounds are cleared again, not {rounds}"
    recent = market.database.read(lambda session: _recent(session, site_id, asks, rounds))
    key = (site_id, tuple(sorted(asks.items())), tuple(row.round_number for row in recent))
    known = _remembered.get(key)
    if known is not None:
        return known
    if not _solving.acquire(timeout=WAIT_S):
        raise BusyError("other asks are being tried just now; ask again in a moment")
    try:
        found = _remembered[key] = _solved(market, site_id, dict(asks), recent)
        while len(_remembered) > REMEMBERED_MAX:
            _remembered.popitem(last=False)
    finally:
        _solving.release()
    return found


def with_asks(snapshot: Snapshot, site_id: str, asks: Mapping[str, int]) -> Snapshot:
    """Return the snapshot with other asks at one site; the steps of a curve keep their distance from its first part.

    Its prices are sought anew: a round that followed the last one's would show nothing of what a lower ask brings.
    """
    return snapshot.model_copy(
        update={
            "follow_last_prices": False,
            "pools": tuple(
                _with_ask(pool, asks[pool.gpu_type]) if pool.site_id == site_id and pool.gpu_type in asks else pool
                for pool in snapshot.pools
            ),
        }
    )


def sold_by(clearing: Clearing, site_id: str) -> Sold:
    """Return what a site sells in a clearing."""
    rows = [row for placement in clearing.placements for row in placement.pools if row.site_id == site_id]
    return Sold(
        gpus=sum(row.gpus for row in rows),
        payout_micros_per_hour=sum(row.gpus * row.payout_micros_per_gpu_hour for row in rows),
    )


def _recent(session: Session, site_id: str, asks: Mapping[str, int], rounds: int) -> list[Round]:
    if session.get(Site, site_id) is None:
        raise NotFoundError(f"there is no site {site_id[:64]!r}")
    check_asks(session, site_id, asks)
    return list(session.scalars(select(Round).order_by(Round.round_number.desc()).limit(rounds)))


def _solved(market: Market, site_id: str, asks: dict[str, int], recent: list[Round]) -> WhatIf:
    found: list[RoundWhatIf] = []
    small = [row for row in recent if row.jobs_considered <= JOBS_MAX]
    skipped = len(recent) - len(small)
    ends_s = market.clock.monotonic_s() + SECONDS_MAX
    for row in small:
        if found and market.clock.monotonic_s() >= ends_s:
            return WhatIf(asks, tuple(found), skipped, cut=True)
        try:
            snapshot = Snapshot.from_json(market.artifacts.get_bytes(row.snapshot_digest))
            recorded = Clearing.from_json(market.artifacts.get_bytes(row.clearing_digest))
        except ArtifactMissingError:
            skipped += 1
            continue
        engine = engine_of(row.solver, otherwise=market.settings.lp_engine)
        again = clear(with_asks(snapshot, site_id, asks), engine=engine)
        found.append(RoundWhatIf(row.round_number, sold_by(recorded, site_id), sold_by(again, site_id)))
    return WhatIf(asks, tuple(found), skipped, cut=False)


def _with_ask(pool: PoolState, ask: int) -> PoolState:
    further = ask - pool.ask_micros_per_gpu_hour
    steps = tuple(
        step.model_copy(update={"ask_micros_per_gpu_hour": step.ask_micros_per_gpu_hour + further})
        for step in pool.ask_steps
    )
    return pool.model_copy(update={"ask_micros_per_gpu_hour": ask, "ask_steps": steps})


def _mean(rows: list[Sold]) -> Sold:
    count = max(1, len(rows))
    return Sold(sum(row.gpus for row in rows) / count, sum(row.payout_micros_per_hour for row in rows) // count)
