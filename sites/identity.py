"""Who a site is: its folder, its key, its certificate, and the signature under every request.

The key is made here and never leaves the folder. A *join string*, handed over by the market's
admin, carries all that a new site needs: where the broker is, which certificate authority speaks
for it, and a one-time token. The broker answers the first request with a certificate; from then
on every request is signed with its key (`sites.protocol.request_bytes`).

    SITE/            mode 700
      identity/      key.pem, certificate.pem, ca.pem, market.json, sequence
"""

from __future__ import annotations

import base64
import ipaddress
import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID
from pydantic import BaseModel, ConfigDict, Field

from sites.errors import IdentityError, JoinStringError
from sites.protocol import (
    CERTIFICATE_HEADER,
    SEQUENCE_HEADER,
    SIGNATURE_HEADER,
    TIME_HEADER,
    EnrolmentAnswer,
    Pem,
    request_bytes,
)
from training.clock import Clock
from training.roundlog.view import Hash
from training.spec import SiteId

JOIN_STRING_PREFIX: Final = "hansa-join."
JOIN_STRING_LENGTH_MAX: Final = 20_000
# Sequence numbers are promised to the disk this many at a time, so a request costs no write and a
# killed agent goes on above every number that it may have used.
SEQUENCE_BLOCK: Final = 1000
_RENEWAL_SHARE: Final = 2 / 3


class JoinString(BaseModel):
    """What a market's admin hands to a new site. It holds a secret that works once."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(max_length=500)
    site_id: SiteId
    token: str = Field(min_length=1, max_length=200)
    ca_pem: Pem = Field(description="the broker's certificate authority; empty with a loopback http:// address")


def encode_join_string(join: JoinString) -> str:
    """Return `join` as one word that survives a mail and a shell."""
    return JOIN_STRING_PREFIX + base64.urlsafe_b64encode(join.model_dump_json().encode()).decode().rstrip("=")


def decode_join_string(text: str) -> JoinString:
    """Return what a join string holds. Raises JoinStringError where it is not one."""
    word = "".join(text.split())  # a mail program may have broken the line
    if not word.startswith(JOIN_STRING_PREFIX) or len(word) > JOIN_STRING_LENGTH_MAX:
        raise JoinStringError(f"a join string starts with {JOIN_STRING_PREFIX!r}; ask the market's admin for one")
    encoded = word.removeprefix(JOIN_STRING_PREFIX)
    try:
        document = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
        join = JoinString.model_validate_json(document)
    except ValueError:  # base64's, JSON's and pydantic's own errors are all of this kind
        raise JoinStringError("this join string is cut or altered; copy the whole word again") from None
    check_broker_url(join.url)
    if urlsplit(join.url).scheme == "https" and not join.ca_pem:
        raise JoinStringError("this join string pins no certificate authority; ask the market's admin for a new one")
    return join


def check_broker_url(url: str) -> None:
    """Refuse an address that is not HTTPS, unless it is this host's own. Raises JoinStringError."""
    parts = urlsplit(url)
    if parts.scheme == "https" and parts.hostname:
        return
    if parts.scheme == "http" and parts.hostname and _is_loopback(parts.hostname):
        return
    raise JoinStringError(f"{url!r} is not https://…; plain http:// is allowed to a loopback address only")


def site_uri(site_id: str) -> str:
    """Return the name of a site in its certificate."""
    return f"spiffe://hansa/site/{site_id}"


def attempt_uri(job_id: str, epoch: int, site_id: str) -> str:
    """Return the name of an attempt's gateway in its certificate."""
    return f"spiffe://hansa/job/{job_id}/epoch/{epoch}/site/{site_id}"


def certificate_request_pem(key: Ed25519PrivateKey, uri: str) -> str:
    """Return a PEM certificate request for `key` under the name `uri`."""
    common_name = uri.removeprefix("spiffe://hansa/")[:64]
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=False)
        .sign(key, None)
    )
    return request.public_bytes(Encoding.PEM).decode()


