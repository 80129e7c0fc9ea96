"""Who gets through a hub's door, and what it refuses from those who do."""

from __future__ import annotations

import hashlib
import http.client
import json
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sites.identity import private_key_pem
from training.exchange import SampleRange
from training.roundlog.blobs import CHUNK_BYTES
from training.roundlog.contribution import FragmentPart, Header, sign_contribution
from training.roundlog.control import GatewayControlError
from training.roundlog.credentials import client_context, new_attempt_key, peer_uri
from training.roundlog.listener import Listener
from training.roundlog.signing import SignedDocument, sign
from training.roundlog.view import GENESIS_HASH, sign_view

from .conftest import JOB, OUTER, Authority, Federation, Site, run_round, wait_until


@dataclass
class Caller:
    """Someone who dials a hub with credentials of their own."""

    hub: Site
    folder: Path
    authority: Authority

    def context(self, key: Ed25519PrivateKey, certificate: bytes, ca: bytes | None = None) -> ssl.SSLContext:
        for name, content in (
            ("key", private_key_pem(key)),
            ("certificate", certificate),
            ("ca", ca or self.authority.pem),
        ):
            (self.folder / name).write_bytes(content)
        return client_context(*(str(self.folder / name) for name in ("certificate", "key", "ca")))

    def ask(
        self,
        context: ssl.SSLContext,
        path: str = "/views/1/state",
        method: str = "GET",
        body: bytes | None = None,
    ) -> tuple[int, dict[str, object]]:
        assert self.hub.config.listen is not None
        connection = http.client.HTTPSConnection(self.hub.config.listen, context=context, timeout=10)
        try:
            connection.request(method, path, body=body)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def code(self, context: ssl.SSLContext, path: str = "/views/1/state") -> object:
        return self.ask(context, path)[1].get("code")


@pytest.fixture
def caller(federation: Federation, tmp_path: Path) -> Caller:
    """A hub that waits in view 1 with a member, bergen, whose gateway does not run."""
    (hub,) = federation.start("aachen")
    bergen = federation.add("bergen")
    federation.install(federation.view(hub, bergen, hub=hub), hub)
    return Caller(hub, tmp_path, federation.authority)


def bergen(federation: Federation, caller: Caller) -> ssl.SSLContext:
    key = federation.sites["bergen"].key
    return caller.context(key, federation.authority.issue(key, peer_uri(JOB, 1, "bergen")))


def test_member_is_let_in(federation: Federation, caller: Caller) -> None:
    status, state = caller.ask(bergen(federation, caller))
    assert (status, state["waiting_for"]) == (200, ["aachen", "bergen"])


@pytest.mark.parametrize(
    "uri",
    [
        peer_uri("job-2", 1, "bergen"),
        peer_uri(JOB, 2, "bergen"),
        peer_uri(JOB, 1, "cadiz"),
        "spiffe://other/job/job-1/epoch/1/site/bergen",
    ],
)
def test_right_authority_but_wrong_job_epoch_or_site_is_refused(
    federation: Federation, caller: Caller, uri: str
) -> None:
    key = federation.sites["bergen"].key
    assert caller.code(caller.context(key, federation.authority.issue(key, uri))) == "peer.refused"


def test_certificate_with_another_key_than_the_views_is_refused(federation: Federation, caller: Caller) -> None:
    key = new_attempt_key()
    certificate = federation.authority.issue(key, peer_uri(JOB, 1, "bergen"))
    assert caller.code(caller.context(key, certificate)) == "peer.refused"


def refused_handshakes() -> list[Callable[[Federation, Caller], ssl.SSLContext]]:
    def foreign_authority(federation: Federation, caller: Caller) -> ssl.SSLContext:
        key = federation.sites["bergen"].key
        return caller.context(key, Authority().issue(key, peer_uri(JOB, 1, "bergen")))

    def expired(federation: Federation, caller: Caller) -> ssl.SSLContext:
        key = federation.sites["bergen"].key
        uri = peer_uri(JOB, 1, "bergen")
        return caller.context(key, federation.authority.issue(key, uri, ends=timedelta(seconds=-1)))

    def older_tls(federation: Federation, caller: Caller) -> ssl.SSLContext:
        context = bergen(federation, caller)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        return context

    def no_certificate(federation: Federation, caller: Caller) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        (caller.folder / "ca").write_bytes(federation.authority.pem)
        context.load_verify_locations(caller.folder / "ca")
        return context

    return [foreign_authority, expired, older_tls, no_certificate]


