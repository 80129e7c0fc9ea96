"""The snapshot: everything that a round may know, frozen, with a digest.

The broker writes it from the database; solving reads nothing else. Rows may stand in any order:
compiling sorts them, so their order never changes a clearing. `broker.allocation.tables` holds the
same content in columns, for markets where one object per row would be slow.

Version 2 adds ask curves, quotas, reservations, data and its egress, tenants' budgets and floors,
bids that fall with speed, measured speeds by job, mixed GPU types and time slots. Everything new
has a default that means "not used".
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from broker.allocation.configuration import Configuration
from broker.allocation.document import Document, Row
from broker.allocation.instance import RATE_MICROS_PER_HOUR_MAX
from training.catalogue import GPU_TYPES
from training.spec import BUDGET_MICROS_MAX, SAMPLES_MAX, SITES_PER_JOB_MAX, GpuRequest, SiteId, SyncPlan, Workload

SNAPSHOT_VERSION: Final = 2
JOBS_MAX: Final = 200_000
POOLS_MAX: Final = 20_000
LINKS_MAX: Final = 1_000_000
TENANTS_MAX: Final = 200_000
# One micro-credit under 2^63, so that every amount fits a database's 64-bit integer.
MICROS_MAX: Final = 2**63 - 1
# Counters, times in milliseconds and versions: whatever a float still holds exactly.
COUNT_MAX: Final = 2**53
CAPACITY_GPUS_MAX: Final = 10_000_000
# A day of quarter-hours fits twelve times over; more slots multiply rows and candidates.
SLOTS_MAX: Final = 8
SLOT_S_MAX: Final = 7 * 86_400
TERM_S_MAX: Final = 31 * 86_400
# Pieces of an ask curve or of a bid, reservations of one pool.
STEPS_MAX: Final = 16
RESERVATIONS_MAX: Final = 64
BARRED_MAX: Final = 1_000
BARRED_LENGTH_MAX: Final = 512
# No GPU does 10^18 FLOP/s; below one FLOP/s a figure is a mistake in the unit.
FLOPS_PER_S_MAX: Final = 1e18
BITS_PER_S_MAX: Final = 1e15
BYTES_PER_SAMPLE_MAX: Final = 1e12

MicrosAmount = Annotated[int, Field(ge=0, le=MICROS_MAX)]
MicrosRate = Annotated[int, Field(ge=0, le=RATE_MICROS_PER_HOUR_MAX)]
Milliseconds = Annotated[int, Field(ge=0, le=COUNT_MAX)]
FlopsPerSecond = Annotated[float, Field(ge=1, le=FLOPS_PER_S_MAX)]
BitsPerSecond = Annotated[float, Field(ge=1, le=BITS_PER_S_MAX)]
# Printable ASCII without spaces: names sort the same as text and as bytes.
Identifier = Annotated[str, StringConstraints(pattern=r"^[!-~]{1,100}$")]
BarredKey = Annotated[str, StringConstraints(pattern=rf"^[!-~]{{1,{BARRED_LENGTH_MAX}}}$")]
Residency = Literal["site", "region", "continent", "world"]


class AskStep(Row):
    """Some of a pool's GPUs that cost more than its flat ask: the last ones, in rising order."""

    gpus: int = Field(ge=1, le=CAPACITY_GPUS_MAX, description="GPUs")
    ask_micros_per_gpu_hour: MicrosRate = Field(description="micro-credits per GPU-hour")


class Reservation(Row):
    """GPUs that are not for sale for a time: a maintenance window, or the operator's own use."""

    from_ms: Milliseconds = Field(description="UTC milliseconds")
    to_ms: Milliseconds = Field(description="UTC milliseconds, not included")
    gpus: int = Field(ge=1, le=CAPACITY_GPUS_MAX, description="GPUs")

    @model_validator(mode="after")
    def _forwards(self) -> Self:
        if self.to_ms <= self.from_ms:
            message = f"a reservation ends ({self.to_ms}) before it begins ({self.from_ms}); swap from_ms and to_ms"
            raise ValueError(message)
        return self


