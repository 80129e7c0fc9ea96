"""Seeded markets in which everything that a snapshot can say is said somewhere."""

from __future__ import annotations

import random

from broker.allocation.configuration import configuration_of
from broker.allocation.rules import Rules
from broker.allocation.snapshot import (
    AskStep,
    BidStep,
    DataEgress,
    DataState,
    Incumbent,
    JobSpeed,
    JobState,
    PoolState,
    Reservation,
    SiteState,
    Snapshot,
    TenantState,
)
from tests.broker.allocation.instances import CREDIT, NOW_MS, random_market
from training.throughput import predict

HOUR_MS = 3_600_000


def feature_market(seed: int, jobs: int = 8, sites: int = 4, *, slots: int = 1, types: int = 2) -> Snapshot:
    """Return a market with ask curves, quotas, reservations, drains, data, budgets, floors and incumbents."""
    draw = random.Random(seed)  # noqa: S311  a seeded test market
    plain = random_market(seed, jobs, sites, types, equity_credits=draw.choice([0, 5, 1e6]))
    snapshot = plain.model_copy(
        update={
            "pools": tuple(_pool(draw, pool) for pool in plain.pools),
            "sites": tuple(_site(draw, site, number) for number, site in enumerate(plain.sites)),
            "jobs": tuple(_job(draw, job, [site.site_id for site in plain.sites]) for job in plain.jobs),
            "tenants": (
                TenantState(tenant_id="ada", budget_micros_per_hour=draw.choice([1, 5, 20]) * CREDIT),
                TenantState(tenant_id="bob", floor_gpus=draw.choice([1, 4, 50])),
                TenantState(tenant_id="cyd", budget_micros_per_hour=8 * CREDIT, floor_gpus=3),
            ),
            "floor_penalty_micros_per_gpu_hour": draw.choice([0, CREDIT // 2, 5 * CREDIT]),
            "slots": slots,
            "slot_s": 1800,
            "waiting_discount": draw.choice([0.0, 0.1]),
        }
    )
    running = tuple(_running(draw, snapshot, job) for job in snapshot.jobs)
    return Snapshot.model_validate(snapshot.model_copy(update={"jobs": running}).model_dump())


def _pool(draw: random.Random, pool: PoolState) -> PoolState:
    steps: list[AskStep] = []
    ask = pool.ask_micros_per_gpu_hour
    for _ in range(draw.choice([0, 0, 1, 2])):
        ask += draw.randint(1, CREDIT // 2)
        steps.append(AskStep(gpus=draw.randint(1, 3), ask_micros_per_gpu_hour=ask))
    reserved = ()
    if draw.random() < 0.3:
        start = NOW_MS + draw.randint(-2, 3) * HOUR_MS // 2
        reserved = (Reservation(from_ms=start, to_ms=start + HOUR_MS, gpus=draw.randint(1, 4)),)
    return pool.model_copy(
        update={
            "ask_steps": tuple(steps),
            "job_gpus_max": draw.choice([None, None, 1, 4]),
            "reserved": reserved,
            "drains_at_ms": NOW_MS + draw.randint(0, 3) * HOUR_MS if draw.random() < 0.15 else None,
            # Alike pools make kinds with several of them.
            "flops_per_s": draw.choice([None, pool.flops_per_s, 1e14]),
        }
    )


def _site(draw: random.Random, site: SiteState, number: int) -> SiteState:
    return site.model_copy(
        update={
            "region": draw.choice([None, f"region{number % 3}"]),
            "continent": draw.choice([None, f"continent{number % 2}"]),
            "egress_micros_per_gb": DataEgress(to_region=draw.choice([0, 1_000]), to_continent=10_000, beyond=50_000),
        }
    )


def _job(draw: random.Random, job: JobState, sites: list[str]) -> JobState:
    steps: list[BidStep] = []
    bid, above = job.bid_micros_per_million_samples, 0.0
    for _ in range(draw.choice([0, 0, 1, 2])):
        bid, above = bid * draw.randint(20, 90) // 100, above + draw.uniform(1, 2000)
        steps.append(BidStep(above_samples_per_s=above, bid_micros_per_million_samples=bid))
    data = None
    if draw.random() < 0.4:
        data = DataState(
            home_site=draw.choice(sites),
            residency=draw.choice(["site", "region", "continent", "world"]),
            bytes_per_sample=draw.choice([0.0, 1e3, 1e6]),
        )
    speeds = ()
    if draw.random() < 0.3:
        kind = draw.choice(job.accelerators).gpu_type
        speeds = (JobSpeed(gpu_type=kind, flops_per_s=7e13, ring_bits_per_s=draw.choice([None, 2e11])),)
    return job.model_copy(
        update={
            "tenant_id": draw.choice([None, "ada", "bob", "cyd", "nobody"]),
            "data": data,
            "bid_steps": tuple(steps),
            "speeds": speeds,
            "mixed_types": draw.random() < 0.4,
            "sites_max": draw.choice([1, 2, 3, 4]),
            "samples_done": draw.choice([0, job.workload.samples, 0, 0, 0]),
        }
    )


def _running(draw: random.Random, snapshot: Snapshot, job: JobState) -> JobState:
    """Return a job that perhaps runs somewhere already, inside its term or past it."""
    rules = Rules(snapshot)
    pools = [pool for pool in snapshot.pools if any(row.gpu_type == pool.gpu_type for row in job.accelerators)]
    if not pools or draw.random() < 0.6 or job.samples_left == 0:
        return job
    pool = draw.choice(pools)
    parts = [rules.part(job, pool, draw.randint(1, 3))]
    plan = rules.resolved(job, parts, None)
    assert plan is not None
    sold = configuration_of(parts, plan, None, predict(job.workload, plan, parts, {}))
    incumbent = Incumbent(
        configuration=sold,
        epoch=1,
        locked_prices={pool.pool_id: round(pool.ask_micros_per_gpu_hour * draw.uniform(0.9, 1.5))},
        term_ends_ms=NOW_MS + draw.choice([-1, 0, 1, 300_000, 5_000_000]),
        restart_cost_micros=draw.choice([0, 1_000, CREDIT]),
    )
    barred = (sold.key,) if draw.random() < 0.2 else ()
    return job.model_copy(update={"incumbent": incumbent, "barred": barred})