def private_key_pem(key: Ed25519PrivateKey) -> bytes:
    """Return `key` as PEM, unencrypted: the folder's mode protects it."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def serial_hex(certificate: x509.Certificate) -> str:
    """Return the serial number as it stands in the certificate header of a request."""
    return f"{certificate.serial_number:x}"


@dataclass(frozen=True, slots=True)
class SignedHeaders:
    """The four headers that authorise one request."""

    certificate: str
    sequence: int
    time_ms: int
    signature: str

    def as_dict(self) -> dict[str, str]:
        """Return the headers by name."""
        return {
            CERTIFICATE_HEADER: self.certificate,
            SEQUENCE_HEADER: str(self.sequence),
            TIME_HEADER: str(self.time_ms),
            SIGNATURE_HEADER: self.signature,
        }


class _Market(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str
    site_id: SiteId
    authority_key: Hash
    heartbeat_s: float = Field(gt=0)


class Identity:
    """An enrolled site: its key, its certificate and its sequence numbers."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        """Open the identity in the site's `folder`. Raises IdentityError where there is none."""
        self._folder = folder / "identity"
        self._clock = clock
        self._lock = threading.Lock()
        try:
            market = _Market.model_validate_json((self._folder / "market.json").read_bytes())
            self._key = load_key(self._folder / "key.pem")
            self._certificate = x509.load_pem_x509_certificate((self._folder / "certificate.pem").read_bytes())
            self.ca_pem = (self._folder / "ca.pem").read_text()
        except FileNotFoundError:
            raise IdentityError(f"{folder} holds no site's identity; run `hansa site join JOINSTRING` first") from None
        except ValueError as error:
            raise IdentityError(f"the identity in {folder} is damaged ({error}); join the market anew") from error
        self.site_id: str = market.site_id
        self.url = market.url
        self.authority_key: str = market.authority_key
        self.heartbeat_s = market.heartbeat_s
        self._next, self._reserved = self._stored_sequence()

    @property
    def certificate(self) -> x509.Certificate:
        """The certificate that requests are signed under."""
        return self._certificate

    def sign_request(self, method: str, path: str, body: bytes) -> SignedHeaders:
        """Sign one request under the next sequence number. `path` includes the query."""
        sequence = self._take_sequence()
        time_ms = self._clock.now_ms()
        signature = self._key.sign(request_bytes(method, path, body, sequence=sequence, time_ms=time_ms))
        return SignedHeaders(
            serial_hex(self._certificate), sequence, time_ms, base64.b64encode(signature).decode("ascii")
        )

    def renewal_csr_pem(self) -> str | None:
        """Return a request for the next certificate once two thirds of this one's life are over."""
        start = self._certificate.not_valid_before_utc.timestamp()
        end = self._certificate.not_valid_after_utc.timestamp()
        if self._clock.now_ms() / 1000 < start + (end - start) * _RENEWAL_SHARE:
            return None
        return certificate_request_pem(self._key, site_uri(self.site_id))

    def replace_certificate(self, certificate_pem: str) -> None:
        """Use a renewed certificate from now on. Raises IdentityError unless it is for this key and site."""
        certificate = _own_certificate(certificate_pem, self._key, self.site_id)
        write_private(self._folder / "certificate.pem", certificate_pem.encode())
        self._certificate = certificate

    def check_certificate(self) -> None:
        """Raise IdentityError unless the certificate is for this key and site."""
        _own_certificate(self._certificate.public_bytes(Encoding.PEM).decode(), self._key, self.site_id)

    def _take_sequence(self) -> int:
        with self._lock:
            if self._next > self._reserved:
                self._reserved = self._next + SEQUENCE_BLOCK - 1
                write_private(self._folder / "sequence", str(self._reserved).encode())
            taken = self._next
            self._next += 1
            return taken

    def _stored_sequence(self) -> tuple[int, int]:
        try:
            reserved = int((self._folder / "sequence").read_text())
        except FileNotFoundError:
            reserved = 0
        except ValueError:
            raise IdentityError(f"{self._folder / 'sequence'} is not a number; join the market anew") from None
        return reserved + 1, reserved


def prepare_identity(folder: Path) -> Ed25519PrivateKey:
    """Make the site's folder and its key, or return the key that is there already."""
    for private in (folder, folder / "identity"):
        private.mkdir(mode=0o700, parents=True, exist_ok=True)
        private.chmod(0o700)
    path = folder / "identity" / "key.pem"
    if not path.exists():
        write_private(path, private_key_pem(Ed25519PrivateKey.generate()))
    return load_key(path)


def store_identity(folder: Path, join: JoinString, answer: EnrolmentAnswer) -> None:
    """Keep what the broker answered to an enrolment. Raises IdentityError where it is not for this site's key."""
    identity = folder / "identity"
    _own_certificate(answer.certificate_pem, load_key(identity / "key.pem"), join.site_id)
    market = _Market(
        url=join.url, site_id=join.site_id, authority_key=answer.authority_key, heartbeat_s=answer.heartbeat_s
    )
    write_private(identity / "certificate.pem", answer.certificate_pem.encode())
    write_private(identity / "ca.pem", answer.ca_pem.encode())
    write_private(identity / "market.json", market.model_dump_json().encode())  # last: it makes the identity whole


def load_key(path: Path) -> Ed25519PrivateKey:
    """Return the Ed25519 key in a PEM file. Raises ValueError where it holds another kind."""
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (UnsupportedAlgorithm, TypeError) as error:
        raise ValueError(f"{path.name} is not an unencrypted key") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{path.name} is not an Ed25519 key")  # noqa: TRY004 - the file's value is wrong, not a type
    return key


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner can read, whole or not at all, and bring it to the disk."""
    partial = path.with_name(path.name + ".partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


def _own_certificate(pem: str, key: Ed25519PrivateKey, site_id: str) -> x509.Certificate:
    try:
        certificate = x509.load_pem_x509_certificate(pem.encode())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound) as error:
        raise IdentityError("the broker's answer holds no usable certificate; ask the market's admin") from error
    public = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    own = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if public != own or site_uri(site_id) not in uris:
        raise IdentityError(f"the broker's certificate is not for the key of site {site_id}; ask the market's admin")
    return certificate


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def market_document(folder: Path) -> dict[str, object]:
    """Return what the folder knows of its market, for people to read; empty before the join."""
    path = folder / "identity" / "market.json"
    return dict(json.loads(path.read_bytes())) if path.exists() else {}
