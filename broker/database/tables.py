"""The tables. Constraints carry the invariants wherever a database can state them.

Money is micro-credits, times are UTC milliseconds (`_ms`) unless they are readings of the
monotonic clock (`_monotonic_ms`, with the `era` in which they were taken). JSON columns hold
canonical JSON text that pydantic models of `training`, `sites` and `broker.allocation` read.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, Boolean, CheckConstraint, ForeignKey, Index, Integer, String, Text, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# SQLite gives rowid behaviour only to INTEGER PRIMARY KEY.
_SERIAL = BigInteger().with_variant(Integer, "sqlite")


def where(condition: str, on_sqlite: str | None = None) -> dict[str, Any]:
    """Return the arguments of an index over the rows for which a condition holds, as each engine's queries state it: `live = 1`."""
    return {"sqlite_where": text(on_sqlite or condition), "postgresql_where": text(condition)}


class Table(DeclarativeBase):
    """Base of all tables; 64-bit integers and bounded strings by default."""

    type_annotation_map = {int: BigInteger, str: String(64)}  # noqa: RUF012  SQLAlchemy's own form


class Tenant(Table):
    """A customer: owner of jobs and of a ledger account. `home_site` is the site whose own customer it is.

    `budget_micros_per_hour` bounds what its jobs cost together, `floor_gpus` is what it should have at least.
    """

    __tablename__ = "tenants"
    tenant_id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    created_ms: Mapped[int]
    home_site: Mapped[str | None]
    budget_micros_per_hour: Mapped[int | None]
    floor_gpus: Mapped[int | None]


class User(Table):
    """A person who signs in to the portal. `role` is tenant, operator or admin; an operator's site is `site_id`."""

    __tablename__ = "users"
    user_id: Mapped[str] = mapped_column(primary_key=True)
    login: Mapped[str] = mapped_column(String(200), unique=True)
    password_hash: Mapped[str] = mapped_column(String(200))
    role: Mapped[str]
    tenant_id: Mapped[str | None] = mapped_column(ForeignKey("tenants.tenant_id"))
    created_ms: Mapped[int]
    disabled_ms: Mapped[int | None]
    site_id: Mapped[str | None] = mapped_column(ForeignKey("sites.site_id"))


class BrowserSession(Table):
    """A signed-in browser; only the hash of its cookie is kept."""

    __tablename__ = "browser_sessions"
    session_digest: Mapped[str] = mapped_column(primary_key=True)
    user_id: Mapped[str] = mapped_column(ForeignKey("users.user_id"))
    created_ms: Mapped[int]
    expires_ms: Mapped[int]


class Token(Table):
    """An API token; only the hash of its secret is kept. `scopes` is space-separated."""

    __tablename__ = "tokens"
    token_id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    tenant_id: Mapped[str | None] = mapped_column(ForeignKey("tenants.tenant_id"))
    secret_digest: Mapped[str]
    scopes: Mapped[str] = mapped_column(String(400))
    label: Mapped[str] = mapped_column(String(200))
    created_ms: Mapped[int]
    expires_ms: Mapped[int]
    revoked_ms: Mapped[int | None]
    last_used_ms: Mapped[int | None]


class JoinToken(Table):
    """A one-time invitation for one site; only its hash is kept."""

    __tablename__ = "join_tokens"
    token_digest: Mapped[str] = mapped_column(primary_key=True)
    site_id: Mapped[str]
    created_ms: Mapped[int]
    expires_ms: Mapped[int]
    used_ms: Mapped[int | None]


class Site(Table):
    """A datacenter. `state` is live, silent or removed; `version` guards its offer; `boot` tells a restarted agent.

    `sequence_seen` is a bit mask of the request numbers below and at `sequence_max`: the replay window. `probe_terms` is
    what its owner allows probes of its links (`sites.links.messages.ProbeTerms`, JSON), None where it takes no part in any.
    """

    __tablename__ = "sites"
    site_id: Mapped[str] = mapped_column(primary_key=True)
    state: Mapped[str]
    version: Mapped[int] = mapped_column(default=1)
    offer: Mapped[str] = mapped_column(Text)
    boot: Mapped[str | None]
    agent_version: Mapped[str | None]
    sequence_max: Mapped[int] = mapped_column(default=0)
    sequence_seen: Mapped[str] = mapped_column(String(80), default="0")
    heartbeat_sequence: Mapped[int] = mapped_column(default=0)
    joined_ms: Mapped[int]
    heard_ms: Mapped[int | None]
    heard_monotonic_ms: Mapped[int | None]
    heard_era: Mapped[str | None]
    probe_terms: Mapped[str | None] = mapped_column(Text)


