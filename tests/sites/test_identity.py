from __future__ import annotations

import base64
import datetime as dt
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from sites.errors import IdentityError, JoinStringError
from sites.identity import (
    Identity,
    JoinString,
    certificate_request_pem,
    decode_join_string,
    encode_join_string,
    prepare_identity,
    serial_hex,
    site_uri,
    store_identity,
)
from sites.protocol import EnrolmentAnswer, request_bytes
from training.clock import ManualClock

NOW = dt.datetime.fromtimestamp(1_800_000_000, dt.UTC)
JOIN = JoinString(url="http://127.0.0.1:8080", site_id="hamburg", token="once", ca_pem="")


def issue(csr_pem: str, authority: Ed25519PrivateKey, *, life: dt.timedelta, uri: str | None = None) -> str:
    request = x509.load_pem_x509_csr(csr_pem.encode())
    names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    if uri:
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(request.subject)
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "market")]))
        .public_key(request.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW)
        .not_valid_after(NOW + life)
        .add_extension(names, critical=False)
        .sign(authority, None)
    )
    return certificate.public_bytes(Encoding.PEM).decode()


def enrol(folder: Path, clock: ManualClock, *, uri: str | None = None) -> Identity:
    key = prepare_identity(folder)
    csr = certificate_request_pem(key, site_uri("hamburg"))
    pem = issue(csr, Ed25519PrivateKey.generate(), life=dt.timedelta(hours=24), uri=uri)
    answer = EnrolmentAnswer(certificate_pem=pem, ca_pem="", authority_key="0" * 64, heartbeat_s=2)
    store_identity(folder, JOIN, answer)
    return Identity(folder, clock)


def test_join_string_survives_a_broken_line() -> None:
    word = encode_join_string(JOIN)
    assert word.startswith("hansa-join.")
    assert decode_join_string(f" {word[:30]}\n{word[30:]}\n") == JOIN


@pytest.mark.parametrize(
    "url", ["http://broker.example", "ftp://127.0.0.1", "https://", "http://127.0.0.1.evil.example"]
)
def test_join_string_to_an_unprotected_address_is_refused(url: str) -> None:
    with pytest.raises(JoinStringError):
        decode_join_string(encode_join_string(JOIN.model_copy(update={"url": url})))


def test_join_string_without_a_pinned_authority_is_refused_over_https() -> None:
    with pytest.raises(JoinStringError, match="pins no"):
        decode_join_string(encode_join_string(JOIN.model_copy(update={"url": "https://broker.example"})))


@given(st.text(max_size=200))
def test_any_other_text_is_refused_as_a_join_string(text: str) -> None:
    for candidate in (text, "hansa-join." + text):
        with pytest.raises(JoinStringError):
            decode_join_string(candidate)


def test_key_and_folder_are_the_owners_alone(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    enrol(folder, ManualClock())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "identity/key.pem").stat().st_mode) == 0o600


def test_request_signature_holds_over_every_signed_part(tmp_path: Path) -> None:
    identity = enrol(tmp_path, ManualClock())
    headers = identity.sign_request("POST", "/site/v1/heartbeat?a=1", b"body")
    public = identity.certificate.public_key()
    signed = request_bytes(
        "POST", "/site/v1/heartbeat?a=1", b"body", sequence=headers.sequence, time_ms=headers.time_ms
    )
    public.verify(base64.b64decode(headers.signature), signed)  # type: ignore[union-attr,call-arg]  # an Ed25519 key
    assert headers.certificate == serial_hex(identity.certificate)


def test_sequence_numbers_rise_across_a_kill(tmp_path: Path) -> None:
    clock = ManualClock()
    identity = enrol(tmp_path, clock)
    used = [identity.sign_request("GET", "/", b"").sequence for _ in range(1500)]
    assert used == list(range(1, 1501))
    reopened = Identity(tmp_path, clock)  # nothing was closed: as after a SIGKILL
    assert reopened.sign_request("GET", "/", b"").sequence > used[-1]


def test_certificate_is_renewed_at_two_thirds_of_its_life(tmp_path: Path) -> None:
    clock = ManualClock(int(NOW.timestamp() * 1000))
    identity = enrol(tmp_path, clock)
    clock.advance_s(16 * 3600 - 1)
    assert identity.renewal_csr_pem() is None
    clock.advance_s(1)
    csr = identity.renewal_csr_pem()
    assert csr is not None
    renewed = issue(csr, Ed25519PrivateKey.generate(), life=dt.timedelta(hours=48))
    identity.replace_certificate(renewed)
    assert identity.renewal_csr_pem() is None
    assert serial_hex(Identity(tmp_path, clock).certificate) == serial_hex(
        x509.load_pem_x509_certificate(renewed.encode())
    )


def test_certificate_for_another_site_or_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="not for the key"):
        enrol(tmp_path / "a", ManualClock(), uri=site_uri("bremen"))
    identity = enrol(tmp_path / "b", ManualClock())
    foreign = certificate_request_pem(Ed25519PrivateKey.generate(), site_uri("hamburg"))
    with pytest.raises(IdentityError):
        identity.replace_certificate(issue(foreign, Ed25519PrivateKey.generate(), life=dt.timedelta(hours=1)))


def test_folder_without_identity_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="hansa site join"):
        Identity(tmp_path, ManualClock())
