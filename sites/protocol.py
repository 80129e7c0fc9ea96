"""The wire contract between a site's agent and the broker.

Agents dial out only. Every request but `enrol` is signed with the key of the site's certificate
(`SignedRequest`); one heartbeat carries everything the site has to say and its answer everything
the broker wants of it. Both sides are level-triggered: a heartbeat states what *is*, an answer
states what *should be*, so a lost, doubled or late message changes nothing but the delay.

Routes (all below `/site/v1`):
    POST /enrol                              Enrolment          -> EnrolmentAnswer
    POST /heartbeat                          Heartbeat          -> HeartbeatAnswer
    GET  /statement?days=                                       -> SiteStatement
    GET  /artifacts/DIGEST                   Range              -> bytes
    PUT  /artifacts/DIGEST?offset=&size=     bytes              -> ArtifactState
    POST /leases/LEASE/EPOCH/streams/NAME?offset=  bytes        -> StreamState (NAME: log, metrics)
    POST /leases/LEASE/EPOCH/secrets         SecretsRequest     -> SecretsAnswer
"""

from __future__ import annotations

import enum
import hashlib
import itertools
from typing import Annotated, Final, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from sites.links.messages import PROBES_PER_SITE_MAX, ProbeOrder, ProbeReply, ProbeReport, ProbeTerms
from training.attempt import NewestCheckpoint
from training.exchange import Leaving
from training.roundlog.signing import SignedDocument
from training.roundlog.view import Address, Hash, ViewReport
from training.spec import Digest, JobSpec, SiteId, SyncPlan

PROTOCOL_VERSION: Final = 1
ROUTE_PREFIX: Final = "/site/v1"

POOLS_PER_SITE_MAX: Final = 64
ASK_STEPS_MAX: Final = 16
RESERVATIONS_MAX: Final = 64
GPUS_PER_POOL_MAX: Final = 65_536
DATASETS_PER_SITE_MAX: Final = 1000
LEASES_PER_SITE_MAX: Final = 10_000
RATE_MICROS_MAX: Final = 2**45  # an ask or a price, per hour or per GB
HEARTBEAT_BYTES_MAX: Final = 8_000_000
STREAM_CHUNK_BYTES_MAX: Final = 1_000_000
ARTIFACT_CHUNK_BYTES_MAX: Final = 4_000_000

# A request older or newer than this on the broker's clock is refused: the signature's sequence
# number stops replays, the window bounds how many numbers must be remembered.
REQUEST_AGE_MS_MAX: Final = 15 * 60 * 1000
SEQUENCE_WINDOW: Final = 256

CERTIFICATE_HEADER: Final = "Hansa-Certificate"
SEQUENCE_HEADER: Final = "Hansa-Sequence"
TIME_HEADER: Final = "Hansa-Time-Ms"
SIGNATURE_HEADER: Final = "Hansa-Signature"

Pem = Annotated[str, StringConstraints(max_length=8192)]
LeaseId = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,64}$")]
GpuId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9:._-]{1,64}$")]
# Beside the longest name of a site and a stroke it still fits a name of 200 characters at the broker.
OUTPUT_NAME_LENGTH_MAX: Final = 160
OutputName = Annotated[str, StringConstraints(min_length=1, max_length=OUTPUT_NAME_LENGTH_MAX)]
Sentence = Annotated[str, StringConstraints(max_length=1000)]
Micros = Annotated[int, Field(ge=0, le=10**15)]
# An offer beyond these would make a whole round's snapshot invalid, so it is refused at the door.
Rate = Annotated[int, Field(ge=0, le=RATE_MICROS_MAX)]
UtcMs = Annotated[int, Field(ge=0, le=2**53)]
PlaceName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
FlopsPerSecond = Annotated[float, Field(ge=1, le=1e18)]
BitsPerSecond = Annotated[float, Field(ge=1, le=1e15)]