class PoolState(Row):
    """One GPU type at one site, as this round may use it.

    `capacity_gpus` counts the GPUs usable this round, those held by running leases included.
    `flops_per_s` (per GPU, achieved) and `intra_site_bits_per_s` are measured; None: catalogue.
    Of the capacity, the last GPUs cost what `ask_steps` say, the others the flat ask.
    """

    pool_id: str = Field(description="site_id/gpu_type")
    site_id: SiteId
    gpu_type: str
    capacity_gpus: int = Field(ge=0, le=CAPACITY_GPUS_MAX, description="GPUs, those of running leases included")
    ask_micros_per_gpu_hour: MicrosRate = Field(description="micro-credits per GPU-hour, the least that is accepted")
    flops_per_s: FlopsPerSecond | None = Field(default=None, description="FLOP/s achieved by one GPU; null: catalogue")
    intra_site_bits_per_s: BitsPerSecond | None = Field(
        default=None, description="bits/s of a ring inside the site; null: catalogue"
    )
    ask_steps: tuple[AskStep, ...] = Field(
        default=(), max_length=STEPS_MAX, description="the pool's last GPUs, dearer and dearer; empty: a flat ask"
    )
    job_gpus_max: int | None = Field(
        default=None, ge=1, le=CAPACITY_GPUS_MAX, description="most GPUs that one job may take here; null: no quota"
    )
    reserved: tuple[Reservation, ...] = Field(default=(), max_length=RESERVATIONS_MAX)
    drains_at_ms: Milliseconds | None = Field(
        default=None, description="UTC milliseconds from which on nothing is for sale; null: no end"
    )

    @model_validator(mode="after")
    def _named_by_site_and_type(self) -> Self:
        if self.pool_id != f"{self.site_id}/{self.gpu_type}":
            message = f"pool {self.pool_id!r} should be called {self.site_id}/{self.gpu_type}"
            raise ValueError(message)
        if self.gpu_type not in GPU_TYPES:
            message = f"pool {self.pool_id!r} has an unknown GPU type; the market knows {', '.join(sorted(GPU_TYPES))}"
            raise ValueError(message)
        asks = [self.ask_micros_per_gpu_hour, *(step.ask_micros_per_gpu_hour for step in self.ask_steps)]
        if any(later <= earlier for earlier, later in itertools.pairwise(asks)):
            message = f"ask_steps of {self.pool_id} must rise above the flat ask, each above the one before"
            raise ValueError(message)
        return self


class DataEgress(Row):
    """What reading data out of a site costs its owner, by how far it goes."""

    to_region: MicrosRate = Field(default=0, description="micro-credits per GB to another site of the region")
    to_continent: MicrosRate = Field(default=0, description="micro-credits per GB to another region of the continent")
    beyond: MicrosRate = Field(default=0, description="micro-credits per GB to another continent")


class SiteState(Row):
    """A site: whether its gateway accepts connections (only such a site can be a hub), and where it lies."""

    site_id: SiteId
    listens: bool
    region: Identifier | None = Field(default=None, description="null: no region in common with any site")
    continent: Identifier | None = Field(default=None, description="null: no continent in common with any site")
    egress_micros_per_gb: DataEgress = Field(default=DataEgress(), description="for data whose home is here")


class LinkState(Row):
    """A directed link as last measured. Egress is paid by `from_site`."""

    from_site: SiteId
    to_site: SiteId
    bandwidth_bits_per_s: BitsPerSecond = Field(description="bits/s")
    delay_s: float = Field(ge=0, le=60, description="seconds, one way")
    loss: float = Field(default=0.0, ge=0, lt=1, description="share of packets")
    egress_price_micros_per_gb: MicrosRate = Field(default=0, description="micro-credits per GB")
    last_price_micros_per_share_hour: MicrosAmount = Field(
        default=0, description="last round's price: micro-credits per ten-thousandth of the link for an hour"
    )


class Incumbent(Row):
    """The live lease of a job that runs. Its configuration keeps the prediction it was sold with.

    `locked_prices` are per GPU-hour by pool until `term_ends_ms`; `restart_cost_micros` is what a
    move destroys: work since the last checkpoint and the time to start again.
    """

    configuration: Configuration
    epoch: int = Field(ge=1, le=COUNT_MAX)
    locked_prices: dict[str, MicrosRate] = Field(description="micro-credits per GPU-hour by pool_id")
    term_ends_ms: Milliseconds = Field(description="UTC milliseconds")
    restart_cost_micros: int = Field(default=0, ge=0, le=BUDGET_MICROS_MAX, description="micro-credits")

    @model_validator(mode="after")
    def _pools_named(self) -> Self:
        for part in self.configuration.parts:
            if part.pool_id != f"{part.site_id}/{part.gpu_type}":
                message = f"the incumbent's pool {part.pool_id!r} should be called {part.site_id}/{part.gpu_type}"
                raise ValueError(message)
        return self


