"""Sites come and go: a one-time token against a certificate for the key that a site made itself; removal for good."""

from __future__ import annotations

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from broker import ledger
from broker.database.tables import Site, SiteCertificate
from broker.errors import NotFoundError, RefusedError
from broker.identity.authority import IssuedCertificate
from broker.identity.errors import JoinTokenError
from broker.identity.join import find_join_token
from broker.market import Market
from broker.transitions import SiteState, change_state, note_change, record_event
from sites.protocol import PROTOCOL_VERSION, Enrolment, EnrolmentAnswer, Offer


class ProtocolVersionError(RefusedError):
    """A site that speaks another version of the protocol."""

    code = "site.protocol_version"


def enrol(market: Market, enrolment: Enrolment) -> EnrolmentAnswer:
    """Take a site into the market, or give one that lost its identity a new one.

    A site that asks again with the same token and key (its answer was lost) gets another
    certificate; the token is useless to anyone else. Certificates of a former key are revoked.
    Raises JoinTokenError, CertificateRequestError or ProtocolVersionError.
    """
    if enrolment.protocol_version != PROTOCOL_VERSION:
        raise ProtocolVersionError(
            f"this broker speaks version {PROTOCOL_VERSION} of the site protocol, not {enrolment.protocol_version}; "
            "bring the older of the two up to date"
        )

    def work(session: Session) -> IssuedCertificate:
        token = find_join_token(session, market, enrolment.site_id, enrolment.join_token)
        issued = market.authority.issue_site_certificate(
            enrolment.csr_pem, enrolment.site_id, market.settings.site_certificate_s
        )
        now_ms = market.clock.now_ms()
        if token.used_ms is None:
            token.used_ms = now_ms
            _admit(session, market, enrolment.site_id, issued.public_key)
        elif not _holds_key(session, enrolment.site_id, issued.public_key):
            raise JoinTokenError(
                "this invitation is unknown, used, too old or another site's; ask the admin for a new one"
            )
        session.add(
            SiteCertificate(
                serial=issued.serial,
                site_id=enrolment.site_id,
                public_key=issued.public_key,
                not_after_ms=issued.not_after_ms,
            )
        )
        return issued

    issued = market.database.write("enrol", work)
    market.doorbell.ring_round()
    return EnrolmentAnswer(
        certificate_pem=issued.pem,
        ca_pem=market.authority.ca_pem,
        authority_key=market.authority.authority_key,
        heartbeat_s=market.settings.heartbeat_s,
    )


def remove_site(market: Market, site_id: str, *, actor: str | None = None) -> None:
    """Take a site out of the market for good: its certificates are revoked, its leases run out of liveness.

    Raises NotFoundError; removing twice is no fault.
    """
    now_ms = market.clock.now_ms()

    def work(session: Session) -> None:
        site = session.get(Site, site_id)
        if site is None:
            raise NotFoundError(f"there is no site {site_id!r}")
        if site.state == SiteState.REMOVED:
            return
        change_state(session, site, SiteState.REMOVED, now_ms=now_ms, detail="removed by an admin", actor=actor)
        session.execute(
            update(SiteCertificate)
            .where(SiteCertificate.site_id == site_id, SiteCertificate.revoked_ms.is_(None))
            .values(revoked_ms=now_ms)
        )
        note_change(session)

    market.database.write("remove site", work)
    market.doorbell.ring_round()


def _admit(session: Session, market: Market, site_id: str, public_key: str) -> None:
    now_ms = market.clock.now_ms()
    site = session.get(Site, site_id)
    if site is None:
        site = Site(
            site_id=site_id,
            state="",
            version=0,
            offer=Offer(pools=()).model_dump_json(),
            sequence_max=0,
            sequence_seen="0",
            joined_ms=now_ms,
            heard_ms=now_ms,
            heard_monotonic_ms=round(market.clock.monotonic_s() * 1000),
            heard_era=market.clock.era(),
        )
        session.add(site)
        change_state(session, site, SiteState.LIVE, now_ms=now_ms)
        session.flush()
        ledger.open_site(session, site_id, now_ms)
    else:
        if site.state == SiteState.REMOVED:
            raise JoinTokenError("this site was removed for good; ask the admin for an invitation under another name")
        _revoke_former(session, site, public_key, now_ms)
        record_event(session, "agent", now_ms=now_ms, after="rejoined", site_id=site_id)
    note_change(session)


def _revoke_former(session: Session, site: Site, public_key: str, now_ms: int) -> None:
    session.execute(
        update(SiteCertificate)
        .where(
            SiteCertificate.site_id == site.site_id,
            SiteCertificate.public_key != public_key,
            SiteCertificate.revoked_ms.is_(None),
        )
        .values(revoked_ms=now_ms)
    )
    if not _holds_key(session, site.site_id, public_key):
        # A new key starts to count anew; nothing that was signed under a former one is taken any more.
        site.sequence_max, site.sequence_seen, site.heartbeat_sequence = 0, "0", 0


def _holds_key(session: Session, site_id: str, public_key: str) -> bool:
    return (
        session.scalar(
            select(SiteCertificate.serial).where(
                SiteCertificate.site_id == site_id,
                SiteCertificate.public_key == public_key,
                SiteCertificate.revoked_ms.is_(None),
            )
        )
        is not None
    )