class Message(BaseModel):
    """A part of the protocol: unknown fields are refused, so that a misspelling is found."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Enrolment(Message):
    """The first request of a new site, authorised by its one-time join token."""

    protocol_version: int = PROTOCOL_VERSION
    site_id: SiteId
    join_token: str = Field(max_length=200)
    csr_pem: Pem


class EnrolmentAnswer(Message):
    """The site's identity. `authority_key` is the key that signs views (Ed25519, hex)."""

    certificate_pem: Pem
    ca_pem: Pem
    authority_key: Hash
    heartbeat_s: float


class AskStepOffer(Message):
    """Some of a pool's GPUs that cost more than those before them."""

    gpus: int = Field(ge=1, le=GPUS_PER_POOL_MAX)
    ask_micros_per_gpu_hour: Rate


class ReservedOffer(Message):
    """GPUs that are not for sale for a time: maintenance, or the owner's own use."""

    from_ms: UtcMs
    to_ms: UtcMs
    gpus: int = Field(ge=1, le=GPUS_PER_POOL_MAX)

    @model_validator(mode="after")
    def _forwards(self) -> Self:
        if self.to_ms <= self.from_ms:
            message = "a reservation must end after it begins"
            raise ValueError(message)
        return self


class PoolOffer(Message):
    """One GPU type at this site. `flops_per_s` is measured per GPU, None where it was not.

    The last GPUs cost what `ask_steps` say, in rising order, the others the flat ask. One job gets at most
    `job_gpus_max` of them.
    """

    gpu_type: str
    gpu_ids: tuple[GpuId, ...] = Field(max_length=GPUS_PER_POOL_MAX)
    ask_micros_per_gpu_hour: Rate
    flops_per_s: FlopsPerSecond | None = None
    ask_steps: tuple[AskStepOffer, ...] = Field(default=(), max_length=ASK_STEPS_MAX)
    job_gpus_max: int | None = Field(default=None, ge=1, le=GPUS_PER_POOL_MAX)
    reserved: tuple[ReservedOffer, ...] = Field(default=(), max_length=RESERVATIONS_MAX)

    @model_validator(mode="after")
    def _rises(self) -> Self:
        asks = [self.ask_micros_per_gpu_hour, *(step.ask_micros_per_gpu_hour for step in self.ask_steps)]
        if any(later <= earlier for earlier, later in itertools.pairwise(asks)):
            message = "each step of an ask curve must cost more than the one before"
            raise ValueError(message)
        return self


class LinkOffer(Message):
    """The directed link from this site to `target`, and what the site asks for egress on it."""

    target: SiteId
    bandwidth_bits_per_s: BitsPerSecond
    delay_s: float = Field(ge=0, le=60)
    loss: float = Field(default=0.0, ge=0, lt=1)
    egress_price_micros_per_gb: Rate = 0


class Offer(Message):
    """What a site sells. `listens` says that other sites' gateways may connect to this one.

    `draining`: nothing new from now on; `drains_at_ms`: nothing from then on, announced so that prices and terms can
    follow. `region` and `continent` are the site's, for data that may not leave them; the egress prices are
    for data whose home is here, per GB.
    """

    pools: tuple[PoolOffer, ...] = Field(max_length=POOLS_PER_SITE_MAX)
    links: tuple[LinkOffer, ...] = Field(default=(), max_length=1000)
    listens: bool = False
    draining: bool = False
    drains_at_ms: UtcMs | None = None
    region: PlaceName | None = None
    continent: PlaceName | None = None
    data_egress_to_region: Rate = 0
    data_egress_to_continent: Rate = 0
    data_egress_beyond: Rate = 0
    environment: dict[str, str] = Field(default_factory=dict, max_length=50, description="what the site runs, by name")
    mismatch: Sentence = Field(default="", description="where what is promised is not what the host was found to have")
    policy_digest: Digest | None = Field(
        default=None, description="names the owner's policy: when it changes, what was refused is asked again"
    )


class Confirmation(Message):
    """The site accepts a proposed lease. The key and the request for its certificate are the attempt's."""

    lease_id: LeaseId
    epoch: int = Field(ge=1)
    attempt_key: Hash
    csr_pem: Pem
    gateway_address: Address | None


