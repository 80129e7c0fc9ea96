"""What a site does about the leases in an answer: a pure decision, repeated with every heartbeat.

The answer states what should be, the journal what is; `decide` lists what to do. Nothing is
remembered between two calls, so a lost or doubled answer changes nothing but the delay. Three
rules keep a GPU from serving two:

- a lease starts only when the answer says `active`, this site confirmed it and holds its key;
- it starts only when no process of the job's former attempt, nor of any attempt on its GPUs, lives;
- an epoch older than one that was ever seen of the job does not start again.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sites.journal import AttemptKey, AttemptRecord
from sites.policy import Asked, Objection, Policy, objections, renewal_objection
from sites.protocol import ExitCause, LeaseOrder, LeasePhase, RefusalScope, SiteData, Veto
from training.exchange import Leaving
from training.roundlog.signing import SignedDocument
from training.spec import JobSpec


@dataclass(frozen=True, slots=True)
class Confirm:
    """Make a key and accept the proposal."""

    order: LeaseOrder


@dataclass(frozen=True, slots=True)
class Refuse:
    """Veto the proposal."""

    order: LeaseOrder
    objection: Objection


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Forget the answer to a proposal that is gone, and its key."""

    key: AttemptKey


@dataclass(frozen=True, slots=True)
class Start:
    """Begin the attempt."""

    order: LeaseOrder


@dataclass(frozen=True, slots=True)
class Disown:
    """Report a lease as exited that has no processes here and will have none."""

    order: LeaseOrder
    cause: ExitCause
    detail: str


@dataclass(frozen=True, slots=True)
class Renew:
    """Let the attempt live for `liveness_s` from when the heartbeat was sent."""

    key: AttemptKey
    liveness_s: float


@dataclass(frozen=True, slots=True)
class Steer:
    """Hand the attempt's gateway the newest view and certificate, ask for a promise, or that the ranks stop."""

    key: AttemptKey
    view: SignedDocument | None
    promise: int | None
    certificate_pem: str
    leaving: Leaving | None = None


@dataclass(frozen=True, slots=True)
class Stop:
    """End the attempt's ranks."""

    key: AttemptKey
    cause: ExitCause


@dataclass(frozen=True, slots=True)
class Release:
    """The broker has done with the lease: the gateway may end, and when all is reported, be forgotten."""

    key: AttemptKey
    gone: bool


Action = Confirm | Refuse | Withdraw | Start | Disown | Renew | Steer | Stop | Release


@dataclass(frozen=True, slots=True)
class House:
    """What the operator sells and under which rules; asks in micro-credits per GPU-hour.

    `asks` are the lowest that a proposal may have been made at: those told to the broker when it was made.
    `gpus_per_node` is the most that one job gets where its ranks must stay on one host of several.
    """

    gpu_ids: Mapping[str, frozenset[str]]
    asks: Mapping[str, int]
    policy: Policy
    draining: bool
    gpus_per_node: int | None = None
    site_id: str = ""
    now_ms: int = 0
    keeps_secrets: bool = False
    data: SiteData | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """What is, according to the journal."""

    attempts: Mapping[AttemptKey, AttemptRecord]
    confirmed: frozenset[AttemptKey]
    vetoed: frozenset[AttemptKey]
    epochs: Mapping[str, int]


def decide(orders: Sequence[LeaseOrder], standing: Standing, house: House) -> list[Action]:
    """Return what to do, stops first."""
    wanted = {(order.lease_id, order.epoch): order for order in orders}
    epochs = _highest_epochs(orders, standing.epochs)
    actions: list[Action] = []
    for key, record in sorted(standing.attempts.items()):
        actions += _about_attempt(record, wanted.get(key), orders)
    lent = _lent(wanted, standing)
    busy = [record for record in standing.attempts.values() if not record.is_over]
    for key, order in sorted(wanted.items()):
        if key in standing.attempts:
            continue
        if order.phase is LeasePhase.PROPOSED:
            said = _about_proposal(order, standing, house, epochs, lent.get(order.gpu_type, 0))
            if any(isinstance(action, Confirm) for action in said):
                lent[order.gpu_type] = lent.get(order.gpu_type, 0) + len(order.gpu_ids)
            actions += said
        elif order.phase is LeasePhase.ENDED:
            actions.append(Disown(order, ExitCause.ORDERED, "the lease ended before anything was started here"))
        elif order.epoch < epochs[order.job_id]:
            actions.append(Disown(order, ExitCause.ORDERED, f"epoch {epochs[order.job_id]} of this job was seen here"))
        elif key not in standing.confirmed or order.attempt is None:
            actions.append(Disown(order, ExitCause.SITE, "this site holds no key for the lease; its journal is new"))
        elif not any(_in_the_way(record, order) for record in busy):
            actions.append(Start(order))
    actions += [
        Withdraw(key)
        for key in sorted(standing.confirmed | standing.vetoed)
        if key not in wanted or wanted[key].phase is LeasePhase.ENDED
    ]
    return actions


def complaint(order: LeaseOrder, house: House, lent: int = 0) -> Objection | None:
    """Return why the owner refuses a proposal, None if it is welcome; `lent` GPUs of its pool serve other leases."""
    gpus = house.gpu_ids.get(order.gpu_type, frozenset())
    unknown = sorted(set(order.gpu_ids) - gpus) or ([] if order.gpu_ids else ["(none)"])
    if unknown:
        return Objection("gpu.unknown", f"this site has no {order.gpu_type} named {', '.join(unknown[:5])}")
    if house.draining:
        return Objection("policy.draining", "this site is draining and takes nothing new")
    asked = Asked(
        site_id=house.site_id,
        tenant_id=order.tenant_id,
        spec=order.spec,
        gpus=len(order.gpu_ids),
        pool_gpus=len(gpus),
        lent=lent,
        peers=order.peers,
        term_s=order.term_s,
        data_held=() if house.data is None else house.data.held,
    )
    refused = objections(house.policy, asked, _moment(house.now_ms))
    if refused:
        return refused[0]
    beyond = _beyond_this_site(order, house)
    if beyond is not None:
        return beyond
    if order.price_micros_per_gpu_hour < house.asks.get(order.gpu_type, 0):
        return Objection("price.below_ask", "the price is below this site's ask")
    return None