@pytest.mark.parametrize("make", refused_handshakes(), ids=lambda make: make.__name__)
def test_handshake_fails(
    federation: Federation, caller: Caller, make: Callable[[Federation, Caller], ssl.SSLContext]
) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError)):
        caller.ask(make(federation, caller))


def test_plaintext_gets_no_answer(caller: Caller) -> None:
    assert caller.hub.config.listen is not None
    host, _, port = caller.hub.config.listen.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"GET /views/1/state HTTP/1.1\r\nHost: hub\r\n\r\n")
        assert b"HTTP" not in connection.recv(1000)


def test_member_does_not_talk_to_a_hub_with_anothers_certificate(federation: Federation) -> None:
    one, two = federation.add("aachen"), federation.add("bergen", patience_s=1.0)
    # Aachen's gateway shows a certificate of the right authority, but for cadiz.
    Path(one.config.certificate_path).write_bytes(federation.authority.issue(one.key, peer_uri(JOB, 1, "cadiz")))
    one.start()
    two.start()
    federation.open(one, two, hub=one)
    wait_until(lambda: two.control.status().hub_lost_s is not None, "bergen to refuse the hub")
    assert one.control.status().links == {}


def test_certificate_that_expired_on_an_open_connection_is_refused(federation: Federation, caller: Caller) -> None:
    key = federation.sites["bergen"].key
    ends = timedelta(seconds=2)
    context = caller.context(key, federation.authority.issue(key, peer_uri(JOB, 1, "bergen"), ends=ends))
    assert caller.hub.config.listen is not None
    connection = http.client.HTTPSConnection(caller.hub.config.listen, context=context, timeout=10)
    codes: list[object] = []

    def refused() -> bool:
        connection.request("GET", "/views/1/state")
        codes.append(json.loads(connection.getresponse().read()).get("code"))
        return codes[-1] == "peer.refused"

    wait_until(refused, "the certificate to expire", 5.0)
    assert codes[0] is None
    connection.close()


def test_site_that_left_the_view_is_refused_on_its_open_connection(federation: Federation, caller: Caller) -> None:
    context = bergen(federation, caller)
    assert caller.hub.config.listen is not None
    connection = http.client.HTTPSConnection(caller.hub.config.listen, context=context, timeout=10)
    connection.request("GET", "/views/1/state")
    assert connection.getresponse().read()
    federation.reopen(caller.hub, hub=caller.hub)
    connection.request("GET", "/views/2/state")
    assert json.loads(connection.getresponse().read())["code"] == "peer.refused"
    connection.close()


def test_renewed_certificate_is_used_and_a_foreign_one_refused(federation: Federation) -> None:
    one, two = federation.start("aachen", "bergen")
    federation.open(one, two, hub=one)
    with pytest.raises(GatewayControlError) as refused:
        two.control.replace_certificate(federation.authority.issue(two.key, peer_uri(JOB, 1, "cadiz")).decode())
    assert refused.value.reason == "certificate.invalid"
    for site in (one, two):
        renewed = federation.authority.issue(site.key, peer_uri(JOB, 1, site.site_id), ends=timedelta(hours=2))
        site.control.replace_certificate(renewed.decode())
        assert Path(site.config.certificate_path).read_bytes() == renewed
    run_round(1, one, two)


