"""A small broker for tests: real sockets, real certificates, every signature checked, the protocol's routes.

It grants what the test puts into `grants`, moves a lease from proposed to active when the site has
confirmed it, issues the first view, and keeps what it is sent.
"""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from sites.identity import JoinString, encode_join_string, serial_hex
from sites.protocol import (
    ArtifactState,
    AttemptOrder,
    AttemptReport,
    CheckpointReference,
    Confirmation,
    Enrolment,
    EnrolmentAnswer,
    Heartbeat,
    HeartbeatAnswer,
    LeaseOrder,
    LeasePhase,
    Refusal,
    SecretsAnswer,
    SecretsRequest,
    StreamState,
    Usage,
    Veto,
    request_bytes,
)
from sites.secret_box import close_box, secrets_context
from training.roundlog.signing import public_hex
from training.roundlog.view import GENESIS_HASH, Member, View, sign_view
from training.spec import JobSpec

Problem = tuple[int, str, str]


@dataclass
class Grant:
    """A lease as the test wants it."""

    lease_id: str
    job_id: str
    spec: JobSpec
    epoch: int = 1
    gpu_type: str = "cpu-slot"
    gpu_ids: tuple[str, ...] = ("0",)
    liveness_s: float = 20.0
    price: int = 1_000_000
    tenant_id: str = "tenant"
    phase: LeasePhase = LeasePhase.PROPOSED
    promise: int | None = None
    checkpoint: CheckpointReference | None = None


