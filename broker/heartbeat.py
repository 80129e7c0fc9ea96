"""A site speaks: everything that one heartbeat says, taken in one transaction, and the answer.

Each item stands for itself: one that is refused (an old epoch, say) is named in the answer and
the others are taken. What the site should do next follows from the state after the heartbeat.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog
from sqlalchemy import select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from broker.abilities import take_abilities
from broker.attempts import order_for, take_report
from broker.database.engine import refuses_the_values
from broker.database.standing import LEASE_STANDS
from broker.database.tables import Lease, LeasedGpu, Site, SiteCertificate
from broker.errors import BrokerError, ConflictError, CredentialError, NotFoundError, RefusedError, StaleEpochError
from broker.leases import confirm, renew_certificate, renew_liveness, veto
from broker.links.probes import orders_for, take_word
from broker.market import Market
from broker.metering import accept_usage
from broker.offers import apply_offer
from broker.tickets import stream_url
from broker.transitions import (
    LeaseState,
    SiteState,
    change_state,
    is_round_due,
    note_change,
    record_event,
)
from broker.wishes import standing_wish
from sites.protocol import AttemptReport, Confirmation, Heartbeat, HeartbeatAnswer, Refusal, Usage, Veto

BeforeEffect = Callable[[Session], None]
_log = structlog.get_logger(__name__)
Item = Confirmation | Veto | Usage | AttemptReport


class OvertakenError(ConflictError):
    """A heartbeat that arrived after a later one of the same site; what it says is out of date."""

    code = "heartbeat.overtaken"


class UnstorableError(RefusedError):
    """An item that breaks a bound or a constraint of the database: others of the heartbeat are taken."""

    code = "item.unstorable"


def receive(
    market: Market,
    site_id: str,
    heartbeat: Heartbeat,
    *,
    sequence: int,
    before_effect: BeforeEffect | None = None,
) -> HeartbeatAnswer:
    """Take a heartbeat of `site_id` and return what the broker wants of it.

    `sequence` is the request's number: a heartbeat that a later one has overtaken on the way is
    refused. `before_effect` runs first in the same transaction: the API spends the number there,
    so that a replayed request has no effect. Raises CredentialError for a removed site,
    OvertakenError, and OfferError for an offer that makes no sense.
    """

    def work(session: Session) -> tuple[HeartbeatAnswer, set[str], set[str], bool]:
        if before_effect is not None:
            before_effect(session)
        site = _heard(session, market, site_id, heartbeat, sequence)
        apply_offer(session, site, heartbeat.offer)
        take_abilities(session, site, heartbeat)
        taken = _Taken(session, market, site_id)
        taken.renew_livenesses()
        for confirmation in heartbeat.confirmations:
            taken.confirmation(confirmation)
        for refusal in heartbeat.vetoes:
            taken.veto(refusal)
        # Usage before reports: a report that ends a lease follows its last usage.
        for usage in heartbeat.usage:
            taken.usage(usage, heartbeat.sent_ms)
        for report in heartbeat.attempts:
            taken.report(report)
        taken.wake.update(take_word(session, market, site, heartbeat))
        session.flush()
        answer = HeartbeatAnswer(
            leases=tuple(
                order_for(session, market, lease, heartbeat.skills) for lease in _standing_leases(session, site_id)
            ),
            refusals=tuple(taken.refusals),
            usage_acknowledged=taken.acknowledged,
            certificate_pem=_renewed_certificate(session, market, site_id, heartbeat.renewal_csr_pem),
            heartbeat_s=market.settings.heartbeat_s,
            wake_url=stream_url(market, "site", site_id),
            wish=standing_wish(session, site_id, heartbeat),
            probes=orders_for(session, market, heartbeat, site_id),
        )
        return answer, taken.wake - {site_id}, taken.jobs, is_round_due(session)

    answer, wake, jobs, ring = market.database.write("heartbeat", work)
    for other in sorted(wake):
        market.doorbell.wake_site(other)
    for job_id in sorted(jobs):
        market.doorbell.wake_watchers(job_id)
    if ring:
        market.doorbell.ring_round()
    return answer


class _Taken:
    """The items of one heartbeat as they are taken, and what follows from them."""

    def __init__(self, session: Session, market: Market, site_id: str) -> None:
        self.session = session
        self.market = market
        self.site_id = site_id
        self.refusals: list[Refusal] = []
        self.acknowledged: dict[str, int] = {}
        self.wake: set[str] = set()
        self.jobs: set[str] = set()

    def renew_livenesses(self) -> None:
        """Count anew the liveness of all that runs at the site, and renew the certificates that need it."""
        for lease in self.session.scalars(select(Lease).where(Lease.site_id == self.site_id, LEASE_STANDS)):
            if lease.state != LeaseState.PROPOSED:
                renew_liveness(self.market, lease)
                renew_certificate(self.market, lease)

    def confirmation(self, item: Confirmation) -> None:
        """Take the site's word that it accepts a lease."""
        self._take(item, lambda lease: self.wake.update(confirm(self.session, self.market, lease, item)))

    def veto(self, item: Veto) -> None:
        """Take the site's refusal of a lease."""
        self._take(item, lambda lease: self.wake.update(veto(self.session, self.market, lease, item)))

    def usage(self, item: Usage, sent_ms: int | None) -> None:
        """Take a usage report and charge for it; both times are of the site's own clock."""
        age_ms = 0 if sent_ms is None or item.ended_ms is None else max(0, sent_ms - item.ended_ms)

        def charge(lease: Lease) -> None:
            taken = accept_usage(self.session, self.market, lease, item, age_ms=age_ms)
            self.acknowledged[item.lease_id] = taken

        self._take(item, charge)

    def report(self, item: AttemptReport) -> None:
        """Take the state of an attempt."""
        self._take(item, lambda lease: self.wake.update(take_report(self.session, self.market, lease, item)))

    def _take(self, item: Item, work: Callable[[Lease], None]) -> None:
        """Take one item about a lease; a refused one changes nothing and is named in the answer."""
        try:
            lease = self._lease(item.lease_id, item.epoch)
            with self.session.begin_nested():
                work(lease)
            self.jobs.add(lease.job_id)
        except BrokerError as error:
            self._refuse(item, error)
        except DBAPIError as error:
            if not refuses_the_values(error):
                raise  # the whole heartbeat is tried again, or fails
            _log.exception("item.unstorable", site=self.site_id, lease=item.lease_id, kind=type(item).__name__)
            self._refuse(item, UnstorableError(f"the database does not hold what this {type(item).__name__} says"))

    def _refuse(self, item: Item, error: BrokerError) -> None:
        self.refusals.append(Refusal(lease_id=item.lease_id, code=error.code, detail=str(error)[:1000]))

    def _lease(self, lease_id: str, epoch: int) -> Lease:
        lease = self.session.get(Lease, lease_id)
        if lease is None or lease.site_id != self.site_id:
            message = f"this site has no lease {lease_id}; forget it"
            raise NotFoundError(message)
        if lease.epoch != epoch:
            record_event(
                self.session,
                "stale",
                now_ms=self.market.clock.now_ms(),
                job_id=lease.job_id,
                site_id=self.site_id,
                lease_id=lease_id,
                detail=f"epoch {epoch} instead of {lease.epoch}",
            )
            message = f"lease {lease_id} has epoch {lease.epoch}, not {epoch}; stop what runs under the old one"
            raise StaleEpochError(message)
        return lease