class RefusalScope(enum.StrEnum):
    """How far a refusal reaches: what of the same kind would be refused too."""

    CONFIGURATION = "configuration"  # this one: so many GPUs here, beside these sites
    GANGS = "gangs"  # the job beside any other site
    SITE = "site"  # the job here at all


class Veto(Message):
    """The site refuses a proposed lease by its own policy; the whole gang is void.

    Of an active lease it refuses the renewal: the term runs on to its end. `until_ms` says from when on the site
    may be asked again; without it the broker waits as long as it is set to.
    """

    lease_id: LeaseId
    epoch: int = Field(ge=1)
    code: str = Field(max_length=64)
    reason: Sentence
    scope: RefusalScope = RefusalScope.CONFIGURATION
    until_ms: UtcMs | None = None


class AttemptPhase(enum.StrEnum):
    """Where an attempt stands at its site. `exited` is final; its processes are dead."""

    PREPARING = "preparing"
    SETUP = "setup"
    RUNNING = "running"
    STOPPING = "stopping"
    EXITED = "exited"


class ExitCause(enum.StrEnum):
    """Why an attempt is over: the broker's next step depends on it."""

    DONE = "done"  # the script ended by itself with exit code 0
    SCRIPT = "script"  # the script failed: the tenant's affair
    SETUP = "setup"  # its setup failed: the tenant's affair
    BUNDLE = "bundle"  # its workdir cannot be unpacked: the tenant's affair
    INPUT = "input"  # a secret or a dataset that it names cannot be had: the tenant's affair
    LIMIT = "limit"  # it broke a resource limit: the tenant's affair
    EXCHANGE = "exchange"  # the round log was lost for longer than its patience: try again
    ORDERED = "ordered"  # the broker or the owner ended the lease
    LEFT = "left"  # it stopped at the end of a round, as the broker asked, and its checkpoint is stored
    EXPIRED = "expired"  # the liveness ran out: the site fenced itself
    SITE = "site"  # something of the site's own broke: try elsewhere


class GatewayReport(Message):
    """What the attempt's gateway says of the round log."""

    view_number: int = Field(ge=0)
    sealed_round: int = Field(ge=0)
    chain_hash: Hash
    applied_round: int = Field(ge=0)
    outer_hash: Hash | None
    samples_done: int = Field(ge=0)
    samples_by_site: dict[SiteId, int] = Field(default_factory=dict, max_length=64)
    hub_lost_s: float | None = Field(default=None, ge=0)
    members_lost_s: dict[SiteId, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict, max_length=64, description="at the hub: members that have not been heard for so long"
    )
    waiting_for: tuple[SiteId, ...] = Field(default=(), max_length=64)


class AttemptReport(Message):
    """The state of one attempt, repeated in every heartbeat until its lease is gone."""

    lease_id: LeaseId
    epoch: int = Field(ge=1)
    phase: AttemptPhase
    cause: ExitCause | None = None
    exit_code: int | None = None
    detail: Sentence = ""
    gateway: GatewayReport | None = None
    promise: ViewReport | None = None
    checkpoint: NewestCheckpoint | None = Field(default=None, description="stored at the broker already")
    outputs: dict[OutputName, Digest] = Field(
        default_factory=dict, max_length=100, description="stored at the broker already"
    )


class Usage(Message):
    """What was delivered under a lease since the report before it.

    Numbered from one without gaps: a number that the broker has seen is acknowledged and ignored.
    Its GPUs ran without a pause until `ended_ms`, which is read from the same clock as the heartbeat's
    `sent_ms`, so that the broker can tell its age whatever that clock says; None is when it was sent.
    """

    lease_id: LeaseId
    epoch: int = Field(ge=1)
    sequence: int = Field(ge=1)
    gpu_milliseconds: int = Field(ge=0, le=10**15)
    samples: int = Field(ge=0, le=10**15)
    ended_ms: int | None = Field(default=None, ge=0)
    egress_bytes: dict[SiteId, Annotated[int, Field(ge=0, le=10**18)]] = Field(default_factory=dict, max_length=64)