def test_connection_that_trickles_its_headers_is_ended(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Listener.__init__, "__kwdefaults__", {"idle_s": 0.3})
    (hub,) = federation.start("aachen")
    two = federation.add("bergen")
    federation.install(federation.view(hub, two, hub=hub), hub)
    context = client_context(two.config.certificate_path, two.config.key_path, two.config.ca_path)
    assert hub.config.listen is not None
    host, _, port = hub.config.listen.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as plain, context.wrap_socket(plain) as connection:
        connection.sendall(b"GET /views/1/state HTTP/1.1\r\nX: ")
        connection.settimeout(0.05)

        def ended() -> bool:
            try:
                connection.sendall(b"x")
                return connection.recv(1000) == b""
            except TimeoutError:
                return False
            except (ConnectionError, ssl.SSLError):
                return True

        wait_until(ended, "the connection to be ended", 5.0)


class Insider(Caller):
    """Bergen, with good credentials and bad intentions."""

    def header(self, **changes: object) -> Header:
        blob = b"b" * 100
        fields: dict[str, object] = {
            "job_id": JOB,
            "view_number": 1,
            "round_number": 1,
            "site_id": "bergen",
            "epoch": 1,
            "digest": hashlib.sha256(blob).hexdigest(),
            "size_bytes": len(blob),
            "weight": 8,
            "samples": (SampleRange(0, 8),),
            "fragments": (FragmentPart(size_bytes=100, digest=hashlib.sha256(blob).hexdigest()),),
            "previous_hash": GENESIS_HASH,
            "outer_hash": OUTER,
        }
        return Header.model_validate(fields | changes)


@pytest.fixture
def insider(federation: Federation, caller: Caller) -> Insider:
    return Insider(caller.hub, caller.folder, caller.authority)


def post(federation: Federation, insider: Insider, header: Header, key: Ed25519PrivateKey | None = None) -> object:
    document = sign_contribution(header, key or federation.sites["bergen"].key).document
    body = document.model_dump_json().encode()
    return insider.ask(bergen(federation, insider), "/views/1/contributions", "POST", body)[1].get("code")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, None),
        ({"job_id": "job-2"}, "contribution.wrong_job"),
        ({"site_id": "aachen"}, "contribution.wrong_job"),
        ({"view_number": 2}, "view.differs"),
        ({"epoch": 2}, "contribution.wrong_epoch"),
        ({"weight": 1001}, "contribution.overweight"),
        ({"size_bytes": 80_000_001}, "too_large"),
        ({"size_bytes": 99}, "contribution.lengths"),
        ({"samples": (SampleRange(0, 8), SampleRange(7, 9))}, "samples.invalid"),
        ({"samples": (SampleRange(0, 10**14),)}, "samples.invalid"),
        ({"round_number": 2}, "round.future"),
        ({"previous_hash": "ab" * 32}, "equivocation"),
    ],
)
def test_header_is_checked(federation: Federation, insider: Insider, changes: dict[str, object], code: str) -> None:
    assert post(federation, insider, insider.header(**changes)) == code


def test_header_signed_by_another_key_is_refused(federation: Federation, insider: Insider) -> None:
    assert post(federation, insider, insider.header(), new_attempt_key()) == "signature.invalid"


def test_other_chain_hash_is_reported(federation: Federation, insider: Insider) -> None:
    post(federation, insider, insider.header(previous_hash="ab" * 32))
    (report,) = insider.hub.control.status().equivocations
    assert (report.site_id, report.about, report.named) == ("bergen", "manifest", "ab" * 32)


def test_oversized_and_malformed_bodies_are_refused(federation: Federation, insider: Insider) -> None:
    context = bergen(federation, insider)
    path = "/views/1/contributions"
    document = SignedDocument(purpose="contribution", payload="A" * 400_000, signature="")
    assert insider.ask(context, path, "POST", document.model_dump_json().encode())[1]["code"] == "too_large"
    assert insider.ask(context, path, "POST", b"{" + b" " * 8_100_000)[1]["code"] == "too_large"
    assert insider.ask(context, path, "POST", b"[]")[1]["code"] == "malformed"
    for query in ("after_round=-1", "after_round=x", "wait_s=nan", "wait_s=-1"):
        assert insider.code(context, f"/views/1/state?{query}") == "malformed"