class SiteCertificate(Table):
    """A certificate issued to a site; its key (Ed25519, hex) verifies the site's requests."""

    __tablename__ = "site_certificates"
    serial: Mapped[str] = mapped_column(primary_key=True)
    site_id: Mapped[str] = mapped_column(ForeignKey("sites.site_id"))
    public_key: Mapped[str]
    not_after_ms: Mapped[int]
    revoked_ms: Mapped[int | None]


class Pool(Table):
    """One GPU type at one site, as last offered. `pool_id` is SITE/TYPE."""

    __tablename__ = "pools"
    pool_id: Mapped[str] = mapped_column(String(100), primary_key=True)
    site_id: Mapped[str] = mapped_column(ForeignKey("sites.site_id"))
    gpu_type: Mapped[str]
    ask_micros_per_gpu_hour: Mapped[int]
    flops_per_s: Mapped[float | None]
    __table_args__ = (CheckConstraint("ask_micros_per_gpu_hour >= 0", name="ask_not_negative"),)


class Gpu(Table):
    """One GPU. `present` is false once its site stops offering it."""

    __tablename__ = "gpus"
    site_id: Mapped[str] = mapped_column(ForeignKey("sites.site_id"), primary_key=True)
    gpu_id: Mapped[str] = mapped_column(primary_key=True)
    pool_id: Mapped[str] = mapped_column(ForeignKey("pools.pool_id"))
    present: Mapped[bool] = mapped_column(Boolean)
    __table_args__ = (Index("gpus_by_pool", "pool_id", "present"),)


class Link(Table):
    """A directed pair of sites, as offered by the source."""

    __tablename__ = "links"
    source: Mapped[str] = mapped_column(primary_key=True)
    target: Mapped[str] = mapped_column(primary_key=True)
    bandwidth_bits_per_s: Mapped[float]
    delay_s: Mapped[float]
    loss: Mapped[float]
    egress_price_micros_per_gb: Mapped[int]


class Account(Table):
    """A ledger account. Only `world`, where credits come from, may be below nought."""

    __tablename__ = "accounts"
    account_id: Mapped[str] = mapped_column(String(100), primary_key=True)
    kind: Mapped[str]
    owner: Mapped[str | None]
    balance_micros: Mapped[int] = mapped_column(default=0)
    created_ms: Mapped[int]
    __table_args__ = (CheckConstraint("balance_micros >= 0 OR kind = 'world'", name="account_not_overdrawn"),)


class Transfer(Table):
    """A movement from `debit_account` to `credit_account`, never changed or deleted (triggers)."""

    __tablename__ = "transfers"
    transfer_id: Mapped[str] = mapped_column(String(160), primary_key=True)
    kind: Mapped[str]
    debit_account: Mapped[str] = mapped_column(String(100), ForeignKey("accounts.account_id"), index=True)
    credit_account: Mapped[str] = mapped_column(String(100), ForeignKey("accounts.account_id"), index=True)
    amount_micros: Mapped[int]
    job_id: Mapped[str | None] = mapped_column(index=True)
    lease_id: Mapped[str | None]
    memo: Mapped[str] = mapped_column(String(300), default="")
    created_ms: Mapped[int]
    __table_args__ = (
        CheckConstraint("amount_micros > 0", name="transfer_positive"),
        CheckConstraint("debit_account <> credit_account", name="transfer_moves"),
    )