class Skill(enum.StrEnum):
    """What an agent understands beyond the first protocol: a broker sends an agent nothing that it would refuse."""

    GANG = "gang"  # LeaseOrder.peers and term_s
    DATA = "data"  # JobSpec.data and Heartbeat.data
    PROBE = "probe"  # HeartbeatAnswer.probes; an owner who wants none leaves it out
    LEAVE = "leave"  # AttemptOrder.leaving, CheckpointReference.heir_of
    SECRETS = "secrets"  # JobSpec.secrets; said only by a site that confines strangers' code on its own host


class SiteData(Message):
    """The site's part in datasets: what it holds, by the manifest's digest, and what it could bring.

    It would fetch from addresses below `sources` alone, at about `fetch_bits_per_s`.
    """

    held: dict[Digest, Annotated[int, Field(ge=0, le=10**18)]] = Field(
        default_factory=dict, max_length=DATASETS_PER_SITE_MAX, description="bytes by digest"
    )
    cache_bytes: int = Field(ge=0, le=10**18, description="the most that is kept of what was brought for jobs")
    fetch_bits_per_s: BitsPerSecond
    sources: tuple[Annotated[str, StringConstraints(max_length=2000)], ...] = Field(default=(), max_length=100)


class Wish(Message):
    """What the site's operator asked for in the portal: the agent takes what its own settings allow.

    Asks are by GPU type; no ask for a type, and None for `draining`, leave it as the site's settings have it.
    """

    number: int = Field(ge=1)
    asks_micros_per_gpu_hour: dict[str, Rate] = Field(default_factory=dict, max_length=POOLS_PER_SITE_MAX)
    draining: bool | None = None


class WishReply(Message):
    """What became of a wish at the site. `refused` is empty where all of it was taken."""

    number: int = Field(ge=1)
    refused: Sentence = ""


class Heartbeat(Message):
    """All that a site has to say. `boot` changes when the agent starts anew."""

    protocol_version: int = PROTOCOL_VERSION
    agent_version: str = Field(max_length=40)
    boot: str = Field(max_length=64)
    sent_ms: int | None = Field(default=None, ge=0, description="the site's own clock, for the age of its reports")
    offer: Offer
    skills: tuple[str, ...] = Field(default=(), max_length=32, description="see Skill; unknown ones are ignored")
    confirmations: tuple[Confirmation, ...] = Field(default=(), max_length=LEASES_PER_SITE_MAX)
    vetoes: tuple[Veto, ...] = Field(default=(), max_length=LEASES_PER_SITE_MAX)
    attempts: tuple[AttemptReport, ...] = Field(default=(), max_length=LEASES_PER_SITE_MAX)
    usage: tuple[Usage, ...] = Field(default=(), max_length=LEASES_PER_SITE_MAX)
    renewal_csr_pem: Pem | None = Field(
        default=None, description="sent when two thirds of the certificate's life are over"
    )
    takes_wishes: bool = Field(
        default=False, description="the owner's settings allow some wishes; without it the answer holds none"
    )
    wish_reply: WishReply | None = None
    probe_terms: ProbeTerms = ProbeTerms()
    probe_replies: tuple[ProbeReply, ...] = Field(default=(), max_length=PROBES_PER_SITE_MAX)
    probe_reports: tuple[ProbeReport, ...] = Field(default=(), max_length=PROBES_PER_SITE_MAX)
    data: SiteData | None = Field(default=None, description="none from a site that takes no part in datasets")


class LeasePhase(enum.StrEnum):
    """What the broker wants of a lease. One that is missing from an answer is ended."""

    PROPOSED = "proposed"
    ACTIVE = "active"
    ENDED = "ended"


class CheckpointReference(Message):
    """A checkpoint in the broker's artifact store, from which an attempt resumes.

    `heir_of` names the site that wrote it where this one takes its place: what that site still owed is its own.
    """

    digest: Digest
    size_bytes: int = Field(ge=0)
    round_number: int = Field(ge=0)
    heir_of: SiteId | None = None


