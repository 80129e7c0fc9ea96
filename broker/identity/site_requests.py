"""Requests of sites: signed with the key of their certificate, each sequence number good for once.

Verified here and not by TLS, because client certificates end at a proxy. A request is first
verified without a change, then its sequence number is *spent* in the write transaction of its
effect: of two copies at most one has an effect, whoever sent them and however they race.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sqlalchemy.orm import Session

from broker.database.tables import Site, SiteCertificate
from broker.identity.errors import (
    CertificateExpiredError,
    CertificateRevokedError,
    CertificateUnknownError,
    MalformedCredentialError,
    MissingCredentialError,
    ReplayError,
    RequestTimeError,
    SignatureInvalidError,
)
from broker.market import Market
from broker.transitions import SiteState
from sites.protocol import (
    CERTIFICATE_HEADER,
    REQUEST_AGE_MS_MAX,
    SEQUENCE_HEADER,
    SEQUENCE_WINDOW,
    SIGNATURE_HEADER,
    TIME_HEADER,
    request_bytes,
)

_SERIAL: Final = re.compile(r"[0-9a-f]{1,40}")
_NUMBER: Final = re.compile(r"[0-9]{1,18}")
_SIGNATURE_LENGTH_MAX: Final = 100
_MASK: Final = (1 << SEQUENCE_WINDOW) - 1


@dataclass(frozen=True, slots=True)
class SiteRequest:
    """A request that truly comes from `site_id`, its sequence number not yet spent."""

    site_id: str
    serial: str
    sequence: int


@dataclass(frozen=True, slots=True)
class _Headers:
    serial: str
    sequence: int
    time_ms: int
    signature: bytes


def verify_request(market: Market, headers: Mapping[str, str], method: str, path: str, body: bytes) -> SiteRequest:
    """Return who sent a request; `path` includes the query. Nothing is changed.

    Raises a CredentialError with its own code for each fault. Only the holder of the key learns
    more than that the certificate is unknown or the signature wrong.
    """
    given = _read_headers(headers)

    def find(session: Session) -> tuple[SiteCertificate, Site]:
        certificate = session.get(SiteCertificate, given.serial)
        site = None if certificate is None else session.get(Site, certificate.site_id)
        if certificate is None or site is None:
            raise CertificateUnknownError("this certificate was not issued here; join the market anew")
        return certificate, site

    certificate, site = market.database.read(find)
    signed = request_bytes(method, path, body, sequence=given.sequence, time_ms=given.time_ms)
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(certificate.public_key)).verify(given.signature, signed)
    except InvalidSignature:
        raise SignatureInvalidError("the signature of this request does not hold; sign method, path and body") from None
    _check_standing(market, certificate, site)
    if abs(market.clock.now_ms() - given.time_ms) > REQUEST_AGE_MS_MAX:
        raise RequestTimeError("this request is not from now; set the site's clock (NTP) and send it anew")
    request = SiteRequest(site.site_id, given.serial, given.sequence)
    _next_window(site, given.sequence)
    return request


def spend_sequence(session: Session, market: Market, request: SiteRequest) -> None:
    """Mark the request's sequence number as used, in the transaction of its effect.

    Raises ReplayError where it was used before, CertificateRevokedError where the site or its
    certificate was taken back since the request was verified.
    """
    site = session.get_one(Site, request.site_id)
    _check_standing(market, session.get_one(SiteCertificate, request.serial), site)
    site.sequence_max, seen = _next_window(site, request.sequence)
    site.sequence_seen = f"{seen:x}"


def _check_standing(market: Market, certificate: SiteCertificate, site: Site) -> None:
    if certificate.revoked_ms is not None or site.state == SiteState.REMOVED:
        raise CertificateRevokedError("this certificate was revoked; ask the market's admin for a new invitation")
    if certificate.not_after_ms <= market.clock.now_ms():
        raise CertificateExpiredError("this certificate has expired; ask the market's admin for a new invitation")


def _next_window(site: Site, sequence: int) -> tuple[int, int]:
    """Return the replay window after `sequence`: its highest number, and a bit for each number at or below it."""
    seen = int(site.sequence_seen or "0", 16)
    ahead = sequence - site.sequence_max
    if ahead > 0:
        return sequence, ((seen << min(ahead, SEQUENCE_WINDOW)) | 1) & _MASK
    if -ahead >= SEQUENCE_WINDOW or seen >> -ahead & 1:
        raise ReplayError("this sequence number was used before, or is too old to tell; send anew under the next one")
    return site.sequence_max, seen | 1 << -ahead


def _read_headers(headers: Mapping[str, str]) -> _Headers:
    # Header names do not care about case; a mapping does.
    given = {name.lower(): value for name, value in headers.items()}
    values = {
        name: given.get(name.lower()) for name in (CERTIFICATE_HEADER, SEQUENCE_HEADER, TIME_HEADER, SIGNATURE_HEADER)
    }
    missing = [name for name, value in values.items() if value is None]
    if missing:
        raise MissingCredentialError(f"the header {missing[0]} is missing; a site signs each of its requests")
    serial, sequence, time_ms, signature = (value or "" for value in values.values())
    if not (_SERIAL.fullmatch(serial) and _NUMBER.fullmatch(sequence) and _NUMBER.fullmatch(time_ms)):
        raise MalformedCredentialError("the headers of this signed request cannot be read")
    try:
        decoded = base64.b64decode(signature[:_SIGNATURE_LENGTH_MAX], validate=True)
    except (binascii.Error, ValueError):
        raise MalformedCredentialError("the headers of this signed request cannot be read") from None
    if int(sequence) < 1:
        raise MalformedCredentialError("sequence numbers start at one")
    return _Headers(serial, int(sequence), int(time_ms), decoded)
