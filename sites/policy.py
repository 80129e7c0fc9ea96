"""The owner's policy: which proposals a site refuses, judged at the site before anything is paid or runs.

policy.yaml, whole (each line may be left out; then it forbids nothing):

    tenants_allowed: [fugger, welser]     # nobody else
    tenants_refused: [medici]
    workdirs_allowed: [9f86d081…]         # digests of the code and data that a job may bring; there are no other images
    setup_allowed: false                  # no setup commands
    hours: {zone: Europe/Berlin, open: [{days: mon-fri, from: 20:00, to: 07:00}, {days: sat-sun}]}
    local_share: 0.25                     # of each pool, rounded up: never lent
    gpus_max_per_lease: 8
    lease_hours_max: 12                   # then the job's place here is not renewed
    data_stays: true                      # a job whose data's home is this site runs here alone, or …
    data_may_go_to: [bremen]              # … with these sites
    data_sources_allowed: [https://data.example.org/open]   # below these, jobs may have datasets brought; by default nowhere
    peers_refused: [florenz]              # no job of this site's spans these

What a round can know beforehand is also announced in the offer (`announced`): a veto costs a proposal.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, NamedTuple

import structlog
from pydantic import Field, StringConstraints, model_validator

from sites.data_source import source_allowed
from sites.errors import PolicyError
from sites.hours import Hours
from sites.protocol import GPUS_PER_POOL_MAX, RefusalScope
from sites.yaml_file import Section, read_yaml
from training.spec import Digest, JobSpec, SiteId

NAMES_MAX: Final = 10_000
SourcePrefix = Annotated[
    str, StringConstraints(pattern=r"^(https?://[A-Za-z0-9._:\[\]-]+|file://)/[A-Za-z0-9._~/%+,=@-]*$", max_length=2000)
]

_log = structlog.get_logger(__name__)


class Policy(Section):
    """Which leases the owner refuses."""

    tenants_allowed: tuple[str, ...] | None = Field(default=None, max_length=NAMES_MAX)
    tenants_refused: tuple[str, ...] = Field(default=(), max_length=NAMES_MAX)
    workdirs_allowed: tuple[Digest, ...] | None = Field(default=None, max_length=NAMES_MAX)
    setup_allowed: bool = True
    hours: Hours | None = None
    local_share: float = Field(default=0.0, ge=0, le=1)
    gpus_max_per_lease: int = Field(default=GPUS_PER_POOL_MAX, ge=1)
    lease_hours_max: float | None = Field(default=None, gt=0, le=24 * 366)
    data_stays: bool = False
    data_may_go_to: tuple[SiteId, ...] = Field(default=(), max_length=1000)
    data_sources_allowed: tuple[SourcePrefix, ...] = Field(default=(), max_length=100)
    peers_refused: tuple[SiteId, ...] = Field(default=(), max_length=1000)

    @model_validator(mode="after")
    def _sound(self) -> Policy:
        both = sorted(set(self.tenants_allowed or ()) & set(self.tenants_refused))
        if both:
            message = f"{', '.join(both[:5])} cannot be both allowed and refused"
            raise ValueError(message)
        if self.data_may_go_to and not self.data_stays:
            message = "data_may_go_to names exceptions from data_stays: true; write both or neither"
            raise ValueError(message)
        return self

    @property
    def digest(self) -> str:
        """Names this policy among others; the broker asks anew about what was refused once it changes."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def lendable(self, gpus: int) -> int:
        """Return how many of a pool's GPUs may be lent at once."""
        return gpus - math.ceil(gpus * self.local_share - 1e-9)


@dataclass(frozen=True, slots=True)
class Asked:
    """A proposal as the owner judges it; `lent` of the `pool_gpus` serve other leases, `peers` are the gang's other sites.

    `spec`, `peers` and `term_s` are None where the broker does not tell them. `data_held` are the datasets that are here.
    """

    site_id: str
    tenant_id: str
    spec: JobSpec | None
    gpus: int
    pool_gpus: int
    lent: int = 0
    peers: tuple[str, ...] | None = None
    term_s: int | None = None
    data_held: Collection[str] = ()


class Objection(NamedTuple):
    """Why a proposal is refused: a stable code, a sentence, how far it reaches and, where known, until when."""

    code: str
    reason: str
    scope: RefusalScope = RefusalScope.CONFIGURATION
    until_ms: int | None = None


def objections(policy: Policy, asked: Asked, now: dt.datetime) -> list[Objection]:
    """Return everything that a policy has against a proposal, the most general first."""
    found = (
        _tenant(policy, asked),
        _workdir(policy, asked),
        _setup(policy, asked),
        _hours(policy, now),
        _lease_hours(policy, (asked.term_s or 0) / 3600),
        _data(policy, asked),
        _data_source(policy, asked),
        _peers(policy, asked),
        _gpus(policy, asked),
        _local_share(policy, asked),
    )
    return [objection for objection in found if objection is not None]


def renewal_objection(policy: Policy, asked: Asked, lasted_h: float) -> Objection | None:
    """Return what a policy has against another term of a lease that will have lasted so long by the end of this one."""
    found = (
        _tenant(policy, asked),
        _workdir(policy, asked),
        _setup(policy, asked),
        _lease_hours(policy, lasted_h + (asked.term_s or 0) / 3600),
    )
    return next((objection for objection in found if objection is not None), None)