def _beyond_this_site(order: LeaseOrder, house: House) -> Objection | None:
    """Return what this site cannot do for the job, whatever its owner's policy says."""
    if house.gpus_per_node is not None and len(order.gpu_ids) > house.gpus_per_node:
        return Objection(
            "policy.gpus_per_node",
            f"this site's jobs stay on one node of {house.gpus_per_node} GPUs: its cluster's network is not trusted to them",
        )
    if order.spec is not None and order.spec.secrets and not house.keeps_secrets:
        return Objection(
            "secrets.no_private_place", "this site has no private place for a job's secrets", RefusalScope.SITE
        )
    return None if order.spec is None else _beyond_its_data(order.spec, house.data)


def _beyond_its_data(spec: JobSpec, here: SiteData | None) -> Objection | None:
    """Return which dataset of the job cannot be had here."""
    for reference in spec.data or ():
        if here is not None and reference.sha256 in here.held:
            continue
        if here is None or reference.source is None or not reference.egress_ok:
            return Objection("data.missing", f"this site does not hold the dataset {reference.name}", RefusalScope.SITE)
        if reference.size_gb * 1e9 > here.cache_bytes:
            reason = f"the dataset {reference.name} may be larger than all that this site keeps for jobs"
            return Objection("data.too_large", reason, RefusalScope.SITE)
    return None


def refused_renewals(orders: Sequence[LeaseOrder], standing: Standing, house: House) -> list[Veto]:
    """Return the active leases that get no further term here: their job has been here too long, or is no longer welcome."""
    found = []
    for order in orders:
        record = standing.attempts.get((order.lease_id, order.epoch))
        if order.phase is not LeasePhase.ACTIVE or record is None or record.is_over or not record.began_ms:
            continue
        asked = Asked(
            site_id=house.site_id,
            tenant_id=order.tenant_id,
            spec=None if order.attempt is None else order.attempt.spec,
            gpus=len(order.gpu_ids),
            pool_gpus=len(order.gpu_ids),
            term_s=order.term_s,
        )
        lasted_h = max(0, order.term_ends_ms - record.began_ms) / 3_600_000
        against = renewal_objection(house.policy, asked, lasted_h)
        if against is not None:
            found.append(veto(order, against))
    return found


def veto(order: LeaseOrder, objection: Objection) -> Veto:
    """Return a refusal as the broker hears it."""
    return Veto(lease_id=order.lease_id, epoch=order.epoch, **objection._asdict())


def _moment(now_ms: int) -> dt.datetime:
    return dt.datetime.fromtimestamp(now_ms / 1000, dt.UTC)


def _about_proposal(
    order: LeaseOrder, standing: Standing, house: House, epochs: Mapping[str, int], lent: int
) -> list[Action]:
    key = (order.lease_id, order.epoch)
    if key in standing.confirmed or key in standing.vetoed:
        return []  # said already; it is repeated in every heartbeat
    if order.epoch < epochs[order.job_id]:
        return [
            Refuse(order, Objection("epoch.old", f"epoch {epochs[order.job_id]} of this job was seen here already"))
        ]
    against = complaint(order, house, lent)
    return [Confirm(order)] if against is None else [Refuse(order, against)]


def _lent(wanted: Mapping[AttemptKey, LeaseOrder], standing: Standing) -> dict[str, int]:
    """Count the GPUs by type that serve leases here, or are promised to them."""
    held = {
        (record.gpu_type, gpu) for record in standing.attempts.values() if not record.is_over for gpu in record.gpu_ids
    }
    for key in standing.confirmed & wanted.keys():
        held |= {(wanted[key].gpu_type, gpu) for gpu in wanted[key].gpu_ids}
    return Counter(gpu_type for gpu_type, _ in held)


def _about_attempt(record: AttemptRecord, order: LeaseOrder | None, orders: Sequence[LeaseOrder]) -> list[Action]:
    superseded = any(
        other.job_id == record.job_id and other.phase is LeasePhase.ACTIVE and other.epoch > record.epoch
        for other in orders
    )
    if order is None or order.phase is LeasePhase.ENDED or superseded:
        stop = [] if record.is_over else [Stop(record.key, ExitCause.ORDERED)]
        return [*stop, Release(record.key, gone=order is None)]
    if order.phase is not LeasePhase.ACTIVE or order.attempt is None:
        return []
    attempt = order.attempt
    return [
        Renew(record.key, order.liveness_s),
        Steer(record.key, attempt.view, attempt.promise, attempt.certificate_pem, attempt.leaving),
    ]


def _in_the_way(record: AttemptRecord, order: LeaseOrder) -> bool:
    same_gpus = record.gpu_type == order.gpu_type and not set(record.gpu_ids).isdisjoint(order.gpu_ids)
    return same_gpus or record.job_id == order.job_id


def _highest_epochs(orders: Sequence[LeaseOrder], known: Mapping[str, int]) -> dict[str, int]:
    highest = dict(known)
    for order in orders:
        if order.phase is not LeasePhase.ENDED:
            highest[order.job_id] = max(order.epoch, highest.get(order.job_id, 0))
    return {**{order.job_id: 0 for order in orders}, **highest}
