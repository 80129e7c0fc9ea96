"""Who is who between gateways: attempt keys, certificate requests and mutual TLS 1.3.

The attempt key (Ed25519) signs a site's contributions and stands in its certificate, which the
broker's authority signs for one job, epoch and site. Hostnames mean nothing here: a peer is the
URI in its certificate plus the key that the view names for it.
"""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from training.roundlog.errors import Reason, Refusal

_PEER_URI: Final = re.compile(
    r"^spiffe://hansa/job/(?P<job>[A-Za-z0-9._-]{1,64})/epoch/(?P<epoch>[0-9]{1,12})/site/(?P<site>[a-z][a-z0-9-]{0,30})$"
)


@dataclass(frozen=True, slots=True)
class Peer:
    """The site that a verified certificate speaks for."""

    job_id: str
    epoch: int
    site_id: str
    public_key: str
    not_after_ms: int


def peer_uri(job_id: str, epoch: int, site_id: str) -> str:
    """Return the URI that stands in the certificate of one site's attempt."""
    uri = f"spiffe://hansa/job/{job_id}/epoch/{epoch}/site/{site_id}"
    assert _PEER_URI.match(uri), f"not a peer: {uri}"
    return uri


def new_attempt_key() -> Ed25519PrivateKey:
    """Make the key of a new attempt."""
    return Ed25519PrivateKey.generate()


def load_attempt_key(pem: bytes) -> Ed25519PrivateKey:
    """Return the attempt key in `pem`. Raises Refusal where it is none."""
    try:
        key = load_pem_private_key(pem, None)
    except (ValueError, TypeError):
        raise Refusal(Reason.CERTIFICATE, "the attempt key is not an unencrypted PEM key") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise Refusal(Reason.CERTIFICATE, "the attempt key must be Ed25519")
    return key


def certificate_request(key: Ed25519PrivateKey, job_id: str, epoch: int, site_id: str) -> bytes:
    """Return a PEM request for the certificate of one attempt; the authority decides what it signs."""
    uri = x509.UniformResourceIdentifier(peer_uri(job_id, epoch, site_id))
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site_id)]))
        .add_extension(x509.SubjectAlternativeName([uri]), critical=False)
        .sign(key, None)
        .public_bytes(Encoding.PEM)
    )


def read_peer(certificate: x509.Certificate) -> Peer:
    """Return whom a certificate speaks for. Raises Refusal unless it names one attempt and its key."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except x509.ExtensionNotFound:
        uris = []
    match = _PEER_URI.match(uris[0]) if len(uris) == 1 else None
    key = certificate.public_key()
    if match is None or not isinstance(key, Ed25519PublicKey):
        raise Refusal(Reason.PEER, "the certificate does not name one site of one job and its Ed25519 key")
    return Peer(
        job_id=match["job"],
        epoch=int(match["epoch"]),
        site_id=match["site"],
        public_key=key.public_bytes(Encoding.Raw, PublicFormat.Raw).hex(),
        not_after_ms=int(certificate.not_valid_after_utc.timestamp() * 1000),
    )


def read_peer_der(der: bytes) -> Peer:
    """Return whom the peer's certificate of a TLS connection speaks for."""
    return read_peer(x509.load_der_x509_certificate(der))


def is_peer(der: bytes | None, uri: str, public_key: str) -> bool:
    """Say whether the verified certificate of a connection is `uri`'s with `public_key`. Raises Refusal for one of no peer."""
    peer = read_peer_der(der) if der else None
    return peer is not None and (peer_uri(peer.job_id, peer.epoch, peer.site_id), peer.public_key) == (uri, public_key)


def check_certificate(pem: bytes, expected_uri: str, public_key: str) -> datetime:
    """Check that `pem` is a certificate for this attempt and key; return when it ends. Raises Refusal."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise Refusal(Reason.CERTIFICATE, "this is not a PEM certificate") from None
    try:
        peer = read_peer(certificate)
    except Refusal as refusal:
        raise Refusal(Reason.CERTIFICATE, str(refusal)) from None
    if peer_uri(peer.job_id, peer.epoch, peer.site_id) != expected_uri or peer.public_key != public_key:
        message = f"the certificate is not for {expected_uri} with this attempt's key; ask the broker again"
        raise Refusal(Reason.CERTIFICATE, message)
    return datetime.fromtimestamp(peer.not_after_ms / 1000, UTC)


def server_context(certificate_path: str, key_path: str, ca_path: str) -> ssl.SSLContext:
    """Return the context of a listening gateway: TLS 1.3 only, every client shows a certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # A resumed session would skip the certificate that each connection must show.
    context.num_tickets = 0
    return _mutual(context, certificate_path, key_path, ca_path)


def client_context(certificate_path: str, key_path: str, ca_path: str) -> ssl.SSLContext:
    """Return the context of a gateway that dials out: TLS 1.3 only, no hostname (see `pinned`)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    return _mutual(context, certificate_path, key_path, ca_path)


def pinned(context: ssl.SSLContext, uri: str, public_key: str) -> ssl.SSLContext:
    """Make every handshake of `context` fail unless the peer is `uri` with `public_key`.

    The check is part of the handshake: nothing is sent to a peer that is someone else.
    """

    class PinnedObject(ssl.SSLObject):
        def do_handshake(self) -> None:
            super().do_handshake()
            if not is_peer(self.getpeercert(binary_form=True), uri, public_key):
                message = f"the peer is not {uri} with the key that the view names"
                raise ssl.SSLCertVerificationError(message)

    context.sslobject_class = PinnedObject
    return context


def _mutual(context: ssl.SSLContext, certificate_path: str, key_path: str, ca_path: str) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cafile=ca_path)
    context.load_cert_chain(certificate_path, key_path)
    return context
