"""The snapshot: everything that a round may know, frozen, with a digest.

The broker writes it from the database; `broker.allocation.solve` reads nothing else. Rows may
stand in any order: the solver sorts them, so their order never changes a clearing.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from broker.allocation.configuration import Configuration
from broker.allocation.document import Document, Row
from training.spec import SITES_PER_JOB_MAX, GpuRequest, SiteId, SyncPlan, Workload

SNAPSHOT_VERSION: Final = 1
JOBS_MAX: Final = 200_000
POOLS_MAX: Final = 20_000
LINKS_MAX: Final = 1_000_000
# One micro-credit under 2^63, so that every amount fits a database's 64-bit integer.
MICROS_MAX: Final = 2**63 - 1

MicrosAmount = Annotated[int, Field(ge=0, le=MICROS_MAX)]


class PoolState(Row):
    """One GPU type at one site, as this round may use it.

    `capacity_gpus` counts the GPUs usable this round, those held by running leases included.
    `flops_per_s` (per GPU, achieved) and `intra_site_bits_per_s` are measured; None: catalogue.
    """

    pool_id: str
    site_id: SiteId
    gpu_type: str
    capacity_gpus: int = Field(ge=0, le=10_000_000)
    ask_micros_per_gpu_hour: MicrosAmount
    flops_per_s: float | None = Field(default=None, gt=0)
    intra_site_bits_per_s: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _named_by_site_and_type(self) -> Self:
        if self.pool_id != f"{self.site_id}/{self.gpu_type}":
            message = f"pool {self.pool_id!r} should be called {self.site_id}/{self.gpu_type}"
            raise ValueError(message)
        return self


class SiteState(Row):
    """A site, and whether its gateway accepts connections: only such a site can be a hub."""

    site_id: SiteId
    listens: bool


class LinkState(Row):
    """A directed link as last measured. Egress is paid by `from_site`."""

    from_site: SiteId
    to_site: SiteId
    bandwidth_bits_per_s: float = Field(gt=0)
    delay_s: float = Field(ge=0, le=60, description="one way")
    loss: float = Field(default=0.0, ge=0, lt=1)
    egress_price_micros_per_gb: MicrosAmount = 0


class Incumbent(Row):
    """The live lease of a job that runs. Its configuration keeps the prediction it was sold with.

    `locked_prices` are per GPU-hour by pool until `term_ends_ms`; `restart_cost_micros` is what a
    move destroys: work since the last checkpoint and the time to start again.
    """

    configuration: Configuration
    epoch: int = Field(ge=1)
    locked_prices: dict[str, MicrosAmount]
    term_ends_ms: int = Field(ge=0)
    restart_cost_micros: MicrosAmount = 0


class JobState(Row):
    """A job that runs or wants to. `version` is the database row's, checked again at commit.

    `hold_left_micros` is what the hold has not yet posted, what a running term has reserved
    included. `barred` lists configuration keys that a site vetoed lately.
    """

    job_id: str = Field(min_length=1, max_length=100)
    version: int = Field(ge=0)
    submitted_ms: int = Field(ge=0)
    accelerators: tuple[GpuRequest, ...] = Field(min_length=1)
    sites_max: int = Field(default=1, ge=1, le=SITES_PER_JOB_MAX)
    sites_allowed: tuple[SiteId, ...] | None = None
    workload: Workload
    sync: SyncPlan = SyncPlan()
    samples_done: int = Field(default=0, ge=0)
    bid_micros_per_million_samples: int = Field(ge=1, le=MICROS_MAX)
    hold_left_micros: MicrosAmount
    deadline_ms: int | None = Field(default=None, ge=0)
    barred: tuple[str, ...] = ()
    incumbent: Incumbent | None = None

    @property
    def samples_left(self) -> int:
        """Samples still to be done; a job that has none left should not be in a snapshot."""
        return max(0, self.workload.samples - self.samples_done)


class Snapshot(Document):
    """The whole input of a round.

    `market_equity_micros` is what the market may spend on uplift beyond what running leases have
    been promised. `seed` is recorded for solvers that draw numbers; this one draws none.
    """

    version: Literal[1] = SNAPSHOT_VERSION
    round_number: int = Field(ge=0)
    taken_at_ms: int = Field(ge=0)
    seed: int = Field(default=0, ge=0)
    term_s: int = Field(ge=1, le=31 * 86_400)
    market_equity_micros: MicrosAmount = 0
    fee_basis_points: int = Field(default=0, ge=0, le=10_000)
    pools: tuple[PoolState, ...] = Field(default=(), max_length=POOLS_MAX)
    sites: tuple[SiteState, ...] = Field(default=(), max_length=POOLS_MAX)
    links: tuple[LinkState, ...] = Field(default=(), max_length=LINKS_MAX)
    jobs: tuple[JobState, ...] = Field(default=(), max_length=JOBS_MAX)
    last_prices: dict[str, MicrosAmount] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _names_once(self) -> Self:
        for what, names in (
            ("pool", [pool.pool_id for pool in self.pools]),
            ("site", [site.site_id for site in self.sites]),
            ("link", [(link.from_site, link.to_site) for link in self.links]),
            ("job", [job.job_id for job in self.jobs]),
        ):
            if len(set(names)) != len(names):
                message = f"a {what} stands twice in the snapshot"
                raise ValueError(message)
        return self