@dataclass
class Market:
    """What the broker wants and what it has heard."""

    grants: dict[str, Grant] = field(default_factory=dict)
    artifacts: dict[str, bytes] = field(default_factory=dict)
    partial: dict[str, bytes] = field(default_factory=dict)
    streams: dict[tuple[str, str], bytes] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict)
    heartbeats: list[Heartbeat] = field(default_factory=list)
    confirmations: dict[str, Confirmation] = field(default_factory=dict)
    vetoes: dict[str, Veto] = field(default_factory=dict)
    reports: dict[str, AttemptReport] = field(default_factory=dict)
    usage: list[Usage] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    acknowledges: bool = True
    answers: bool = True
    cut_after_bytes: int | None = None
    refusals: list[Refusal] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.authority = Ed25519PrivateKey.generate()
        self.ca_key = Ed25519PrivateKey.generate()
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test market")])
        self.ca = self._certificate(
            name, name, self.ca_key.public_key(), [x509.BasicConstraints(ca=True, path_length=0)]
        )
        self.site_keys: dict[str, Any] = {}
        self.sequences: set[int] = set()
        self.attempt_certificates: dict[str, str] = {}
        market = self

        class Handler(_Handler):
            pass

        Handler.market = market
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.lock = threading.Lock()
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def join_string(self, site_id: str) -> str:
        return encode_join_string(JoinString(url=self.url, site_id=site_id, token="once", ca_pem=""))

    def store(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        self.artifacts[digest] = content
        return digest

    def enrol(self, enrolment: Enrolment) -> EnrolmentAnswer:
        request = x509.load_pem_x509_csr(enrolment.csr_pem.encode())
        certificate = self._sign(request)
        self.site_keys[serial_hex(certificate)] = request.public_key()
        return EnrolmentAnswer(
            certificate_pem=certificate.public_bytes(Encoding.PEM).decode(),
            ca_pem=self.ca.public_bytes(Encoding.PEM).decode(),
            authority_key=public_hex(self.authority),
            heartbeat_s=0.3,
        )

    def receive(self, heartbeat: Heartbeat) -> HeartbeatAnswer:
        self.heartbeats.append(heartbeat)
        for confirmation in heartbeat.confirmations:
            self.confirmations[confirmation.lease_id] = confirmation
            grant = self.grants.get(confirmation.lease_id)
            if grant and grant.phase is LeasePhase.PROPOSED and grant.epoch == confirmation.epoch:
                grant.phase = LeasePhase.ACTIVE
        self.vetoes.update({veto.lease_id: veto for veto in heartbeat.vetoes})
        self.usage += heartbeat.usage
        self.reports.update({report.lease_id: report for report in heartbeat.attempts})
        numbers = {usage.lease_id: usage.sequence for usage in heartbeat.usage} if self.acknowledges else {}
        refusals, self.refusals = tuple(self.refusals), []
        return HeartbeatAnswer(
            leases=tuple(self._order(grant) for grant in self.grants.values()),
            refusals=refusals,
            usage_acknowledged=numbers,
            heartbeat_s=0.3,
        )

    def _order(self, grant: Grant) -> LeaseOrder:
        return LeaseOrder(
            lease_id=grant.lease_id,
            job_id=grant.job_id,
            tenant_id=grant.tenant_id,
            epoch=grant.epoch,
            phase=grant.phase,
            gpu_type=grant.gpu_type,
            gpu_ids=grant.gpu_ids,
            price_micros_per_gpu_hour=grant.price,
            term_ends_ms=2_000_000_000_000,
            liveness_s=grant.liveness_s,
            spec=grant.spec if grant.phase is LeasePhase.PROPOSED else None,
            attempt=self._attempt(grant) if grant.phase is LeasePhase.ACTIVE else None,
        )

    def _attempt(self, grant: Grant) -> AttemptOrder | None:
        confirmation = self.confirmations.get(grant.lease_id)
        if confirmation is None:
            return None
        view = View(
            job_id=grant.job_id,
            number=1,
            members=(
                Member(
                    site_id="hamburg",
                    epoch=grant.epoch,
                    gpus=len(grant.gpu_ids),
                    attempt_key=confirmation.attempt_key,
                    address=confirmation.gateway_address,
                    weight_max=1_000_000,
                ),
            ),
            hub="hamburg",
            standby=None,
            base_round=0,
            base_hash=GENESIS_HASH,
            quorum=1,
            grace_s=0.1,
            issued_ms=1_800_000_000_000,
        )
        if grant.lease_id not in self.attempt_certificates:
            certificate = self._sign(x509.load_pem_x509_csr(confirmation.csr_pem.encode()))
            self.attempt_certificates[grant.lease_id] = certificate.public_bytes(Encoding.PEM).decode()
        return AttemptOrder(
            spec=grant.spec,
            sync=grant.spec.market.sync,
            seed=7,
            weight_max=1_000_000,
            certificate_pem=self.attempt_certificates[grant.lease_id],
            checkpoint=grant.checkpoint,
            view=sign_view(view, self.authority),
            promise=grant.promise,
        )

    def _sign(self, request: x509.CertificateSigningRequest) -> x509.Certificate:
        assert request.is_signature_valid
        names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return self._certificate(request.subject, self.ca.subject, request.public_key(), [names])

    def _certificate(self, subject: x509.Name, issuer: x509.Name, key: Any, extensions: list[Any]) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(minutes=1))
            .not_valid_after(now + dt.timedelta(hours=24))
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=False)
        return builder.sign(self.ca_key, None)


