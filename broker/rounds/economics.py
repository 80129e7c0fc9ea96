"""What sharing was worth in a round: worked out after its commit, and signed into its certificate.

Each site against standing alone, the core's slack over coalitions, the Owen division beside Shapley's, and the
Threshold rule as an audit of the payment rule. That takes an LP for each coalition, so it is a level-triggered step of
its own (`hansa broker economics`): it takes the newest round that lacks it, within a budget of time, and no
round waits for it. A round that is too old to be reached is signed as left out.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable
from typing import Any, Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from broker.allocation.clearing import Clearing, Placement
from broker.allocation.coalitions import Standing, marginal_values, standing
from broker.allocation.compile import compile_market
from broker.allocation.errors import AllocationError
from broker.allocation.snapshot import Snapshot
from broker.allocation.table_rows import from_snapshot
from broker.allocation.won import Market as Compiled
from broker.artifacts import ArtifactMissingError
from broker.database.certificates import RoundCertificate
from broker.database.tables import Round
from broker.market import Market
from broker.rounds.certificate import (
    Economics,
    EconomicsState,
    SignedCertificate,
    ThresholdAudit,
    egress_micros_per_hour,
    read_statement,
    sign_statement,
)
from pricing.fairness import division_distance
from pricing.payments import Trade, shading_gain, threshold
from training.roundlog.signing import canonical_json

# Each trade of the Threshold rule is an LP over all other jobs.
TRADES_MAX: Final = 40
# The share of its time budget that a round's coalitions may use; the rest is for the Threshold audit.
COALITIONS_SHARE: Final = 0.7
LEFT_OUT_AT_ONCE: Final = 100


def work_out(market: Market) -> int | None:
    """Add the economics of the newest round that lacks them to its certificate; return its number, None for none."""
    due = market.database.read(_due)
    if due is None:
        return None
    number, snapshot_digest, clearing_digest = due
    try:
        snapshot = Snapshot.from_json(market.artifacts.get_bytes(snapshot_digest))
        clearing = Clearing.from_json(market.artifacts.get_bytes(clearing_digest))
        economics, rows = economics_of(
            snapshot, clearing, tick=market.clock.monotonic_s, budget_s=market.settings.economics_s
        )
    except (ArtifactMissingError, AllocationError):
        # Its files are past their retention, or its market too large to state anew.
        _write(market, number, "left_out", None, [])
    else:
        _write(market, number, "done", economics, rows)
    return number


def keep_up(market: Market, *, wait: Callable[[], bool]) -> None:
    """Work out what is due, newest first; `wait` waits for more and says whether to stop."""
    while True:
        leave_out_old(market)
        if work_out(market) is None and wait():
            return


def economics_of(
    snapshot: Snapshot, clearing: Clearing, *, tick: Callable[[], float], budget_s: float
) -> tuple[Economics, list[dict[str, Any]]]:
    """Return a round's economics and the sites' own rows, within about `budget_s` seconds of `tick`."""
    began_s = tick()
    tables = from_snapshot(snapshot)
    compiled = Compiled(tables, compile_market(tables))
    found = standing(compiled, clearing, stop=lambda: tick() - began_s > budget_s * COALITIONS_SHARE)
    homeless = int((compiled.instance.jobs.home < 0).sum())
    audit = threshold_audit(compiled, snapshot, clearing, stop=lambda: tick() - began_s > budget_s)
    rows = _site_rows(compiled, clearing, found)
    gains = [
        row["federated_micros_per_hour"] / row["alone_micros_per_hour"]
        for row in rows
        if row["alone_micros_per_hour"] > 0
    ]
    shapley = found.shapley
    distance = None
    if shapley is not None and not homeless and len(rows) == len(shapley):
        distance = division_distance(
            [float(row["federated_micros_per_hour"]) for row in rows], [float(value) for value in shapley]
        )
    economics = Economics(
        sites=len(compiled.names.sites),
        sites_better_off=sum(row["federated_micros_per_hour"] >= row["alone_micros_per_hour"] for row in rows),
        gain_least=min(gains, default=None),
        gain_median=statistics.median(gains) if gains else None,
        core_slack_micros_per_hour=found.core_slack_micros_per_hour,
        coalitions=len(found.gains),
        complete=found.complete,
        division_distance=distance,
        jobs_without_home=homeless,
        threshold=audit,
        sites_digest=hashlib.sha256(canonical_json(rows)).hexdigest(),
        seconds=round(tick() - began_s, 6),
    )
    return economics, rows


def threshold_audit(
    compiled: Compiled, snapshot: Snapshot, clearing: Clearing, *, stop: Callable[[], bool] = lambda: False
) -> ThresholdAudit | None:
    """Return what new and renewed placements would have paid under the Threshold rule; None beyond TRADES_MAX.

    VCG's discount of a buyer is taken from the LP: what its optimum would lose without the job.
    """
    paying = [row for row in clearing.placements if row.action != "keep"]
    if not paying or len(paying) > TRADES_MAX:
        return None
    index = {job_id: number for number, job_id in enumerate(compiled.names.jobs)}
    lost = marginal_values(compiled, [index[row.job_id] for row in paying], stop=stop)
    if lost is None:
        return None
    asks = {pool.pool_id: pool.ask_micros_per_gpu_hour for pool in snapshot.pools}
    trades = [_trade(row, asks) for row in paying]
    paid = {row.job_id: row.charge_micros_per_hour for row in paying}
    fair = threshold(trades, {row.job_id: lost[index[row.job_id]] for row in paying})
    gain = shading_gain(paid, fair)
    return ThresholdAudit(
        trades=len(trades),
        paid_micros_per_hour=sum(paid.values()),
        threshold_micros_per_hour=sum(fair.values()),
        shading_gain_micros_per_hour=sum(gain.values()),
        shading_gain_most_micros_per_hour=max(gain.values()),
    )


def _due(session: Session) -> tuple[int, str, str] | None:
    row = session.execute(
        select(Round.round_number, Round.snapshot_digest, Round.clearing_digest)
        .join(RoundCertificate, RoundCertificate.round_number == Round.round_number)
        .where(RoundCertificate.economics == "pending")
        .order_by(Round.round_number.desc())
        .limit(1)
    ).first()
    return None if row is None else (row[0], row[1], row[2])


def _trade(row: Placement, asks: dict[str, int]) -> Trade:
    gross = row.charge_micros_per_hour + row.uplift_micros_per_hour - row.premium_micros_per_hour
    return Trade(
        job_id=row.job_id,
        value=row.value_micros_per_hour - egress_micros_per_hour(row),
        gross=gross,
        asks=sum(asks[pool.pool_id] * pool.gpus for pool in row.pools),
    )


def _site_rows(compiled: Compiled, clearing: Clearing, found: Standing) -> list[dict[str, Any]]:
    """Return each site's rent, what it and its customers have with the others and alone, and Shapley's share."""
    rents = {row.site_id: row.rent_micros_per_hour for row in clearing.transfers}
    names = compiled.names.sites
    shares: tuple[int | None, ...] = found.shapley or (None,) * len(names)
    return [
        {
            "site_id": names[gain.sites[0]],
            "rent_micros_per_hour": rents.get(names[gain.sites[0]], 0),
            "federated_micros_per_hour": gain.federated_micros_per_hour,
            "alone_micros_per_hour": gain.alone_micros_per_hour,
            "shapley_micros_per_hour": shares[gain.sites[0]],
        }
        for gain in found.alone
    ]


def _write(
    market: Market, number: int, state: EconomicsState, economics: Economics | None, rows: list[dict[str, Any]]
) -> None:
    now_ms = market.clock.now_ms()

    def work(session: Session) -> None:
        row = session.get_one(RoundCertificate, number)
        if row.economics != "pending":
            return  # another worker was faster
        before = read_statement(SignedCertificate.model_validate_json(row.document))
        statement = before.model_copy(update={"economics_state": state, "economics": economics})
        row.document = sign_statement(market.authority, statement).model_dump_json()
        row.sites = canonical_json(rows).decode()
        row.economics = state
        row.signed_ms = now_ms

    market.database.write("economics", work)


def leave_out_old(market: Market) -> int:
    """Sign rounds that have waited behind `economics_rounds_max` newer ones as left out; return how many."""

    def waiting(session: Session) -> list[int]:
        pending = select(RoundCertificate.round_number).where(RoundCertificate.economics == "pending")
        newest_first = pending.order_by(RoundCertificate.round_number.desc())
        return list(session.scalars(newest_first.offset(market.settings.economics_rounds_max).limit(LEFT_OUT_AT_ONCE)))

    late = market.database.read(waiting)
    for number in late:
        _write(market, number, "left_out", None, [])
    return len(late)
