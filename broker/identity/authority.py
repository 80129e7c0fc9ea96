"""The market's authority: issues every certificate of the federation, signs every view and every round's certificate.

Three keys with separate jobs: a P-256 certificate authority, which TLS stacks of every age verify,
an Ed25519 key for views and one for rounds, which the authority vouches for. Names in certificates are set here alone; what a request asks for is
ignored but for its public key, whose possession it must prove.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from broker.identity.errors import CertificateRequestError
from broker.identity.keys import KeyFolder
from sites.identity import attempt_uri, site_uri
from training.clock import Clock
from training.roundlog.signing import SignedDocument, public_hex, sign
from training.roundlog.view import View, sign_view

AUTHORITY_LIFE_S: Final = 10 * 365 * 86_400
SERVER_LIFE_S: Final = 90 * 86_400
SERVER_RENEWAL_S: Final = 30 * 86_400
# A peer whose clock is a little behind must not find a fresh certificate "not yet valid".
BACKDATE_S: Final = 300
CSR_LENGTH_MAX: Final = 8192
# What the certificate of the key for rounds calls it.
ROUNDS_URI: Final = "spiffe://hansa/rounds"

CertificateKey = ec.EllipticCurvePublicKey | Ed25519PublicKey


@dataclass(frozen=True, slots=True)
class IssuedCertificate:
    """A certificate and what the broker remembers of it. `public_key` is raw Ed25519, hex."""

    pem: str
    serial: str
    public_key: str
    not_after_ms: int


@dataclass(frozen=True, slots=True)
class ServerCertificate:
    """Where the API server's own certificate and key lie."""

    certificate_path: Path
    key_path: Path


