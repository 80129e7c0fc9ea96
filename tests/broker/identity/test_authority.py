"""The authority's certificates hold where they should and nowhere else."""

from __future__ import annotations

import multiprocessing
import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from broker.identity.authority import Authority
from broker.identity.errors import CertificateRequestError
from sites.identity import certificate_request_pem, private_key_pem, site_uri
from training.clock import ManualClock, SystemClock
from training.errors import SignatureError
from training.roundlog.signing import public_hex
from training.roundlog.view import Member, View, open_view


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, SystemClock())


def _names(pem: str) -> list[str]:
    certificate = x509.load_pem_x509_certificate(pem.encode())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def test_keys_are_made_once_and_closed_to_others(tmp_path: Path) -> None:
    first = Authority(tmp_path, SystemClock())
    again = Authority(tmp_path, SystemClock())
    assert (first.ca_pem, first.authority_key) == (again.ca_pem, again.authority_key)
    assert first.derive_key("tokens") == again.derive_key("tokens") != first.derive_key("cursors")
    for path in (tmp_path / "keys").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def _open_and_tell(home: Path, answers: multiprocessing.SimpleQueue[str]) -> None:
    answers.put(Authority(home, SystemClock()).ca_pem)


def test_processes_that_start_at_once_agree_on_one_authority(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers: multiprocessing.SimpleQueue[str] = context.SimpleQueue()
    processes = [context.Process(target=_open_and_tell, args=(tmp_path, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    told = {answers.get() for _ in processes}
    for process in processes:
        process.join(10)
    assert told == {Authority(tmp_path, SystemClock()).ca_pem}


def test_a_site_gets_its_own_name_whatever_it_asks_for(authority: Authority) -> None:
    key = Ed25519PrivateKey.generate()
    asked_for_another = certificate_request_pem(key, site_uri("victim"))
    issued = authority.issue_site_certificate(asked_for_another, "lyon", 3600)
    assert _names(issued.pem) == ["spiffe://hansa/site/lyon"]
    assert issued.public_key == public_hex(key)
    certificate = x509.load_pem_x509_certificate(issued.pem.encode())
    assert f"{certificate.serial_number:x}" == issued.serial
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(authority.ca_pem.encode()))


def test_an_attempt_certificate_carries_job_epoch_and_site(authority: Authority) -> None:
    key = Ed25519PrivateKey.generate()
    issued = authority.issue_attempt_certificate(
        certificate_request_pem(key, "spiffe://hansa/whatever"),
        job_id="job_1",
        epoch=7,
        site_id="lyon",
        life_s=60,
        attempt_key=public_hex(key),
    )
    assert _names(issued.pem) == ["spiffe://hansa/job/job_1/epoch/7/site/lyon"]
    certificate = x509.load_pem_x509_certificate(issued.pem.encode())
    usages = set(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    assert usages == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}


def test_an_attempt_certificate_is_refused_for_another_key(authority: Authority) -> None:
    csr = certificate_request_pem(Ed25519PrivateKey.generate(), "spiffe://hansa/x")
    other = public_hex(Ed25519PrivateKey.generate())
    with pytest.raises(CertificateRequestError, match="attempt's key"):
        authority.issue_attempt_certificate(csr, job_id="job_1", epoch=1, site_id="lyon", life_s=60, attempt_key=other)


def test_a_request_without_proof_of_its_key_is_refused(authority: Authority) -> None:
    pem = certificate_request_pem(Ed25519PrivateKey.generate(), site_uri("lyon"))
    der = bytearray(x509.load_pem_x509_csr(pem.encode()).public_bytes(Encoding.DER))
    der[-1] ^= 1
    forged = x509.load_der_x509_csr(bytes(der)).public_bytes(Encoding.PEM).decode()
    with pytest.raises(CertificateRequestError, match="not signed by its own key"):
        authority.issue_site_certificate(forged, "lyon", 3600)


@pytest.mark.parametrize(
    "text", ["", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----", "x" * 9000]
)
def test_unreadable_requests_are_refused(authority: Authority, text: str) -> None:
    with pytest.raises(CertificateRequestError):
        authority.issue_site_certificate(text, "lyon", 3600)


def test_a_request_for_a_p256_key_is_refused(authority: Authority) -> None:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(name)
        .sign(ec.generate_private_key(ec.SECP256R1()), SHA256())
    )
    with pytest.raises(CertificateRequestError, match="Ed25519"):
        authority.issue_site_certificate(request.public_bytes(Encoding.PEM).decode(), "lyon", 3600)


def test_a_view_holds_only_under_the_authority_key(authority: Authority) -> None:
    member = Member(site_id="lyon", epoch=1, gpus=1, attempt_key="0" * 64, address=None, weight_max=1)
    view = View(
        job_id="job_1",
        number=1,
        members=(member,),
        hub="lyon",
        standby=None,
        base_round=0,
        base_hash="0" * 64,
        quorum=1,
        grace_s=1,
        issued_ms=0,
    )
    signed = authority.sign_view(view)
    assert open_view(signed, authority.authority_key) == view
    with pytest.raises(SignatureError):
        open_view(signed, public_hex(Ed25519PrivateKey.generate()))


def test_tls_13_holds_between_server_and_a_client_that_pins_the_authority(authority: Authority, tmp_path: Path) -> None:
    server = authority.server_certificate(["broker.example"])
    accepting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    accepting.load_cert_chain(server.certificate_path, server.key_path)
    assert _handshake(accepting, _pinning(authority.ca_pem), "broker.example") == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError):
        _handshake(accepting, _pinning(authority.ca_pem), "other.example")
    stranger = Authority(tmp_path / "stranger", SystemClock())
    with pytest.raises(ssl.SSLCertVerificationError):
        _handshake(accepting, _pinning(stranger.ca_pem), "localhost")


def test_gateways_accept_each_other_under_attempt_certificates(authority: Authority, tmp_path: Path) -> None:
    contexts = []
    for site, purpose in (("lyon", ssl.PROTOCOL_TLS_SERVER), ("oslo", ssl.PROTOCOL_TLS_CLIENT)):
        key = Ed25519PrivateKey.generate()
        issued = authority.issue_attempt_certificate(
            certificate_request_pem(key, "spiffe://hansa/x"),
            job_id="job_1",
            epoch=1,
            site_id=site,
            life_s=600,
            attempt_key=public_hex(key),
        )
        (tmp_path / site).write_bytes(private_key_pem(key) + issued.pem.encode())
        context = ssl.SSLContext(purpose)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=authority.ca_pem)
        context.load_cert_chain(tmp_path / site)
        contexts.append(context)
    assert _handshake(contexts[0], contexts[1], "ignored") == "TLSv1.3"


def test_the_server_certificate_is_kept_until_it_is_due_or_the_hosts_change(tmp_path: Path) -> None:
    clock = ManualClock()
    authority = Authority(tmp_path, clock)
    first = authority.server_certificate().certificate_path.read_bytes()
    assert authority.server_certificate().certificate_path.read_bytes() == first
    second = authority.server_certificate(["a.example"]).certificate_path.read_bytes()
    assert second != first
    clock.advance_s(61 * 86_400)
    assert authority.server_certificate(["a.example"]).certificate_path.read_bytes() != second


def _pinning(ca_pem: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(cadata=ca_pem)
    return context


def _handshake(accepting: ssl.SSLContext, dialling: ssl.SSLContext, host: str) -> str | None:
    ours, theirs = socket.socketpair()
    ours.settimeout(5)
    theirs.settimeout(5)

    def accept() -> None:
        try:
            with accepting.wrap_socket(theirs, server_side=True) as connection:
                connection.recv(1)
        except OSError:
            theirs.close()

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        with dialling.wrap_socket(ours, server_hostname=host) as connection:
            connection.send(b"x")
            return connection.version()
    finally:
        ours.close()
        thread.join(5)