class Hold(Table):
    """A job's budget, set aside at submit. Once closed, every micro is posted or voided."""

    __tablename__ = "holds"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.job_id"), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.tenant_id"))
    amount_micros: Mapped[int]
    posted_micros: Mapped[int] = mapped_column(default=0)
    voided_micros: Mapped[int] = mapped_column(default=0)
    closed_ms: Mapped[int | None]
    __table_args__ = (
        Index("open_holds", "job_id", **where("closed_ms IS NULL")),
        CheckConstraint("posted_micros >= 0 AND voided_micros >= 0", name="hold_signs"),
        CheckConstraint("posted_micros + voided_micros <= amount_micros", name="hold_bound"),
        CheckConstraint(
            "closed_ms IS NULL OR posted_micros + voided_micros = amount_micros", name="hold_closed_is_settled"
        ),
    )


class Job(Table):
    """A job. `version` rises with every change and guards a round's placement of it."""

    __tablename__ = "jobs"
    job_id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.tenant_id"), index=True)
    name: Mapped[str]
    state: Mapped[str] = mapped_column(index=True)
    version: Mapped[int] = mapped_column(default=1)
    spec: Mapped[str] = mapped_column(Text)
    epoch: Mapped[int] = mapped_column(default=0)
    samples_done: Mapped[int] = mapped_column(default=0)
    failures: Mapped[int] = mapped_column(default=0)
    reason_code: Mapped[str] = mapped_column(default="")
    reason: Mapped[str] = mapped_column(String(1000), default="")
    submitted_ms: Mapped[int]
    started_ms: Mapped[int | None]
    ended_ms: Mapped[int | None]


class Placement(Table):
    """A configuration that a job won: in a round, or between rounds at the last one's prices (`lane` instant).

    `award` is its newest term's (`broker.allocation.clearing.Placement`): prices, rents, uplift. `reserved_micros`
    is the most that its terms together can cost, set aside inside the job's hold.
    """

    __tablename__ = "placements"
    placement_id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.job_id"), index=True)
    epoch: Mapped[int]
    round_number: Mapped[int] = mapped_column(ForeignKey("rounds.round_number"))
    state: Mapped[str]
    configuration: Mapped[str] = mapped_column(Text)
    configuration_key: Mapped[str] = mapped_column(String(500))
    award: Mapped[str] = mapped_column(Text)
    why: Mapped[str] = mapped_column(String(1000))
    samples_per_s_predicted: Mapped[float]
    value_micros_per_hour: Mapped[int]
    charge_micros_per_hour: Mapped[int]
    uplift_micros_per_hour: Mapped[int]
    term_s: Mapped[int]
    reserved_micros: Mapped[int]
    charged_micros: Mapped[int] = mapped_column(default=0)
    proposed_ms: Mapped[int]
    proposal_ends_ms: Mapped[int]
    active_ms: Mapped[int | None]
    term_ends_ms: Mapped[int | None]
    ended_ms: Mapped[int | None]
    end_cause: Mapped[str] = mapped_column(default="")
    base_round: Mapped[int] = mapped_column(default=0)
    base_hash: Mapped[str] = mapped_column(default="")
    base_samples: Mapped[int] = mapped_column(default=0)
    lane: Mapped[str] = mapped_column(default="round", server_default="round")
    __table_args__ = (
        Index("one_placement_per_epoch", "job_id", "epoch", unique=True),
        Index("one_live_placement_per_job", "job_id", unique=True, **where("state <> 'ended'")),
        CheckConstraint("charged_micros <= reserved_micros", name="placement_charge_bound"),
    )