class DataState(Row):
    """Where a job's data lies, how far it may travel, and how much a sample reads."""

    home_site: SiteId
    residency: Residency = Field(default="world", description="how far from its home the data may be read")
    bytes_per_sample: float = Field(ge=0, le=BYTES_PER_SAMPLE_MAX, description="bytes read per sample")


class BidStep(Row):
    """Progress above a speed is worth a lower bid."""

    above_samples_per_s: float = Field(gt=0, le=1e15, description="samples/s from which on this bid holds")
    bid_micros_per_million_samples: int = Field(ge=0, le=MICROS_MAX, description="micro-credits per 10^6 samples")


class JobSpeed(Row):
    """What was measured for this job on a GPU type, in place of the pools' own figures."""

    gpu_type: str
    flops_per_s: FlopsPerSecond = Field(description="FLOP/s achieved by one GPU")
    ring_bits_per_s: BitsPerSecond | None = Field(default=None, description="bits/s of the ring; null: the pool's")


class JobState(Row):
    """A job that runs or wants to. `version` is the database row's, checked again at commit.

    `hold_left_micros` is what the hold has not yet posted, what a running term has reserved
    included. `barred` lists configuration keys that a site vetoed lately.
    """

    job_id: Identifier
    version: int = Field(ge=0, le=COUNT_MAX)
    submitted_ms: Milliseconds = Field(description="UTC milliseconds")
    accelerators: tuple[GpuRequest, ...] = Field(min_length=1, max_length=len(GPU_TYPES))
    sites_max: int = Field(default=1, ge=1, le=SITES_PER_JOB_MAX, description="most sites it may span")
    sites_allowed: tuple[SiteId, ...] | None = Field(default=None, max_length=POOLS_MAX, description="null: every site")
    workload: Workload
    sync: SyncPlan = SyncPlan()
    samples_done: int = Field(default=0, ge=0, le=SAMPLES_MAX, description="samples")
    bid_micros_per_million_samples: int = Field(ge=1, le=MICROS_MAX, description="micro-credits per 10^6 samples")
    hold_left_micros: int = Field(ge=0, le=BUDGET_MICROS_MAX, description="micro-credits")
    deadline_ms: Milliseconds | None = Field(default=None, description="UTC milliseconds; null: none")
    barred: tuple[BarredKey, ...] = Field(default=(), max_length=BARRED_MAX)
    incumbent: Incumbent | None = None
    tenant_id: Identifier | None = Field(default=None, description="whose budget and floor it counts for")
    data: DataState | None = Field(default=None, description="null: it reads nothing from far away")
    bid_steps: tuple[BidStep, ...] = Field(
        default=(), max_length=STEPS_MAX, description="lower and lower bids for further speed; empty: one bid"
    )
    speeds: tuple[JobSpeed, ...] = Field(default=(), max_length=len(GPU_TYPES))
    mixed_types: bool = Field(default=False, description="it may span two sites with different kinds of GPU")
    sync_open: bool = Field(
        default=False,
        description="strategy, codec and period between sites are chosen by configuration where `sync` leaves them open",
    )

    @property
    def samples_left(self) -> int:
        """Samples still to be done; a job that has none left should not be in a snapshot."""
        return max(0, self.workload.samples - self.samples_done)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _once("accelerators", (request.gpu_type for request in self.accelerators))
        _once("speeds", (speed.gpu_type for speed in self.speeds))
        unknown = [speed.gpu_type for speed in self.speeds if speed.gpu_type not in GPU_TYPES]
        if unknown:
            message = f"speeds name an unknown GPU type {unknown[0]!r}; the market knows {', '.join(sorted(GPU_TYPES))}"
            raise ValueError(message)
        if self.sync_open and (self.sync.strategy != "auto" or self.sync.merge != "mean"):
            message = "sync_open leaves the plan to the market, so sync.strategy must be auto and sync.merge mean"
            raise ValueError(message)
        if self.workload.flops_per_sample < 1:
            message = f"workload.flops_per_sample is {self.workload.flops_per_sample}; a sample costs at least one FLOP"
            raise ValueError(message)
        bids = [self.bid_micros_per_million_samples, *(step.bid_micros_per_million_samples for step in self.bid_steps)]
        speeds = [step.above_samples_per_s for step in self.bid_steps]
        if any(later >= earlier for earlier, later in itertools.pairwise(bids)) or any(
            later <= earlier for earlier, later in itertools.pairwise(speeds)
        ):
            message = "bid_steps must fall below the bid, each below the one before, at rising speeds"
            raise ValueError(message)
        return self


