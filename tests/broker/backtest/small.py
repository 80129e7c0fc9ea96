"""Small federations and traces for tests of the backtest."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from broker.backtest.bids import BidRule
from broker.backtest.sites import Federation, SiteRow, SitesFile, federation
from broker.backtest.throughput import Throughput, read_throughput
from broker.backtest.trace import Trace, read_trace
from broker.backtest.workload import Workload, build

HEADER = "timestamp,duration,num_gpus,cluster"

TABLE = """gpu_type,consolidated,job_type,gpus,steps_per_s
slow,yes,net,1,1.0
slow,yes,net,2,1.8
slow,yes,net,4,3.2
slow,yes,net,8,6.0
fast,yes,net,1,3.0
fast,yes,net,2,5.4
fast,yes,net,4,9.6
fast,yes,net,8,18.0
slow,no,net,8,5.0
fast,no,net,8,12.0
slow,yes,huge,1,0.0
fast,yes,huge,1,2.0
"""


def write_trace(folder: Path, *jobs: str, header: str = HEADER) -> Path:
    path = folder / "trace.csv"
    path.write_text("\n".join([header, *jobs]) + "\n")
    return path


def trace_of(folder: Path, *jobs: str) -> Trace:
    return read_trace(write_trace(folder, *jobs))


def table(folder: Path) -> Throughput:
    path = folder / "table.csv"
    path.write_text(TABLE)
    return read_throughput(path)


def sites_of(trace: Trace, **rows: tuple[str, str, int]) -> Federation:
    """Return sites by name: (GPU type, ask, GPUs)."""
    listed = [
        SiteRow(name=name, gpu_type=kind, ask=ask, capacity_gpus=gpus) for name, (kind, ask, gpus) in rows.items()
    ]
    return federation(SitesFile(sites=listed), trace)


def random_trace(folder: Path, seed: int, jobs: int = 120) -> Trace:
    """Return a busy two days of three clusters."""
    rng = np.random.default_rng(seed)
    arrival = np.sort(rng.uniform(0, 2 * 86_400, jobs))
    duration = rng.lognormal(7.5, 1.2, jobs)
    gpus = rng.choice([1, 1, 1, 2, 4, 8], jobs)
    cluster = rng.choice(["a", "a", "b", "c"], jobs)
    return trace_of(
        folder, *(f"{t:.3f},{d:.1f},{g},{c}" for t, d, g, c in zip(arrival, duration, gpus, cluster, strict=True))
    )


def three_sites(trace: Trace) -> Federation:
    return sites_of(trace, a=("slow", "0.40", 8), b=("fast", "1.10", 10), c=("slow", "0.30", 12))


def workload_of(
    trace: Trace, sites: Federation, speeds: Throughput, *, bids: BidRule = BidRule.FLAT, patience: float | None = None
) -> Workload:
    return build(trace, sites, speeds, bids=bids, seed=1, patience=patience)[0]