def _tenant(policy: Policy, asked: Asked) -> Objection | None:
    welcome = policy.tenants_allowed is None or asked.tenant_id in policy.tenants_allowed
    if welcome and asked.tenant_id not in policy.tenants_refused:
        return None
    return Objection("policy.tenant", "the owner does not serve this tenant", RefusalScope.SITE)


def _workdir(policy: Policy, asked: Asked) -> Objection | None:
    if policy.workdirs_allowed is None or (
        asked.spec is not None and asked.spec.workdir_digest in policy.workdirs_allowed
    ):
        return None
    return Objection("policy.workdir", "the owner has not allowed this workdir", RefusalScope.SITE)


def _setup(policy: Policy, asked: Asked) -> Objection | None:
    if policy.setup_allowed or asked.spec is None or asked.spec.setup is None:
        return None
    reason = "the owner runs no setup commands; put what is needed into the workdir"
    return Objection("policy.setup", reason, RefusalScope.SITE)


def _hours(policy: Policy, now: dt.datetime) -> Objection | None:
    if policy.hours is None or policy.hours.covers(now):
        return None
    opens = policy.hours.next_opening(now)
    reason = "the owner takes no leases at this time" + (
        "" if opens is None else f"; again at {opens:%Y-%m-%d %H:%M} UTC"
    )
    until_ms = None if opens is None else round(opens.timestamp() * 1000)
    return Objection("policy.hours", reason, RefusalScope.SITE, until_ms)


def _lease_hours(policy: Policy, hours: float) -> Objection | None:
    if policy.lease_hours_max is None or hours <= policy.lease_hours_max:
        return None
    reason = f"the owner lends to one job for at most {policy.lease_hours_max:g} hours on end"
    return Objection("policy.lease_hours", reason, RefusalScope.SITE)


def _data(policy: Policy, asked: Asked) -> Objection | None:
    data = None if asked.spec is None else asked.spec.market.data
    if not policy.data_stays or data is None or data.home_site != asked.site_id:
        return None
    gone = sorted(set(asked.peers or ()) - set(policy.data_may_go_to))
    # An old broker does not tell a gang's sites; a job that may span several is then refused, since nobody knows.
    if asked.peers is None and asked.spec is not None and asked.spec.market.sites_max > 1:
        return Objection("policy.data", "data of this site stays here, and the job may span sites", RefusalScope.GANGS)
    if not gone:
        return None
    return Objection("policy.data", f"data of this site does not go to {', '.join(gone)}", RefusalScope.GANGS)


def _data_source(policy: Policy, asked: Asked) -> Objection | None:
    for reference in () if asked.spec is None else asked.spec.data or ():
        brought = reference.sha256 not in asked.data_held and reference.source is not None
        if brought and not source_allowed(reference.source or "", policy.data_sources_allowed):
            reason = f"the owner does not let the dataset {reference.name} come from there"
            return Objection("policy.data_source", reason, RefusalScope.SITE)
    return None


def _peers(policy: Policy, asked: Asked) -> Objection | None:
    beside = sorted(set(asked.peers or ()) & set(policy.peers_refused))
    if not beside:
        return None
    return Objection("policy.peers", f"the owner runs nothing together with {', '.join(beside)}", RefusalScope.GANGS)


def _gpus(policy: Policy, asked: Asked) -> Objection | None:
    if asked.gpus <= policy.gpus_max_per_lease:
        return None
    return Objection("policy.gpus_max", f"the owner lends at most {policy.gpus_max_per_lease} GPUs to one job")


def _local_share(policy: Policy, asked: Asked) -> Objection | None:
    lendable = policy.lendable(asked.pool_gpus)
    if asked.lent + asked.gpus <= lendable:
        return None
    reason = (
        f"the owner keeps {asked.pool_gpus - lendable} of {asked.pool_gpus} GPUs for local users; {asked.lent} are lent"
    )
    return Objection("policy.local_share", reason)


class PolicyBook:
    """The policy in force: site.yaml's own, or that of a file that is read again when it changes.

    A file that is broken while the agent works leaves the policy in force that stood before, and says so.
    """

    def __init__(self, inline: Policy, path: Path | None) -> None:
        """Read the file, where there is one. Raises PolicyError."""
        self._path = path
        self._policy = inline if path is None else load_policy(path)
        self._stamp = self._look()
        self.fault = ""

    def current(self) -> Policy:
        """Return the policy in force."""
        stamp = self._look()
        if self._path is not None and stamp != self._stamp:
            self._stamp = stamp
            try:
                self._policy, self.fault = load_policy(self._path), ""
                _log.info("policy.changed", path=str(self._path))
            except PolicyError as error:
                self.fault = str(error)
                _log.error("policy.broken", detail=self.fault, in_force="the policy read before")
        return self._policy

    def _look(self) -> tuple[int, int] | None:
        if self._path is None:
            return None
        try:
            found = self._path.stat()
        except OSError:
            return (0, 0)
        return found.st_mtime_ns, found.st_size


def load_policy(path: Path) -> Policy:
    """Return the policy in the file at `path`. Raises PolicyError, which lists every fault with its line."""
    return read_yaml(path, Policy, PolicyError)