class _Handler(BaseHTTPRequestHandler):
    market: Market
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self._body()
        path = urlsplit(self.path)
        if not self.market.answers:
            self._answer(503, b"")
        elif path.path == "/site/v1/enrol":
            enrolment = Enrolment.model_validate_json(body)
            if enrolment.join_token != "once":
                self._refuse(401, "credential.invalid", "this join token was used already; ask for a new one")
            else:
                self._say(self.market.enrol(enrolment))
        elif not self._is_signed(body):
            self._refuse(401, "credential.invalid", "the signature does not hold")
        elif path.path == "/site/v1/heartbeat":
            with self.market.lock:
                self._say(self.market.receive(Heartbeat.model_validate_json(body)))
        elif match := re.fullmatch(r"/site/v1/leases/(\w+)/\d+/streams/(log|metrics)", path.path):
            held = self.market.streams.get((match[1], match[2]), b"")
            offset = int(parse_qs(path.query)["offset"][0])
            if offset <= len(held):
                held += body[len(held) - offset :]
            self.market.streams[match[1], match[2]] = held
            self._say(StreamState(held_bytes=len(held), full=False))
        elif match := re.fullmatch(r"/site/v1/leases/(\w+)/(\d+)/secrets", path.path):
            self._give_secrets(match[1], int(match[2]), SecretsRequest.model_validate_json(body))
        else:
            self._refuse(404, "request.not_found", "no such route")

    def _give_secrets(self, lease_id: str, epoch: int, asked: SecretsRequest) -> None:
        names = self.market.grants[lease_id].spec.secrets or ()
        missing = [name for name in names if name not in self.market.secrets]
        if missing:
            self._refuse(422, "secret.missing", f"there is no secret {missing[0]}")
            return
        values = json.dumps({name: self.market.secrets[name] for name in names})
        box = close_box(asked.public_key, values.encode(), secrets_context(lease_id, epoch))
        self._say(SecretsAnswer(box=box.hex()))

    def do_PUT(self) -> None:
        body = self._body()
        path = urlsplit(self.path)
        if not self._is_signed(body):
            self._refuse(401, "credential.invalid", "the signature does not hold")
            return
        digest = path.path.rpartition("/")[2]
        query = parse_qs(path.query, keep_blank_values=True)
        offset, size = int(query["offset"][0]), int(query["size"][0])
        held = self.market.artifacts.get(digest, self.market.partial.get(digest, b""))
        if digest not in self.market.artifacts:
            if offset > len(held):
                self._refuse(409, "artifact.offset", f"{len(held)} bytes are held")
                return
            held += body[len(held) - offset :]
            self.market.partial[digest] = held
            if len(held) == size:
                if hashlib.sha256(held).hexdigest() != digest:
                    self._refuse(422, "artifact.digest", "other bytes")
                    return
                self.market.artifacts[digest] = held
        complete = digest in self.market.artifacts
        self._say(ArtifactState(digest=digest, size_bytes=size, held_bytes=len(held), complete=complete))

    def do_GET(self) -> None:
        digest = self.path.rpartition("/")[2]
        if not self._is_signed(b""):
            self._refuse(401, "credential.invalid", "the signature does not hold")
            return
        if digest not in self.market.artifacts:
            self._refuse(404, "artifact.missing", "upload it first")
            return
        content = self.market.artifacts[digest]
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        rest = content[start:]
        if asked and not rest:
            self._answer(416, b"")
            return
        cut, self.market.cut_after_bytes = self.market.cut_after_bytes, None
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest if cut is None else rest[:cut])
        if cut is not None:
            self.close_connection = True

    def _is_signed(self, body: bytes) -> bool:
        """Check a request exactly as the protocol states it, and refuse a number seen before."""
        key = self.market.site_keys.get(self.headers.get("Hansa-Certificate", ""))
        if key is None:
            return False
        sequence, time_ms = int(self.headers["Hansa-Sequence"]), int(self.headers["Hansa-Time-Ms"])
        signed = request_bytes(self.command, self.path, body, sequence=sequence, time_ms=time_ms)
        key.verify(base64.b64decode(self.headers["Hansa-Signature"]), signed)
        with self.market.lock:
            fresh = sequence not in self.market.sequences
            self.market.sequences.add(sequence)
            self.market.requests.append(f"{self.command} {self.path}")
        return fresh

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _say(self, message: Any) -> None:
        self._answer(200, message.model_dump_json().encode())

    def _refuse(self, status: int, code: str, detail: str) -> None:
        self._answer(status, json.dumps({"code": code, "title": "refused", "detail": detail}).encode())

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass
