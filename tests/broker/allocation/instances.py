"""Markets to test with: small ones written out, and seeded ones of any size."""

from __future__ import annotations

import random

from broker.allocation.snapshot import JobState, LinkState, PoolState, SiteState, Snapshot
from training.spec import GpuRequest, SyncPlan, Workload

CREDIT = 1_000_000
NOW_MS = 1_800_000_000_000


def pool(site: str, gpus: int, ask_credits: float = 1.0, gpu_type: str = "A100") -> PoolState:
    return PoolState(
        pool_id=f"{site}/{gpu_type}",
        site_id=site,
        gpu_type=gpu_type,
        capacity_gpus=gpus,
        ask_micros_per_gpu_hour=round(ask_credits * CREDIT),
        # 1e12 flops a second and a very fast fabric: an hour of a GPU is 3.6e15 flops, near enough linear.
        flops_per_s=1e12,
        intra_site_bits_per_s=1e15,
    )


def job(
    name: str,
    credits_per_gpu_hour: float,
    gpus: int | tuple[int, int] = 1,
    *,
    gpu_type: str = "A100",
    submitted_ms: int = 0,
    hold_credits: float = 1e6,
    hours: float = 1000.0,
    parameters: int = 1000,
    **more: object,
) -> JobState:
    """Return a job whose value is about `credits_per_gpu_hour` for each of its GPUs, for `hours` GPU-hours."""
    low, high = (gpus, gpus) if isinstance(gpus, int) else gpus
    # One sample is 1e12 flops: one sample a second on a GPU of `pool`, 3600 an hour.
    return JobState(
        job_id=name,
        version=1,
        submitted_ms=submitted_ms,
        accelerators=(GpuRequest(gpu_type=gpu_type, count_min=low, count_max=high),),
        workload=Workload(
            samples=round(hours * 3600), batch_per_gpu=1000, parameters=parameters, flops_per_sample=1e12
        ),
        bid_micros_per_million_samples=max(1, round(credits_per_gpu_hour * CREDIT * 1e6 / 3600)),
        hold_left_micros=round(hold_credits * CREDIT),
        **more,  # type: ignore[arg-type]
    )


def market(pools: list[PoolState], jobs: list[JobState], *, links: bool = True, **more: object) -> Snapshot:
    sites = sorted({row.site_id for row in pools})
    return Snapshot(
        round_number=more.pop("round_number", 1),  # type: ignore[arg-type]
        taken_at_ms=NOW_MS,
        term_s=more.pop("term_s", 600),  # type: ignore[arg-type]
        pools=tuple(pools),
        sites=tuple(SiteState(site_id=site, listens=True) for site in sites),
        links=tuple(
            LinkState(from_site=a, to_site=b, bandwidth_bits_per_s=1e9, delay_s=0.01, egress_price_micros_per_gb=20_000)
            for a in sites
            for b in sites
            if a != b and links
        ),
        jobs=tuple(jobs),
        **more,  # type: ignore[arg-type]
    )


def random_market(
    seed: int, jobs: int, sites: int, types: int = 2, *, load: float = 1.3, equity_credits: float = 0
) -> Snapshot:
    """Return a seeded market with odd sizes, several types, thin links and some jobs that span sites."""
    draw = random.Random(seed)  # noqa: S311 - a seeded test market, nothing secret
    kinds = ["A100", "V100", "T4", "H100"][:types]
    speed = {"A100": 1.0, "V100": 0.45, "T4": 0.2, "H100": 2.2}
    pools = [
        PoolState(
            pool_id=f"site{site:03d}/{kind}",
            site_id=f"site{site:03d}",
            gpu_type=kind,
            capacity_gpus=draw.choice([2, 3, 4, 6, 8, 12, 16]),
            ask_micros_per_gpu_hour=round(speed[kind] * CREDIT * draw.uniform(0.7, 1.3)),
            flops_per_s=speed[kind] * 1e14 * draw.uniform(0.9, 1.1),
            intra_site_bits_per_s=draw.choice([1e11, 4e11]),
        )
        for site in range(sites)
        for kind in kinds
    ]
    names = sorted({row.site_id for row in pools})
    links = [
        LinkState(
            from_site=a,
            to_site=b,
            bandwidth_bits_per_s=draw.choice([1e8, 5e8, 1e9, 1e10]),
            delay_s=draw.uniform(0.002, 0.08),
            egress_price_micros_per_gb=draw.choice([0, 20_000, 80_000]),
        )
        for a in names
        for b in names
        if a != b and draw.random() < 0.8
    ]
    mean = max(1.0, load * sum(row.capacity_gpus for row in pools) / max(1, jobs))
    book = []
    for index in range(jobs):
        wanted = draw.sample(kinds, draw.randint(1, len(kinds)))
        low = draw.choice([1, 1, 2, 3, 4])
        high = max(low, min(32, round(mean * draw.choice([0.5, 1, 2]))))
        flops = draw.choice([1e11, 1e12, 5e12])
        batch = draw.choice([16, 64])
        # What a million samples cost on an A100 at one credit an hour, and a bid around that.
        cost = 1e6 * flops / 1e14 / 3600 * CREDIT
        book.append(
            JobState(
                job_id=f"job{index:05d}",
                version=index,
                submitted_ms=draw.randint(0, 10),
                accelerators=tuple(GpuRequest(gpu_type=kind, count_min=low, count_max=high) for kind in wanted),
                sites_max=draw.choice([1, 1, 2, 3]),
                sites_allowed=tuple(draw.sample(names, max(1, len(names) // 2))) if draw.random() < 0.2 else None,
                workload=Workload(
                    samples=draw.randint(10**5, 10**9),
                    batch_per_gpu=batch,
                    parameters=draw.choice([10**7, 10**8, 10**9]),
                    flops_per_sample=flops,
                ),
                sync=SyncPlan(period_steps=draw.choice([10, 50])),
                bid_micros_per_million_samples=max(1, round(cost * draw.lognormvariate(0.6, 0.5))),
                hold_left_micros=draw.choice([10, 100, 10_000]) * CREDIT,
                deadline_ms=NOW_MS + draw.randint(1, 500) * 3_600_000 if draw.random() < 0.2 else None,
            )
        )
    return Snapshot(
        round_number=seed,
        taken_at_ms=NOW_MS,
        seed=seed,
        term_s=600,
        market_equity_micros=round(equity_credits * CREDIT),
        pools=tuple(pools),
        sites=tuple(SiteState(site_id=name, listens=draw.random() < 0.6) for name in names),
        links=tuple(links),
        jobs=tuple(book),
    )


def with_open_plans(snapshot: Snapshot, seed: int) -> Snapshot:
    """Return the market with plans between sites that are its to choose, some with a period, codec or cap of their own."""
    draw = random.Random(seed)  # noqa: S311 - a seeded test market, nothing secret

    def opened(job: JobState) -> JobState:
        if job.sync.strategy != "auto":
            return job
        plan = job.sync.model_copy(
            update={
                "codec": draw.choice(["auto", "auto", "auto", "int8"]),
                "period_steps": draw.choice([20, 20, 20, 50]),
                "target_utilisation": draw.choice([0.8, 0.95, 0.99]),
                "max_egress_gb": draw.choice([None, None, 0.5, 50.0]),
                "fragments": draw.choice([3, 4]),
            }
        )
        return job.model_copy(update={"sync": plan, "sync_open": True})

    return snapshot.model_copy(update={"jobs": tuple(opened(job) for job in snapshot.jobs)})