class Authority:
    """The keys of one market, kept in `home`/keys."""

    def __init__(self, home: Path, clock: Clock) -> None:
        """Open the market's keys; the first process to come makes them."""
        self._clock = clock
        self._files = KeyFolder(home / "keys")
        bundle = self._files.load("authority.pem", self._new_authority)
        self._key = _p256(bundle)
        self._certificate = x509.load_pem_x509_certificate(bundle)
        self._view_key = _ed25519(self._files.load("views.pem", _new_signing_key))
        self._rounds_key = _ed25519(self._files.load("rounds.pem", _new_signing_key))
        self._rounds_key_pem = self._files.load("rounds-certificate.pem", self._vouch_for_rounds).decode()
        self._pepper = bytes.fromhex(self._files.load("pepper.hex", lambda: os.urandom(32).hex().encode()).decode())

    @property
    def ca_pem(self) -> str:
        """The certificate authority's own certificate: what sites and clients pin."""
        return self._certificate.public_bytes(Encoding.PEM).decode()

    @property
    def authority_key(self) -> str:
        """The public key that signs views (Ed25519, hex)."""
        return public_hex(self._view_key)

    @property
    def rounds_key_pem(self) -> str:
        """The certificate in which the authority vouches for the key that signs rounds."""
        return self._rounds_key_pem

    def sign_round(self, purpose: str, payload: bytes) -> SignedDocument:
        """Sign what the market states of a round."""
        return sign(self._rounds_key, purpose, payload)

    def derive_key(self, purpose: str) -> bytes:
        """Return a 256-bit secret for one `purpose`; the same in every process of this market."""
        return hmac.digest(self._pepper, f"hansa/{purpose}".encode(), hashlib.sha256)

    def sign_view(self, view: View) -> SignedDocument:
        """Sign a view: no one else can, so no one else decides membership."""
        return sign_view(view, self._view_key)

    def issue_site_certificate(self, csr_pem: str, site_id: str, life_s: int) -> IssuedCertificate:
        """Issue the certificate under which a site signs its requests.

        Raises CertificateRequestError where the request is unreadable, not for an Ed25519 key, or
        does not prove possession of it.
        """
        return self._issue(_requested_key(csr_pem), site_uri(site_id), life_s, [ExtendedKeyUsageOID.CLIENT_AUTH])

    def issue_attempt_certificate(
        self, csr_pem: str, *, job_id: str, epoch: int, site_id: str, life_s: int, attempt_key: str
    ) -> IssuedCertificate:
        """Issue the certificate of one attempt's gateway: its epoch is a fencing token on the wire.

        Raises CertificateRequestError also where the request is not for `attempt_key` (hex).
        """
        key = _requested_key(csr_pem)
        if _raw_hex(key) != attempt_key:
            raise CertificateRequestError("the certificate request is not for the attempt's key; send both anew")
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        return self._issue(key, attempt_uri(job_id, epoch, site_id), life_s, usages)

    def server_certificate(self, hosts: Sequence[str] = ()) -> ServerCertificate:
        """Return the API server's certificate for this host and `hosts`, renewed when due or when they change."""
        names = _server_names(hosts)
        held = self._files.folder / "server.pem"
        key_path = self._files.folder / "server-key.pem"
        if not (held.exists() and key_path.exists() and self._still_serves(held, names)):
            key = ec.generate_private_key(ec.SECP256R1())
            builder = self._leaf(key.public_key(), "hansa broker", SERVER_LIFE_S, [ExtendedKeyUsageOID.SERVER_AUTH])
            builder = builder.add_extension(names, critical=False)
            self._files.write("server-key.pem", _private_pem(key))
            self._files.write("server.pem", self._signed(builder).public_bytes(Encoding.PEM))
        return ServerCertificate(held, key_path)

    def _vouch_for_rounds(self) -> bytes:
        issued = self._issue(self._rounds_key.public_key(), ROUNDS_URI, AUTHORITY_LIFE_S, [])
        return issued.pem.encode()

    def _issue(
        self, key: Ed25519PublicKey, uri: str, life_s: int, usages: list[x509.ObjectIdentifier]
    ) -> IssuedCertificate:
        builder = self._leaf(key, uri.removeprefix("spiffe://hansa/")[:64], life_s, usages)
        builder = builder.add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=False
        )
        certificate = self._signed(builder)
        return IssuedCertificate(
            pem=certificate.public_bytes(Encoding.PEM).decode(),
            serial=f"{certificate.serial_number:x}",
            public_key=_raw_hex(key),
            not_after_ms=round(certificate.not_valid_after_utc.timestamp() * 1000),
        )

    def _leaf(
        self, key: CertificateKey, name: str, life_s: int, usages: list[x509.ObjectIdentifier]
    ) -> x509.CertificateBuilder:
        builder = (
            self._dated(life_s)
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(self._certificate.subject)
            .public_key(key)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
        )
        if usages:  # none: it is no key for TLS
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False).add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
            critical=False,
        )

    def _new_authority(self) -> bytes:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hansa market authority")])
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        certificate = (
            self._dated(AUTHORITY_LIFE_S)
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .add_extension(identifier, critical=False)
            .sign(key, SHA256())
        )
        return _private_pem(key) + certificate.public_bytes(Encoding.PEM)

    def _dated(self, life_s: int) -> x509.CertificateBuilder:
        now = dt.datetime.fromtimestamp(self._clock.now_ms() // 1000, dt.UTC)
        return (
            x509.CertificateBuilder()
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(seconds=BACKDATE_S))
            .not_valid_after(now + dt.timedelta(seconds=life_s))
        )

    def _signed(self, builder: x509.CertificateBuilder) -> x509.Certificate:
        return builder.sign(self._key, SHA256())

    def _still_serves(self, path: Path, names: x509.SubjectAlternativeName) -> bool:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        held = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        left_s = certificate.not_valid_after_utc.timestamp() - self._clock.now_ms() / 1000
        return left_s > SERVER_RENEWAL_S and held == names


def _requested_key(csr_pem: str) -> Ed25519PublicKey:
    if len(csr_pem) > CSR_LENGTH_MAX:
        raise CertificateRequestError(f"the certificate request is longer than {CSR_LENGTH_MAX} characters")
    try:
        request = x509.load_pem_x509_csr(csr_pem.encode())
        key = request.public_key()
        proven = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature):
        raise CertificateRequestError("the certificate request cannot be read; send a PEM request") from None
    if not isinstance(key, Ed25519PublicKey):
        raise CertificateRequestError("the certificate request is not for an Ed25519 key; make one and send it anew")
    if not proven:
        raise CertificateRequestError("the certificate request is not signed by its own key; sign it and send it anew")
    return key


def _server_names(hosts: Sequence[str]) -> x509.SubjectAlternativeName:
    names: list[x509.GeneralName] = []
    for host in sorted({"localhost", "127.0.0.1", "::1", *hosts}):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    return x509.SubjectAlternativeName(names)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _new_signing_key() -> bytes:
    return _private_pem(Ed25519PrivateKey.generate())


def _private_pem(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _p256(pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key(pem, password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey), "authority.pem holds another kind of key"
    return key


def _ed25519(pem: bytes) -> Ed25519PrivateKey:
    key = load_pem_private_key(pem, password=None)
    assert isinstance(key, Ed25519PrivateKey), "views.pem holds another kind of key"
    return key


def _raw_hex(key: Ed25519PublicKey) -> str:
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw).hex()
