"""The broker's settings: environment first (`HANSA_…`), then these defaults.

`heartbeat_s` and `liveness_s` set the pace of everything that sites are part of; shorten them together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from broker.allocation.instance import RATE_MICROS_PER_HOUR_MAX
from broker.allocation.snapshot import SLOT_S_MAX, SLOTS_MAX
from sites.links.messages import PROBE_BYTES_MAX

# A site's warden takes up to 2 s to kill what expired (`sites.drivers.warden.GRACE_EXPIRED_S`), and must be seen to have
# done so on another machine's clock: with less a GPU could serve two.
LIVENESS_MARGIN_S_MIN: Final = 3.0
POSTGRESQL: Final = "postgresql+psycopg"
# Two heartbeats may be lost on the way before a site's work is taken for lost.
HEARTBEATS_PER_LIVENESS_MIN: Final = 3


class Settings(BaseSettings):
    """What an admin may set. `home` holds keys, artifacts, snapshots and the SQLite file."""

    model_config = SettingsConfigDict(hide_input_in_errors=True, env_prefix="HANSA_", extra="ignore")

    home: Path = Path(".hansa/broker")
    database_url: str = Field(default="", description="SQLAlchemy URL; empty means SQLite in home")
    redis_url: str = Field(default="", description="Redis or Valkey; empty means no doorbell, beat alone")
    public_url: str = Field(default="https://127.0.0.1:7400", description="where sites and tenants reach the API")
    wake_url: str = Field(default="", description="where browsers reach the wake process; empty means they poll")
    market_name: str = "hansa"

    heartbeat_s: float = Field(default=5.0, gt=0, le=60)
    liveness_s: float = Field(default=20.0, gt=0, le=600, description="an agent kills its ranks this long after")
    liveness_margin_s: float = Field(
        default=10.0,
        ge=LIVENESS_MARGIN_S_MIN,
        description="how much longer the broker waits; a site takes two seconds to kill what expired",
    )
    proposal_s: float = Field(default=30.0, gt=0, description="an unconfirmed proposal falls through after this")
    term_s: int = Field(default=3600, ge=10, le=7 * 86_400)
    instant_gpus_max: int = Field(
        default=8, ge=0, description="GPUs of a job that may start at the last prices; 0: none"
    )
    round_s: float = Field(default=5.0, gt=0, description="the beat of rounds when nothing rings")
    economics_s: float = Field(default=20.0, gt=0, le=600, description="time to find what sharing was worth in a round")
    economics_rounds_max: int = Field(
        default=100, ge=1, description="rounds that may wait for that; older ones go without"
    )
    barred_rounds: int = Field(default=20, ge=1, description="how long a vetoed configuration stays barred")
    refusal_s: float = Field(
        default=3600.0, gt=0, description="how long a job is kept from a site whose owner refused it altogether"
    )
    reconcile_s: float = Field(default=2.0, gt=0, description="the beat of reconcile and settle")
    settle_s: float = Field(default=60.0, gt=0, description="how long a final report may lag behind a lost lease")
    grace_s: float = Field(default=2.0, ge=0, le=3600, description="how long a hub waits after the quorum is in")
    restart_s: float = Field(default=60.0, gt=0, description="working time that moving a running job is taken to cost")
    handover_s: float = Field(
        default=60.0, gt=0, le=3600, description="how long a moving job's sites may take to the end of a sync round"
    )
    hub_lost_s: float = Field(
        default=6.0, gt=0, description="a hub that its members do not reach for this long is moved"
    )
    absent_s: float = Field(
        default=1.0,
        gt=0,
        description="a hub that neither members nor market reach for this long is left out of the view",
    )
    attempts_max: int = Field(default=5, ge=1, description="lost or broken attempts before a job fails")
    fee_basis_points: int = Field(default=0, ge=0, le=1000)
    lp_engine: Literal["highs", "clp"] = Field(
        default="highs", description="what solves a round's LP; clp: the extra clp"
    )
    slots: int = Field(
        default=1, ge=1, le=SLOTS_MAX, description="time slots that a round plans, so that waiting has a price; 1: now"
    )
    slot_s: int = Field(default=900, ge=60, le=SLOT_S_MAX, description="length of a slot, where there are several")
    waiting_discount: float = Field(default=0.01, ge=0, lt=1, description="share of its value that a slot's wait costs")
    follow_jobs_min: int = Field(
        default=1000,
        ge=0,
        description="a round of fewer jobs is always solved from nothing, which takes under a second",
    )
    follow_changed_share_max: float = Field(
        default=0.02, ge=0, le=1, description="where no more of the jobs came or went, the last prices may stand"
    )
    follow_rounds_max: int = Field(
        default=11, ge=0, le=1000, description="rounds in a row that may let them stand; 0: none"
    )
    floor_penalty_micros_per_gpu_hour: int = Field(
        default=0,
        ge=0,
        le=RATE_MICROS_PER_HOUR_MAX,
        description="what a GPU less than a tenant's floor costs the market; 0: no floors",
    )

    link_probe_interval_s: float = Field(
        default=1800.0,
        ge=0,
        description="how long two sites' links are left alone after a probe, or after a site joined",
    )
    link_probe_bytes_max: int = Field(
        default=500_000_000, ge=1, le=PROBE_BYTES_MAX, description="of one probe, in each direction"
    )
    link_probe_bytes_per_day: int = Field(
        default=4_000_000_000,
        ge=0,
        description="of one site, sent and received; its owner may allow less. 0: no probes",
    )
    link_half_life_s: float = Field(default=86_400.0, gt=0, description="what a measured link's weight halves in")

    requests_per_s: float = Field(
        default=50.0, gt=0, description="of one token, person or address to one API process; ten seconds' worth at once"
    )
    site_requests_per_s: float = Field(default=200.0, gt=0, description="of one site, whose checkpoints come in chunks")

    workdir_bytes_max: int = 64 * 1024 * 1024
    artifact_bytes_max: int = 16 * 1024**3
    stream_bytes_max: int = Field(default=16 * 1024 * 1024, description="one log or metrics file of one lease")
    jobs_queued_per_tenant_max: int = 10_000
    site_certificate_s: int = 24 * 3600
    attempt_certificate_s: int = 24 * 3600
    snapshot_retention_rounds: int = 10_000

    @field_validator("database_url")
    @classmethod
    def _name_the_driver(cls, url: str) -> str:
        dialect, found, _ = url.partition("://")
        if found and dialect.startswith("postgres") and dialect != POSTGRESQL:
            message = f"PostgreSQL is reached through psycopg; write {POSTGRESQL}://… in place of {dialect}://…"
            raise ValueError(message)
        return url

    @model_validator(mode="after")
    def _require_heartbeats_within_a_liveness(self) -> Self:
        least_s = HEARTBEATS_PER_LIVENESS_MIN * self.heartbeat_s
        if self.liveness_s < least_s:
            message = (
                f"a liveness of {self.liveness_s:g} s at a heartbeat each {self.heartbeat_s:g} s would end work that is "
                f"only late to be heard; set HANSA_LIVENESS_S to {least_s:g} or more, or HANSA_HEARTBEAT_S to less"
            )
            raise ValueError(message)
        return self

    @property
    def resolved_database_url(self) -> str:
        """The database URL in force."""
        return self.database_url or f"sqlite:///{self.home.resolve() / 'market.sqlite3'}"
