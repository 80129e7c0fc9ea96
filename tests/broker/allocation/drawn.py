"""Small markets drawn by hypothesis, in which every field of a snapshot is used in some way."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from broker.allocation.configuration import Configuration, Part, Traffic
from broker.allocation.snapshot import Incumbent, Snapshot
from training.spec import SyncPlan

MICROS = st.integers(0, 2**45)
TIME = st.integers(0, 2**53)
TYPES = ("A100", "T4", "H100", "cpu-slot")
SITES = ("ada", "ada-2", "bob", "cyd")


def _maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """Draw small markets in which every field is used in some way."""
    sites = draw(st.lists(st.sampled_from(SITES), unique=True, min_size=1))
    real = st.floats(1, 1e15)
    pools = [
        {
            "pool_id": f"{site}/{kind}",
            "site_id": site,
            "gpu_type": kind,
            "capacity_gpus": draw(st.integers(0, 10_000_000)),
            "ask_micros_per_gpu_hour": draw(st.integers(0, 2**44)),
            "flops_per_s": draw(_maybe(st.floats(1, 1e18))),
            "intra_site_bits_per_s": draw(_maybe(real)),
            "ask_steps": [
                {"gpus": draw(st.integers(1, 9)), "ask_micros_per_gpu_hour": 2**44 + 1 + step}
                for step in range(draw(st.integers(0, 2)))
            ],
            "job_gpus_max": draw(_maybe(st.integers(1, 99))),
            "reserved": [
                {"from_ms": begin, "to_ms": begin + 1 + draw(st.integers(0, 99)), "gpus": draw(st.integers(1, 9))}
                for begin in draw(st.lists(st.integers(0, 2**50), max_size=2))
            ],
            "drains_at_ms": draw(_maybe(TIME)),
        }
        for site in sites
        for kind in draw(st.lists(st.sampled_from(TYPES), unique=True))
    ]
    links = [
        {
            "from_site": a,
            "to_site": b,
            "bandwidth_bits_per_s": draw(real),
            "delay_s": draw(st.floats(0, 60)),
            "loss": draw(st.floats(0, 0.99)),
            "egress_price_micros_per_gb": draw(MICROS),
        }
        for a in sites
        for b in sites
        if draw(st.booleans())
    ]
    names = draw(st.lists(st.from_regex(r"[!-~]{1,12}", fullmatch=True), unique=True, max_size=4))
    return Snapshot.model_validate(
        {
            "round_number": draw(st.integers(0, 2**53)),
            "taken_at_ms": draw(TIME),
            "seed": draw(st.integers(0, 2**63 - 1)),
            "term_s": draw(st.integers(1, 31 * 86_400)),
            "market_equity_micros": draw(st.integers(0, 2**63 - 1)),
            "fee_basis_points": draw(st.integers(0, 10_000)),
            "slots": draw(st.integers(1, 8)),
            "slot_s": draw(st.integers(60, 86_400)),
            "waiting_discount": draw(st.floats(0, 0.99)),
            "floor_penalty_micros_per_gpu_hour": draw(MICROS),
            "sites": [
                {
                    "site_id": site,
                    "listens": draw(st.booleans()),
                    "region": draw(_maybe(st.sampled_from(["north", "ada"]))),
                    "continent": draw(_maybe(st.just("Europe"))),
                    "egress_micros_per_gb": {"to_region": draw(MICROS), "beyond": draw(MICROS)},
                }
                for site in sites
            ],
            "pools": pools,
            "links": links,
            "tenants": [
                {
                    "tenant_id": name,
                    "budget_micros_per_hour": draw(_maybe(st.integers(1, 2**45))),
                    "floor_gpus": draw(_maybe(st.integers(0, 99))),
                }
                for name in names[:2]
            ],
            "last_prices": {f"{site}/T4": draw(st.integers(0, 2**63 - 1)) for site in SITES if draw(st.booleans())},
            "jobs": [draw(_job(name, sites)) for name in names],
        }
    )


@st.composite
def _job(draw: st.DrawFn, name: str, sites: list[str]) -> dict[str, Any]:
    bid = draw(st.integers(5, 2**63 - 1))
    return {
        "job_id": name,
        "version": draw(st.integers(0, 2**53)),
        "submitted_ms": draw(st.integers(0, 2)),
        "accelerators": [
            {"gpu_type": kind, "count_min": low, "count_max": low + draw(st.integers(0, 9))}
            for kind in draw(st.lists(st.sampled_from(TYPES), unique=True, min_size=1))
            for low in [draw(st.integers(1, 100))]
        ],
        "sites_max": draw(st.integers(1, 8)),
        "sites_allowed": draw(_maybe(st.lists(st.sampled_from([*SITES, "gone"]), max_size=3))),
        "workload": {
            "samples": draw(st.integers(1, 10**13)),
            "batch_per_gpu": draw(st.integers(1, 1_000_000)),
            "parameters": draw(st.integers(1, 10**13)),
            "flops_per_sample": draw(st.floats(1, 1e21)),
        },
        "sync": {
            "strategy": draw(st.sampled_from(["auto", "local", "diloco"])),
            "codec": draw(st.sampled_from(["auto", "int8"])),
            "period_steps": draw(st.integers(1, 10_000)),
        },
        "samples_done": draw(st.integers(0, 10**13)),
        "bid_micros_per_million_samples": bid,
        "hold_left_micros": draw(st.integers(0, 10**15)),
        "deadline_ms": draw(_maybe(TIME)),
        "barred": draw(st.lists(st.from_regex(r"[!-~]{1,40}", fullmatch=True), max_size=2)),
        "incumbent": draw(_maybe(_incumbent())),
        "tenant_id": draw(_maybe(st.from_regex(r"[!-~]{1,8}", fullmatch=True))),
        "data": draw(
            _maybe(
                st.fixed_dictionaries(
                    {
                        "home_site": st.sampled_from(sites),
                        "residency": st.sampled_from(["site", "region", "continent", "world"]),
                        "bytes_per_sample": st.floats(0, 1e12),
                    }
                )
            )
        ),
        "bid_steps": [
            {"above_samples_per_s": 1.5 + step, "bid_micros_per_million_samples": bid - 2 - step}
            for step in range(draw(st.integers(0, 2)))
        ],
        "speeds": [
            {
                "gpu_type": kind,
                "flops_per_s": draw(st.floats(1, 1e18)),
                "ring_bits_per_s": draw(_maybe(st.floats(1, 1e15))),
            }
            for kind in draw(st.lists(st.sampled_from(TYPES), unique=True))
        ],
        "mixed_types": draw(st.booleans()),
    }


@st.composite
def _incumbent(draw: st.DrawFn) -> Incumbent:
    sites = sorted(draw(st.lists(st.sampled_from([*SITES, "gone"]), unique=True, min_size=1)))
    real = st.floats(0, 1e9)
    return Incumbent(
        configuration=Configuration(
            parts=tuple(
                Part(pool_id=f"{site}/A100", site_id=site, gpu_type="A100", gpus=draw(st.integers(1, 9)))
                for site in sites
            ),
            sync=SyncPlan(period_steps=draw(st.integers(1, 99))),
            hub_site=draw(_maybe(st.sampled_from(sites))),
            samples_per_s=draw(st.floats(1e-9, 1e9)),
            compute_s=draw(real),
            intra_site_s=draw(real),
            inter_site_s=draw(real),
            step_s=draw(st.floats(1e-9, 1e9)),
            traffic=tuple(
                Traffic(from_site=site, to_site=sites[0], bytes_per_s=draw(st.integers(0, 2**62))) for site in sites[1:]
            ),
        ),
        epoch=draw(st.integers(1, 99)),
        locked_prices={f"{site}/A100": draw(MICROS) for site in sites},
        term_ends_ms=draw(TIME),
        restart_cost_micros=draw(st.integers(0, 10**15)),
    )