def _heard(session: Session, market: Market, site_id: str, heartbeat: Heartbeat, sequence: int) -> Site:
    site = session.get(Site, site_id)
    if site is None or site.state == SiteState.REMOVED:
        message = f"site {site_id!r} is not part of this market; ask its admin for a new invitation"
        raise CredentialError(message)
    if sequence < site.heartbeat_sequence:
        message = f"heartbeat {sequence} was overtaken by {site.heartbeat_sequence}; nothing in it was taken"
        raise OvertakenError(message)
    site.heartbeat_sequence = sequence
    site.heard_ms = market.clock.now_ms()
    site.heard_monotonic_ms = round(market.clock.monotonic_s() * 1000)
    site.heard_era = market.clock.era()
    if site.boot is not None and site.boot != heartbeat.boot:
        # What it left unfinished it finds again by its journal; an operator wants to know how often that is needed.
        record_event(session, "agent", now_ms=site.heard_ms, after="restarted", site_id=site_id)
    site.boot = heartbeat.boot
    site.agent_version = heartbeat.agent_version
    if site.state == SiteState.SILENT:
        change_state(session, site, SiteState.LIVE, now_ms=market.clock.now_ms())
        note_change(session)
    return site


def _standing_leases(session: Session, site_id: str) -> list[Lease]:
    """Return the site's leases that are not over, or whose GPUs it has not yet said to be free."""
    standing = select(Lease.lease_id).where(Lease.site_id == site_id, LEASE_STANDS)
    still_held = select(LeasedGpu.lease_id).where(LeasedGpu.site_id == site_id, LeasedGpu.live)
    found = standing.union(still_held).scalar_subquery()
    return list(session.scalars(select(Lease).where(Lease.lease_id.in_(found)).order_by(Lease.lease_id)))


def _renewed_certificate(session: Session, market: Market, site_id: str, csr_pem: str | None) -> str | None:
    if csr_pem is None:
        return None
    issued = market.authority.issue_site_certificate(
        csr_pem, site_id=site_id, life_s=market.settings.site_certificate_s
    )
    session.add(
        SiteCertificate(
            serial=issued.serial,
            site_id=site_id,
            public_key=issued.public_key,
            not_after_ms=issued.not_after_ms,
        )
    )
    return issued.pem
