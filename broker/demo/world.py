"""What the demo's market consists of: three sites, three jobs, and the broker's settings.

The figures are chosen so that one round shows a market at work: the jobs want eight slots, the sites have seven, and
no single site has the four that the largest job needs. CPU slots stand in for GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

CREDIT_MICROS: Final = 1_000_000
GPU_TYPE: Final = "cpu-slot"
DEPOSIT_MICROS: Final = 1000 * CREDIT_MICROS
EQUITY_MICROS: Final = 10 * CREDIT_MICROS
EXAMPLE: Final = "stdlib_lm"
PERIOD_STEPS: Final = 10  # short, so that a person sees many sync rounds


@dataclass(frozen=True, slots=True)
class DemoSite:
    """A datacenter of the demo. One that listens can be the hub of a job's round log."""

    site_id: str
    slots: int
    ask_micros_per_slot_hour: int
    listens: bool


@dataclass(frozen=True, slots=True)
class DemoJob:
    """A job of the demo: how many slots, on how many sites at most, what it bids and how much there is to do."""

    name: str
    tenant_id: str
    slots: int
    sites_max: int
    samples: int
    bid_micros_per_million_samples: int
    budget_micros: int
    why: str


SITES: Final = (
    DemoSite("lubeck", slots=2, ask_micros_per_slot_hour=900_000, listens=True),
    DemoSite("visby", slots=2, ask_micros_per_slot_hour=1_200_000, listens=True),
    DemoSite("bergen", slots=2, ask_micros_per_slot_hour=600_000, listens=False),
)

JOBS: Final = (
    DemoJob(
        name="cog",
        tenant_id="fugger",
        slots=4,
        sites_max=2,
        samples=16_000,
        bid_micros_per_million_samples=12 * CREDIT_MICROS,
        budget_micros=3 * CREDIT_MICROS,
        why="four slots: no single site has them, so it spans two",
    ),
    DemoJob(
        name="holk",
        tenant_id="medici",
        slots=2,
        sites_max=1,
        samples=4_800,
        bid_micros_per_million_samples=8 * CREDIT_MICROS,
        budget_micros=2 * CREDIT_MICROS,
        why="two slots at one site, with a middling bid",
    ),
    DemoJob(
        name="knarr",
        tenant_id="medici",
        slots=2,
        sites_max=1,
        samples=3_200,
        # Enough for the slots' ask where the machine is so busy that holk was measured at a tenth of its prediction.
        bid_micros_per_million_samples=6 * CREDIT_MICROS,
        budget_micros=1 * CREDIT_MICROS,
        why="the lowest bid: it is outbid at first and runs when slots are free again",
    ),
)
TENANTS: Final = tuple(sorted({job.tenant_id for job in JOBS}))

# Seconds are short so that a person sees the market move; everything else is as in production.
BROKER_SETTINGS: Final[dict[str, str]] = {
    "HANSA_HEARTBEAT_S": "1",
    # On a machine that does other work besides, an agent may be slow to be heard; nothing here waits for it to be lost.
    "HANSA_LIVENESS_S": "30",
    "HANSA_LIVENESS_MARGIN_S": "4",
    "HANSA_PROPOSAL_S": "20",
    "HANSA_ROUND_S": "2",
    "HANSA_RECONCILE_S": "1",
    "HANSA_TERM_S": "600",
    "HANSA_GRACE_S": "1",
    "HANSA_RESTART_S": "20",
}