@pytest.mark.parametrize(
    ("offset", "length", "code"),
    [
        (0, 99, "blob.offset"),
        (0, 101, "blob.offset"),
        (1, 99, "blob.offset"),
        (CHUNK_BYTES, 100, "blob.offset"),
        (10**17, 100, "blob.offset"),
    ],
)
def test_lying_offsets_are_refused(
    federation: Federation, insider: Insider, offset: int, length: int, code: str
) -> None:
    header = insider.header()
    assert post(federation, insider, header) is None
    path = f"/views/1/blobs/{header.digest}?offset={offset}"
    assert insider.ask(bergen(federation, insider), path, "PUT", b"b" * length)[1]["code"] == code


def test_blob_must_be_announced_and_be_what_was_announced(federation: Federation, insider: Insider) -> None:
    header = insider.header()
    context = bergen(federation, insider)
    path = f"/views/1/blobs/{header.digest}?offset=0"
    assert insider.ask(context, path, "PUT", b"b" * 100)[1]["code"] == "blob.unannounced"
    post(federation, insider, header)
    assert insider.ask(context, path, "PUT", b"c" * 100)[1]["code"] == "blob.digest"
    post(federation, insider, header)
    assert insider.ask(context, path, "PUT", b"b" * 100)[1] == {"missing": []}
    wait_until(lambda: insider.hub.control.status().waiting_for == ("aachen",), "bergen's contribution")
    assert post(federation, insider, insider.header(weight=9)) == "contribution.changed"


def test_blobs_own_digest_must_hold_even_if_its_fragments_do(federation: Federation, insider: Insider) -> None:
    header = insider.header(digest="ab" * 32)
    post(federation, insider, header)
    path = f"/views/1/blobs/{header.digest}?offset=0"
    assert insider.ask(bergen(federation, insider), path, "PUT", b"b" * 100)[1]["code"] == "blob.digest"


def test_fragment_digests_must_hold_too(federation: Federation, insider: Insider) -> None:
    header = insider.header(fragments=(FragmentPart(size_bytes=100, digest="ab" * 32),))
    post(federation, insider, header)
    path = f"/views/1/blobs/{header.digest}?offset=0"
    assert insider.ask(bergen(federation, insider), path, "PUT", b"b" * 100)[1]["code"] == "blob.digest"


def test_sealed_round_and_done_samples_cannot_be_repeated(federation: Federation, insider: Insider) -> None:
    header = insider.header()
    post(federation, insider, header)
    insider.ask(bergen(federation, insider), f"/views/1/blobs/{header.digest}?offset=0", "PUT", b"b" * 100)
    insider.hub.contribute(1)
    insider.hub.apply(1)
    assert post(federation, insider, header) == "round.sealed"
    chain_hash = insider.hub.control.status().chain_hash
    repeated = insider.header(round_number=2, previous_hash=chain_hash, samples=(SampleRange(4, 12),))
    assert post(federation, insider, repeated) == "samples.overlap"


def test_views_must_be_the_brokers_and_newer(federation: Federation) -> None:
    one, two = federation.start("aachen", "bergen")
    first = federation.open(one, two, hub=one)
    second = federation.reopen(one, two, hub=two)

    def reason(document: SignedDocument) -> str:
        with pytest.raises(GatewayControlError) as refused:
            one.control.install_view(document)
        return refused.value.reason

    forged = second.model_copy(update={"number": 3})
    assert reason(sign_view(forged, new_attempt_key())) == "view.forged"
    assert reason(sign(federation.authority.views, "view", b"{}")) == "view.forged"
    assert reason(sign_view(first, federation.authority.views)) == "view.older"
    changed = second.model_copy(update={"grace_s": 7.0})
    assert reason(sign_view(changed, federation.authority.views)) == "view.conflict"
    with pytest.raises(GatewayControlError) as refused:
        one.control.promise(1)
    assert refused.value.reason == "promise.older"
    federation.install(second)
    run_round(1, one, two)