class TenantState(Row):
    """What a tenant may spend in all, and how many GPUs it should have at least."""

    tenant_id: Identifier
    budget_micros_per_hour: int | None = Field(
        default=None, ge=1, le=RATE_MICROS_PER_HOUR_MAX, description="micro-credits per hour over all jobs; null: none"
    )
    floor_gpus: int | None = Field(
        default=None, ge=0, le=CAPACITY_GPUS_MAX, description="GPUs that missing them costs the market's penalty"
    )


class Snapshot(Document):
    """The whole input of a round.

    `market_equity_micros` is what the market may spend on uplift beyond what running leases have
    been promised. `seed` is recorded for solvers that draw numbers; this one draws none.
    """

    version: Literal[2] = SNAPSHOT_VERSION
    round_number: int = Field(ge=0, le=COUNT_MAX)
    taken_at_ms: Milliseconds = Field(description="UTC milliseconds")
    seed: int = Field(default=0, ge=0, le=MICROS_MAX)
    term_s: int = Field(ge=1, le=TERM_S_MAX, description="seconds for which a price is locked")
    market_equity_micros: MicrosAmount = Field(default=0, description="micro-credits")
    fee_basis_points: int = Field(default=0, ge=0, le=10_000, description="ten-thousandths of the price")
    payment_rule: Literal["uniform", "pay_as_bid"] = Field(
        default="uniform", description="what buyers pay: the prices, or their whole value; placements are the same"
    )
    pools: tuple[PoolState, ...] = Field(default=(), max_length=POOLS_MAX)
    sites: tuple[SiteState, ...] = Field(default=(), max_length=POOLS_MAX)
    links: tuple[LinkState, ...] = Field(default=(), max_length=LINKS_MAX)
    jobs: tuple[JobState, ...] = Field(default=(), max_length=JOBS_MAX)
    last_prices: dict[Identifier, MicrosAmount] = Field(
        default_factory=dict, max_length=POOLS_MAX, description="micro-credits per GPU-hour by pool_id"
    )
    follow_last_prices: bool = Field(
        default=False, description="let the last prices stand and place only what changed, while the gap stays small"
    )
    tenants: tuple[TenantState, ...] = Field(default=(), max_length=TENANTS_MAX)
    floor_penalty_micros_per_gpu_hour: MicrosRate = Field(
        default=0, description="micro-credits per GPU-hour that a tenant has less than its floor"
    )
    slots: int = Field(default=1, ge=1, le=SLOTS_MAX, description="time slots planned; 1: only now")
    slot_s: int = Field(default=3600, ge=60, le=SLOT_S_MAX, description="seconds of a slot, where there are several")
    waiting_discount: float = Field(default=0.0, ge=0, lt=1, description="share of value lost per slot waited")

    @model_validator(mode="before")
    @classmethod
    def _this_version(cls, document: Any) -> Any:  # noqa: ANN401  pydantic hands over whatever was given
        found = document.get("version", SNAPSHOT_VERSION) if isinstance(document, dict) else SNAPSHOT_VERSION
        if found != SNAPSHOT_VERSION:
            message = (
                f"this snapshot has version {str(found)[:20]}, and this Hansa reads version {SNAPSHOT_VERSION}; take a "
                "new snapshot, or use the release of Hansa that wrote it"
            )
            raise ValueError(message)
        return document

    @model_validator(mode="after")
    def _names_once(self) -> Self:
        _once("pools", (pool.pool_id for pool in self.pools))
        _once("sites", (site.site_id for site in self.sites))
        _once("links", ((link.from_site, link.to_site) for link in self.links))
        _once("jobs", (job.job_id for job in self.jobs))
        _once("tenants", (tenant.tenant_id for tenant in self.tenants))
        sites = {site.site_id for site in self.sites}
        named = [(f"pools: {pool.pool_id}", pool.site_id) for pool in self.pools]
        named += [(f"links: {link.from_site} to {link.to_site}", link.from_site) for link in self.links]
        named += [(f"links: {link.from_site} to {link.to_site}", link.to_site) for link in self.links]
        named += [(f"jobs: the data of {job.job_id}", job.data.home_site) for job in self.jobs if job.data is not None]
        for what, site in named:
            if site not in sites:
                message = f"{what} is at {site}, which `sites` does not list; add the site or leave the row out"
                raise ValueError(message)
        return self


def _once(what: str, names: Iterable[object]) -> None:
    """Raise ValueError where a name stands twice."""
    seen = set()
    for name in names:
        if name in seen:
            message = f"{name} stands twice in {what}; each may stand there once"
            raise ValueError(message)
        seen.add(name)
