from __future__ import annotations

import datetime as dt
import io
import ipaddress
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from sites.client import BrokerClient, enrol
from sites.errors import ArtifactError, BrokerConnectionError, RequestRefusedError
from sites.identity import Identity, JoinString, decode_join_string
from tests.sites.market import Market


@pytest.fixture
def client(identity: Identity) -> Iterator[BrokerClient]:
    with BrokerClient(identity) as client:
        yield client


def test_cut_download_goes_on_where_it_broke_off(market: Market, client: BrokerClient, tmp_path: Path) -> None:
    content = bytes(range(256)) * 2000
    digest = market.store(content)
    market.cut_after_bytes = 100_000
    client.fetch_artifact(digest, tmp_path / "a", bytes_max=len(content))
    assert (tmp_path / "a").read_bytes() == content
    assert market.cut_after_bytes is None


def test_artifact_with_other_bytes_never_gets_its_name(market: Market, client: BrokerClient, tmp_path: Path) -> None:
    market.artifacts["0" * 64] = b"something else"
    with pytest.raises(ArtifactError, match="other bytes"):
        client.fetch_artifact("0" * 64, tmp_path / "a", bytes_max=1000)
    assert list(tmp_path.glob("a*")) == []


def test_artifact_beyond_the_limit_is_cut_off(market: Market, client: BrokerClient, tmp_path: Path) -> None:
    digest = market.store(bytes(500_000))
    with pytest.raises(ArtifactError, match="larger than"):
        client.fetch_artifact(digest, tmp_path / "a", bytes_max=100_000)
    assert not (tmp_path / "a").exists()
    assert (tmp_path / "a.partial").stat().st_size <= 100_000


def test_upload_sends_only_what_is_missing(market: Market, client: BrokerClient) -> None:
    content = bytes(range(256)) * 10_000
    digest = market.store(content)
    del market.artifacts[digest]
    market.partial[digest] = content[:2_000_000]
    client.store_artifact(digest, io.BytesIO(content), len(content))
    assert market.artifacts[digest] == content
    puts = [line for line in market.requests if line.startswith("PUT")]
    assert [line.partition("?")[2] for line in puts] == ["offset=0&size=2560000", "offset=2000000&size=2560000"]


def test_refusal_carries_the_brokers_reason(market: Market, client: BrokerClient, tmp_path: Path) -> None:
    with pytest.raises(RequestRefusedError, match="upload it first") as refused:
        client.fetch_artifact("1" * 64, tmp_path / "a", bytes_max=10)
    assert (refused.value.status, refused.value.problem_code) == (404, "artifact.missing")


def test_join_token_works_once_by_the_brokers_word(market: Market) -> None:
    join = decode_join_string(market.join_string("hamburg")).model_copy(update={"token": "spent"})
    with pytest.raises(RequestRefusedError, match="used already"):
        enrol(join, "csr")


def test_unreachable_broker_is_an_error_that_may_be_tried_again(market: Market, client: BrokerClient) -> None:
    market.server.shutdown()
    market.server.server_close()
    with pytest.raises(BrokerConnectionError):
        client.append_stream("lease_a", 1, "log", 0, b"x")


def test_only_the_pinned_authority_is_trusted_over_https(tmp_path: Path) -> None:
    key, stranger = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    pems = [own_authority(key), own_authority(stranger)]
    (tmp_path / "server.pem").write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + pems[0].encode()
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    market = Market()
    market.server.socket = context.wrap_socket(market.server.socket, server_side=True)
    try:
        url = market.url.replace("http:", "https:")
        join = JoinString(url=url, site_id="hamburg", token="spent", ca_pem=pems[0])
        with pytest.raises(RequestRefusedError, match="used already"):
            enrol(join, "csr")
        with pytest.raises(BrokerConnectionError, match=r"(?i)certificate"):
            enrol(join.model_copy(update={"ca_pem": pems[1]}), "csr")
    finally:
        market.close()


def own_authority(key: ec.EllipticCurvePrivateKey) -> str:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "broker")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(minutes=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(Encoding.PEM).decode()
