"""What would have placed a job that was left out: each answer is a round solved again, so none is a guess.

A clearing's own sentence comes from its prices, and prices move when a bid does: of 200 bids that such sentences named
on generated markets, 143 won when solved again. Here one thing about the job is changed, the whole round is solved
with it, and only what then places the job is told.

    bid        the least bid found (with the budget that it needs, where the budget is short)
    budget     more budget, the bid as it is
    gpu_type   one more GPU type
    sites      one site more
    fewer      half of the GPUs
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from broker.allocation.clearing import Clearing, Placement, Unplaced
from broker.allocation.snapshot import JobState, Snapshot
from broker.allocation.solve import clear
from pricing.money import format_credits
from training.spec import GpuRequest

Kind = Literal["bid", "budget", "gpu_type", "sites", "fewer"]
Solve = Callable[[Snapshot], Clearing]

# A bid that failed at the prices it named meets others: each try is further above the last, the eighth some thousandfold
# above the first; what wins is then brought down again by halving the distance to what lost.
BID_TRIES_MAX: Final = 8
BID_STEP: Final = 1.05
BID_STEP_GROWTH: Final = 3
BID_HALVINGS: Final = 3
TYPES_TRIED_MAX: Final = 3
SAMPLES_PER_BID: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Counterfactual:
    """One change under which the round places the job: what to change, to what, and what comes of it.

    `job` is the job as it would then stand in the snapshot; `charge_micros_per_hour` is what it would pay.
    """

    kind: Kind
    sentence: str
    job: JobState
    pools: tuple[str, ...]
    charge_micros_per_hour: int


def counterfactuals(snapshot: Snapshot, left_out: Unplaced, *, solve: Solve = clear) -> list[Counterfactual]:
    """Return the changes that would have placed a job in this round, the cheapest to try first; often none.

    Solves the round up to some seventeen times.
    """
    job = next((row for row in snapshot.jobs if row.job_id == left_out.job_id), None)
    if job is None or job.samples_left <= 0:
        return []
    found = []
    if (won := _least_bid(snapshot, job, left_out, solve)) is not None:
        found.append(won)
    for kind, change, changed in _changes(snapshot, job):
        if (placed := _placed(snapshot, changed, solve)) is not None:
            found.append(_told(kind, change, changed, placed))
    return found


def _least_bid(snapshot: Snapshot, job: JobState, left_out: Unplaced, solve: Solve) -> Counterfactual | None:
    """Return the least bid found to win: what the round names, then what each round solved with it names."""
    if job.bid_steps:  # a bid that falls with speed has no one number to raise
        return None
    bid = left_out.bid_needed_micros_per_million_samples or round(job.bid_micros_per_million_samples * BID_STEP) + 1
    changed, lost, step = job, job.bid_micros_per_million_samples, BID_STEP - 1
    for _ in range(BID_TRIES_MAX):
        changed = changed.model_copy(update={"bid_micros_per_million_samples": bid})
        clearing = solve(_with(snapshot, changed))
        placed = _placement(clearing, job.job_id)
        if placed is not None:
            changed, placed = _lowered(snapshot, changed, placed, lost, solve)
            return _told("bid", _bid_sentence(job, changed, placed), changed, placed)
        refused = next((row for row in clearing.unplaced if row.job_id == job.job_id), None)
        if refused is None or refused.code == "tenant_budget":
            return None  # a higher bid may cost more still
        if refused.code == "budget_short":
            whole = bid * job.samples_left // SAMPLES_PER_BID + 1
            if whole <= changed.hold_left_micros:
                return None
            changed = changed.model_copy(update={"hold_left_micros": whole})
            continue
        lost = bid
        bid = max(refused.bid_needed_micros_per_million_samples or 0, round(bid * (1 + step)) + 1)
        step *= BID_STEP_GROWTH
    return None


def _lowered(
    snapshot: Snapshot, won: JobState, placed: Placement, lost: int, solve: Solve
) -> tuple[JobState, Placement]:
    """Bring a winning bid down towards one that lost, while it wins."""
    for _ in range(BID_HALVINGS):
        between = round((lost + won.bid_micros_per_million_samples) / 2)
        if won.bid_micros_per_million_samples - lost <= lost * (BID_STEP - 1):
            break
        lower = won.model_copy(update={"bid_micros_per_million_samples": between})
        again = _placed(snapshot, lower, solve)
        if again is None:
            lost = between
        else:
            won, placed = lower, again
    return won, placed


def _changes(snapshot: Snapshot, job: JobState) -> Iterator[tuple[Kind, str, JobState]]:
    """Yield what else a tenant could change, one thing at a time."""
    whole = job.bid_micros_per_million_samples * job.samples_left // SAMPLES_PER_BID + 1
    if whole > job.hold_left_micros:
        more = format_credits(whole - job.hold_left_micros)
        yield "budget", f"{more} credits more of budget", job.model_copy(update={"hold_left_micros": whole})
    accepted = {row.gpu_type for row in job.accelerators}
    asks: dict[str, int] = {}
    for pool in snapshot.pools:
        if pool.gpu_type not in accepted:
            asks[pool.gpu_type] = min(
                pool.ask_micros_per_gpu_hour, asks.get(pool.gpu_type, pool.ask_micros_per_gpu_hour)
            )
    first = job.accelerators[0]
    for gpu_type in sorted(asks, key=lambda name: (asks[name], name))[:TYPES_TRIED_MAX]:
        request = GpuRequest(gpu_type=gpu_type, count_min=first.count_min, count_max=first.count_max)
        wider = tuple(sorted((*job.accelerators, request), key=lambda row: row.gpu_type))
        yield "gpu_type", f"allowing {gpu_type}", job.model_copy(update={"accelerators": wider})
    if job.sites_max < len(snapshot.sites):
        yield "sites", "one site more", job.model_copy(update={"sites_max": job.sites_max + 1})
    if any(row.count_min > 1 for row in job.accelerators):
        fewer = tuple(row.model_copy(update={"count_min": max(1, row.count_min // 2)}) for row in job.accelerators)
        least = min(row.count_min for row in fewer)
        yield "fewer", f"taking as few as {least} GPUs", job.model_copy(update={"accelerators": fewer})


def _bid_sentence(job: JobState, changed: JobState, placed: Placement) -> str:
    """Return what a tenant would change, per million samples and per GPU-hour at the speed that it then has."""
    gpus = sum(row.gpus for row in placed.pools)
    extra = changed.bid_micros_per_million_samples - job.bid_micros_per_million_samples
    per_gpu_hour = round(extra * placed.samples_per_s * 3600 / SAMPLES_PER_BID / gpus)
    sentence = (
        f"a bid of {format_credits(changed.bid_micros_per_million_samples)} credits per million samples "
        f"(+{format_credits(per_gpu_hour)} per GPU-hour)"
    )
    more = changed.hold_left_micros - job.hold_left_micros
    return f"{sentence} with {format_credits(more)} credits more of budget" if more > 0 else sentence


def _told(kind: Kind, change: str, changed: JobState, placed: Placement) -> Counterfactual:
    pools = tuple(f"{row.gpus} x {row.pool_id}" for row in placed.pools)
    charge = placed.charge_micros_per_hour
    return Counterfactual(
        kind=kind,
        sentence=f"{change} would start it on {' + '.join(pools)} for {format_credits(charge)} credits an hour",
        job=changed,
        pools=pools,
        charge_micros_per_hour=charge,
    )


def _placed(snapshot: Snapshot, changed: JobState, solve: Solve) -> Placement | None:
    return _placement(solve(_with(snapshot, changed)), changed.job_id)


def _placement(clearing: Clearing, job_id: str) -> Placement | None:
    return next((row for row in clearing.placements if row.job_id == job_id), None)


def _with(snapshot: Snapshot, changed: JobState) -> Snapshot:
    jobs = tuple(changed if row.job_id == changed.job_id else row for row in snapshot.jobs)
    return snapshot.model_copy(update={"jobs": jobs})