class Lease(Table):
    """One site's part of a placement: proposed, confirmed, active, ended.

    `usage_until_ms` is when its last report ended, `egress` what it sent to each site. `pace_*` is what had been delivered when the
    first samples were reported, and the newest, and in how many reports since: the speed of training without its start (`broker.speeds`).
    `heir_of` is the site whose place it took, and whose checkpoint it has.
    `liveness_*` is when the broker may count its processes as dead: later than the agent counts, on the broker's own monotonic clock.
    """

    __tablename__ = "leases"
    lease_id: Mapped[str] = mapped_column(primary_key=True)
    placement_id: Mapped[str] = mapped_column(ForeignKey("placements.placement_id"), index=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.job_id"), index=True)
    epoch: Mapped[int]
    site_id: Mapped[str] = mapped_column(ForeignKey("sites.site_id"), index=True)
    pool_id: Mapped[str] = mapped_column(String(100), ForeignKey("pools.pool_id"))
    gpu_type: Mapped[str]
    gpus: Mapped[int]
    price_micros_per_gpu_hour: Mapped[int]
    state: Mapped[str]
    checkpoint_digest: Mapped[str | None]
    heir_of: Mapped[str | None]
    attempt_key: Mapped[str | None]
    csr_pem: Mapped[str | None] = mapped_column(Text)
    certificate_pem: Mapped[str | None] = mapped_column(Text)
    gateway_address: Mapped[str | None] = mapped_column(String(300))
    liveness_monotonic_ms: Mapped[int | None]
    liveness_era: Mapped[str | None]
    phase: Mapped[str] = mapped_column(default="")
    attempt: Mapped[str] = mapped_column(Text, default="")
    active_ms: Mapped[int | None]
    active_monotonic_ms: Mapped[int | None]
    active_era: Mapped[str | None]
    usage_sequence: Mapped[int] = mapped_column(default=0)
    usage_until_ms: Mapped[int | None]
    delivered_gpu_milliseconds: Mapped[int] = mapped_column(default=0)
    delivered_samples: Mapped[int] = mapped_column(default=0)
    pace_from_gpu_milliseconds: Mapped[int | None]
    pace_from_samples: Mapped[int] = mapped_column(default=0, server_default="0")
    pace_to_gpu_milliseconds: Mapped[int] = mapped_column(default=0, server_default="0")
    pace_reports: Mapped[int] = mapped_column(default=0, server_default="0")
    egress_bytes: Mapped[int] = mapped_column(default=0)
    egress: Mapped[str | None] = mapped_column(Text)
    ended_ms: Mapped[int | None]
    ended_monotonic_ms: Mapped[int | None]
    ended_era: Mapped[str | None]
    end_cause: Mapped[str] = mapped_column(default="")
    __table_args__ = (
        Index("one_lease_per_site_and_placement", "placement_id", "site_id", unique=True),
        Index("standing_leases", "site_id", **where("state <> 'ended'")),
        Index("leases_by_start", "active_ms", **where("delivered_samples > 0")),
    )


class LeasedGpu(Table):
    """Which GPU serves which lease: the row that lets a GPU serve no two."""

    __tablename__ = "leased_gpus"
    lease_id: Mapped[str] = mapped_column(ForeignKey("leases.lease_id"), primary_key=True)
    site_id: Mapped[str] = mapped_column(primary_key=True)
    gpu_id: Mapped[str] = mapped_column(primary_key=True)
    live: Mapped[bool] = mapped_column(Boolean)
    __table_args__ = (Index("one_live_lease_per_gpu", "site_id", "gpu_id", unique=True, **where("live", "live = 1")),)


class UsageReport(Table):
    """What an accepted report of usage came to in one term (`broker.terms`); its key makes a second one impossible.

    At the prices then in force: GPUs + rent + egress - discount - cut = charge, and charge + uplift
    = payout + link revenue + fee. `cut_micros` is what the reservation no longer covered.
    """

    __tablename__ = "usage_reports"
    lease_id: Mapped[str] = mapped_column(ForeignKey("leases.lease_id"), primary_key=True)
    sequence: Mapped[int] = mapped_column(primary_key=True)
    term: Mapped[int] = mapped_column(primary_key=True)
    epoch: Mapped[int]
    gpu_milliseconds: Mapped[int]
    samples: Mapped[int]
    egress: Mapped[str] = mapped_column(Text)
    price_micros_per_gpu_hour: Mapped[int]
    payout_micros_per_gpu_hour: Mapped[int]
    gpu_micros: Mapped[int]
    rent_micros: Mapped[int]
    egress_micros: Mapped[int]
    discount_micros: Mapped[int]
    cut_micros: Mapped[int]
    charge_micros: Mapped[int]
    uplift_micros: Mapped[int]
    payout_micros: Mapped[int]
    link_revenue_micros: Mapped[int]
    fee_micros: Mapped[int]
    received_ms: Mapped[int]
    __table_args__ = (
        CheckConstraint(
            "gpu_micros + rent_micros + egress_micros - discount_micros - cut_micros = charge_micros",
            name="usage_charge_explained",
        ),
        CheckConstraint(
            "charge_micros + uplift_micros = payout_micros + link_revenue_micros + fee_micros",
            name="usage_balanced",
        ),
    )


class ViewChange(Table):
    """A view of a job's round log: promising, then issued. `document` is the signed view."""

    __tablename__ = "views"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.job_id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    epoch: Mapped[int]
    state: Mapped[str]
    sites: Mapped[str] = mapped_column(Text)
    hub: Mapped[str]
    cause: Mapped[str] = mapped_column(String(200))
    document: Mapped[str] = mapped_column(Text, default="")
    created_ms: Mapped[int]
    issued_ms: Mapped[int | None]


class ViewPromise(Table):
    """A site's promise of a view, with its report."""

    __tablename__ = "view_promises"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.job_id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    site_id: Mapped[str] = mapped_column(primary_key=True)
    report: Mapped[str] = mapped_column(Text)


class Round(Table):
    """A committed clearing. Snapshot and clearing are files named by their digests.

    `events_seen` is the newest event when its market was read; `link_prices` are None in rounds from before they were kept.
    """

    __tablename__ = "rounds"
    round_number: Mapped[int] = mapped_column(primary_key=True)
    taken_ms: Mapped[int]
    committed_ms: Mapped[int]
    snapshot_digest: Mapped[str]
    clearing_digest: Mapped[str]
    status: Mapped[str]
    solver: Mapped[str] = mapped_column(String(200))
    solve_s: Mapped[float]
    prices: Mapped[str] = mapped_column(Text)
    link_prices: Mapped[str | None] = mapped_column(Text)
    events_seen: Mapped[int] = mapped_column(default=0, server_default="0")
    certificate: Mapped[str] = mapped_column(Text)
    dropped: Mapped[str] = mapped_column(Text)
    jobs_considered: Mapped[int]
    placements_made: Mapped[int]


class MarketState(Table):
    """One row: what the market remembers. `changes` rises with whatever a round should see, `…_swept_to` with sweeps."""

    __tablename__ = "market_state"
    one: Mapped[int] = mapped_column(primary_key=True)
    changes: Mapped[int] = mapped_column(default=0)
    changes_cleared: Mapped[int] = mapped_column(default=0)
    frozen_ms: Mapped[int | None]
    seed: Mapped[int] = mapped_column(default=0)
    payment_rule: Mapped[str] = mapped_column(default="uniform", server_default="uniform")
    documents_swept_to: Mapped[int] = mapped_column(default=0, server_default="0")
    streams_swept_to: Mapped[int] = mapped_column(default=0, server_default="0")


class Event(Table):
    """Something that happened, in order; every state change has one. `actor` is the person or token that asked for it."""

    __tablename__ = "events"
    event_id: Mapped[int] = mapped_column(_SERIAL, primary_key=True, autoincrement=True)
    kind: Mapped[str]
    tenant_id: Mapped[str | None] = mapped_column(index=True)
    job_id: Mapped[str | None] = mapped_column(index=True)
    site_id: Mapped[str | None] = mapped_column(index=True)
    lease_id: Mapped[str | None]
    round_number: Mapped[int | None]
    before: Mapped[str] = mapped_column(default="")
    after: Mapped[str] = mapped_column(default="")
    detail: Mapped[str] = mapped_column(String(1000), default="")
    created_ms: Mapped[int]
    actor: Mapped[str | None] = mapped_column(String(120))


class Artifact(Table):
    """A file in the content-addressed store. `expires_ms` None keeps it."""

    __tablename__ = "artifacts"
    digest: Mapped[str] = mapped_column(primary_key=True)
    size_bytes: Mapped[int]
    complete: Mapped[bool] = mapped_column(Boolean)
    created_ms: Mapped[int]
    expires_ms: Mapped[int | None]


class JobArtifact(Table):
    """What an artifact is to a job: its workdir, a checkpoint or an output, and who brought it."""

    __tablename__ = "job_artifacts"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.job_id"), primary_key=True)
    kind: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    digest: Mapped[str] = mapped_column(ForeignKey("artifacts.digest"))
    site_id: Mapped[str | None]
    epoch: Mapped[int]
    round_number: Mapped[int]
    chain_hash: Mapped[str | None]
    outer_hash: Mapped[str | None]
    samples_done: Mapped[int]
    created_ms: Mapped[int]