class AttemptOrder(Message):
    """What to run under an active lease.

    `view` is the newest issued view; `promise` asks the gateway to promise that number; `leaving` asks the ranks to stop
    at the end of a round, with a checkpoint of it: of this site alone, or all sites after the same round.
    """

    spec: JobSpec
    sync: SyncPlan = Field(description="resolved: never auto")
    seed: int = Field(ge=0)
    weight_max: int = Field(ge=1)
    certificate_pem: Pem
    checkpoint: CheckpointReference | None = None
    view: SignedDocument | None = None
    promise: int | None = Field(default=None, ge=1)
    leaving: Leaving | None = None


class LeaseOrder(Message):
    """A lease as the broker wants it. `liveness_s` counts from when the heartbeat was *sent*."""

    lease_id: LeaseId
    job_id: LeaseId
    tenant_id: str
    epoch: int = Field(ge=1)
    phase: LeasePhase
    gpu_type: str
    gpu_ids: tuple[GpuId, ...]
    price_micros_per_gpu_hour: Micros
    term_ends_ms: int
    liveness_s: float = Field(gt=0)
    spec: JobSpec | None = Field(default=None, description="with a proposal, for the owner's policy")
    peers: tuple[SiteId, ...] | None = Field(default=None, max_length=64, description="the gang's other sites")
    term_s: int | None = Field(default=None, ge=1, description="how long a term is")
    attempt: AttemptOrder | None = None


class Refusal(Message):
    """One item of a heartbeat that the broker did not accept; the others were."""

    lease_id: LeaseId
    code: str = Field(max_length=64)
    detail: Sentence


class HeartbeatAnswer(Message):
    """All that the broker wants of a site."""

    leases: tuple[LeaseOrder, ...]
    refusals: tuple[Refusal, ...] = ()
    usage_acknowledged: dict[LeaseId, int] = Field(description="the highest number without a gap")
    certificate_pem: Pem | None = None
    heartbeat_s: float = Field(gt=0)
    wake_url: str | None = Field(default=None, max_length=2000, description="a stream that says when to look")
    wish: Wish | None = Field(default=None, description="only for a site that takes wishes, which older agents do not")
    probes: tuple[ProbeOrder, ...] | None = Field(
        default=None, max_length=PROBES_PER_SITE_MAX, description="only for a site that can be probed (Skill.PROBE)"
    )


class SiteStatement(Message):
    """What a site earned and its own customers spent in a period, and what sharing was worth.

    `worth_…` are of the site's GPUs and its customers' jobs together, over the `rounds_known` that cover `covered_ms` of it:
    what they had in the federation, and what they would have had in a market of their own.
    """

    site_id: SiteId
    since_ms: int
    until_ms: int
    leases: int
    gpu_milliseconds: int
    payout_micros: int
    link_revenue_micros: int
    refunded_micros: int
    spent_by_customers_micros: int
    balance_micros: int
    rounds_known: int
    covered_ms: int
    worth_federated_micros: int
    worth_alone_micros: int


class SecretsRequest(Message):
    """A site asks for the secrets of a lease that it is about to start; the answer is for `public_key` alone."""

    public_key: Hash = Field(description="X25519, hex; made for this one request")


class SecretsAnswer(Message):
    """The values by name, as JSON in a box that `sites.secret_box` opens."""

    box: str = Field(max_length=2_000_000, description="hex")


class ArtifactState(Message):
    """How much of an artifact the broker holds."""

    digest: Digest
    size_bytes: int
    held_bytes: int
    complete: bool


class StreamState(Message):
    """How much of a log or of the measurements the broker holds; `full` once the cap is reached."""

    held_bytes: int
    full: bool


def request_bytes(method: str, path: str, body: bytes, *, sequence: int, time_ms: int) -> bytes:
    """Return the bytes that a site signs for one request. `path` includes the query."""
    digest = hashlib.sha256(body).hexdigest()
    return f"hansa/site-request\0{method}\n{path}\n{digest}\n{sequence}\n{time_ms}".encode()
