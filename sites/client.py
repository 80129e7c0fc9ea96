"""The broker over HTTPS: one method for each route of `sites.protocol`, with typed errors.

The certificate authority is the one that the join string pinned; no other is trusted. Plain HTTP
is spoken to a loopback address only. Transfers are ranged and resumed, so a cut line costs what
was in flight.
"""

from __future__ import annotations

import hashlib
import json
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Protocol, Self, TypeVar

import httpx
from cryptography.exceptions import InvalidTag
from pydantic import BaseModel, ValidationError

from sites.errors import ArtifactError, BrokerAnswerError, BrokerConnectionError, RequestRefusedError
from sites.identity import Identity, JoinString, check_broker_url
from sites.protocol import (
    ARTIFACT_CHUNK_BYTES_MAX,
    HEARTBEAT_BYTES_MAX,
    ROUTE_PREFIX,
    STREAM_CHUNK_BYTES_MAX,
    ArtifactState,
    Enrolment,
    EnrolmentAnswer,
    Heartbeat,
    HeartbeatAnswer,
    SecretsAnswer,
    SecretsRequest,
    SiteStatement,
    StreamState,
)
from sites.secret_box import box_public_key, new_box_key, open_box, secrets_context

# A heartbeat that takes longer is as good as lost: the next one says the same.
TIMEOUT_S: Final = 10.0
TRANSFER_TIMEOUT_S: Final = 30.0
GREETING_TIMEOUT_S: Final = 5.0
DOWNLOAD_TRIES_MAX: Final = 5
UPLOAD_CHUNK_BYTES: Final = 1_000_000
_BODY_BYTES_MAX: Final = 16_000_000

_Answer = TypeVar("_Answer", bound=BaseModel)


class Broker(Protocol):
    """What the agent asks of the broker. Every method raises a SiteError where it cannot be had."""

    def heartbeat(self, heartbeat: Heartbeat) -> HeartbeatAnswer:
        """Say what is and hear what should be."""
        ...

    def statement(self, days: int) -> SiteStatement:
        """Return what this site earned in the last days."""
        ...

    def fetch_artifact(self, digest: str, path: Path, *, bytes_max: int) -> None:
        """Write the artifact to `path`, verified; goes on where a former try broke off."""
        ...

    def store_artifact(self, digest: str, source: BinaryIO, size_bytes: int) -> None:
        """Upload an artifact; goes on where a former try broke off."""
        ...

    def append_stream(self, lease_id: str, epoch: int, name: str, offset: int, chunk: bytes) -> StreamState:
        """Send what follows `offset` of a stream and return how much the broker holds."""
        ...

    def secrets(self, lease_id: str, epoch: int) -> dict[str, bytes]:
        """Return the values of the secrets that the lease's job names."""
        ...


class BrokerClient:
    """The broker as an enrolled site sees it. Threads may share one."""

    def __init__(self, identity: Identity) -> None:
        """Speak to the broker that `identity` names; nothing is sent yet."""
        self._identity = identity
        self._http = _http(identity.url, identity.ca_pem)

    def __enter__(self) -> Self:
        """Return the client itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connections."""
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def heartbeat(self, heartbeat: Heartbeat) -> HeartbeatAnswer:
        """Say what is and hear what should be."""
        body = heartbeat.model_dump_json(exclude_defaults=True).encode()
        assert len(body) <= HEARTBEAT_BYTES_MAX, "a heartbeat is bounded by the limits of its parts"
        return _parsed(HeartbeatAnswer, self._send("POST", "/heartbeat", body))

    def statement(self, days: int) -> SiteStatement:
        """Return what this site earned in the last days."""
        return _parsed(SiteStatement, self._send("GET", f"/statement?days={days}", b""))

    def fetch_artifact(self, digest: str, path: Path, *, bytes_max: int) -> None:
        """Write the artifact to `path`, verified; goes on where a former try broke off.

        Raises ArtifactError for more than `bytes_max` or for other bytes than `digest` names.
        """
        partial = path.with_name(path.name + ".partial")
        for attempt in range(1, DOWNLOAD_TRIES_MAX + 1):
            try:
                self._download(digest, partial, bytes_max)
                break
            except BrokerConnectionError:
                if attempt == DOWNLOAD_TRIES_MAX:
                    raise
        with partial.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != digest:
            partial.unlink()
            raise ArtifactError(
                f"what came for the artifact {digest[:12]}… has other bytes; it is fetched anew next time"
            )
        partial.replace(path)

    def store_artifact(self, digest: str, source: BinaryIO, size_bytes: int) -> None:
        """Upload `size_bytes` of `source`; goes on where a former try broke off."""
        held = 0
        # The first request of a large upload is empty: it asks how much the broker holds already.
        chunk = b"" if size_bytes > UPLOAD_CHUNK_BYTES else source.read(size_bytes)
        for _ in range(2 + size_bytes // UPLOAD_CHUNK_BYTES * 2):
            path = f"/artifacts/{digest}?offset={held}&size={size_bytes}"
            state = _parsed(ArtifactState, self._send("PUT", path, chunk, timeout_s=TRANSFER_TIMEOUT_S))
            if state.complete:
                return
            held = state.held_bytes
            source.seek(held)
            chunk = source.read(min(UPLOAD_CHUNK_BYTES, ARTIFACT_CHUNK_BYTES_MAX, size_bytes - held))
            if not chunk:
                raise ArtifactError(f"the artifact {digest[:12]}… became shorter while it was uploaded")
        raise BrokerAnswerError(f"the broker takes no more of the artifact {digest[:12]}… and does not say why")

    def append_stream(self, lease_id: str, epoch: int, name: str, offset: int, chunk: bytes) -> StreamState:
        """Send what follows `offset` of a stream and return how much the broker holds."""
        assert len(chunk) <= STREAM_CHUNK_BYTES_MAX, "streams are sent in chunks"
        path = f"/leases/{lease_id}/{epoch}/streams/{name}?offset={offset}"
        return _parsed(StreamState, self._send("POST", path, chunk, content_type="application/octet-stream"))

    def secrets(self, lease_id: str, epoch: int) -> dict[str, bytes]:
        """Return the values of the secrets that the lease's job names; they are in this process alone."""
        key = new_box_key()
        body = SecretsRequest(public_key=box_public_key(key)).model_dump_json().encode()
        answer = _parsed(SecretsAnswer, self._send("POST", f"/leases/{lease_id}/{epoch}/secrets", body))
        try:
            values = json.loads(open_box(key, bytes.fromhex(answer.box), secrets_context(lease_id, epoch)))
            return {str(name): str(value).encode() for name, value in values.items()}
        except (InvalidTag, ValueError, AttributeError):
            raise BrokerAnswerError(
                "the broker's box of secrets cannot be opened; bring both sides up to date"
            ) from None

    def _download(self, digest: str, partial: Path, bytes_max: int) -> None:
        held = partial.stat().st_size if partial.exists() else 0
        request = self._request("GET", f"/artifacts/{digest}", b"", {"Range": f"bytes={held}-"} if held else {})
        with _connection_errors(), partial.open("ab") as stream:
            response = self._http.send(request, stream=True)
            try:
                if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                    return  # all of it is here; the digest decides
                if response.status_code == httpx.codes.OK:
                    stream.truncate(0)
                    held = 0
                elif response.status_code != httpx.codes.PARTIAL_CONTENT:
                    response.read()
                    raise _refusal(response)
                for chunk in response.iter_bytes(65_536):
                    held += len(chunk)
                    if held > bytes_max:
                        raise ArtifactError(f"the artifact {digest[:12]}… is larger than the {bytes_max} bytes allowed")
                    stream.write(chunk)
            finally:
                response.close()

    def _send(
        self, method: str, path: str, body: bytes, *, timeout_s: float = TIMEOUT_S, content_type: str | None = None
    ) -> bytes:
        kind = content_type or ("application/json" if method == "POST" else "application/octet-stream")
        request = self._request(method, path, body, {"Content-Type": kind}, timeout_s)
        return _answered(self._http, request)

    def _request(
        self, method: str, path: str, body: bytes, headers: dict[str, str], timeout_s: float = TIMEOUT_S
    ) -> httpx.Request:
        request = self._http.build_request(
            method, ROUTE_PREFIX + path, content=body, headers=headers, timeout=httpx.Timeout(timeout_s)
        )
        # Signed is what goes over the wire: the path as httpx has written it.
        signed = self._identity.sign_request(method, request.url.raw_path.decode("ascii"), body)
        request.headers.update(signed.as_dict())
        return request


def enrol(join: JoinString, csr_pem: str) -> EnrolmentAnswer:
    """Spend the join token for a certificate. Raises RequestRefusedError where it is used up or too old."""
    enrolment = Enrolment(site_id=join.site_id, join_token=join.token, csr_pem=csr_pem)
    with _http(join.url, join.ca_pem) as http:
        request = http.build_request(
            "POST",
            f"{ROUTE_PREFIX}/enrol",
            content=enrolment.model_dump_json().encode(),
            headers={"Content-Type": "application/json"},
            timeout=httpx.Timeout(TIMEOUT_S),
        )
        return _parsed(EnrolmentAnswer, _answered(http, request))


def greet(url: str, ca_pem: str) -> tuple[int, str | None]:
    """Return the status and date of the broker's answer to a request that needs no name. Raises BrokerConnectionError."""
    with _http(url, ca_pem) as http, _connection_errors():
        response = http.get("/healthz", timeout=GREETING_TIMEOUT_S)
    return response.status_code, response.headers.get("Date")


def _http(url: str, ca_pem: str) -> httpx.Client:
    check_broker_url(url)
    verify: ssl.SSLContext | bool = False
    if url.startswith("https:"):
        verify = ssl.create_default_context(cadata=ca_pem)
        verify.minimum_version = ssl.TLSVersion.TLSv1_2
    # trust_env=False: a proxy from the environment must not see what sites and broker say.
    return httpx.Client(base_url=url, verify=verify, trust_env=False, follow_redirects=False)


def _answered(http: httpx.Client, request: httpx.Request) -> bytes:
    with _connection_errors():
        response = http.send(request, stream=True)
        try:
            body = b""
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > _BODY_BYTES_MAX:
                    raise BrokerAnswerError(f"the broker's answer to {request.url.path} is too long to be one")
        finally:
            response.close()
    if response.status_code >= httpx.codes.INTERNAL_SERVER_ERROR:
        raise BrokerConnectionError(
            f"the broker answered {response.status_code} to {request.url.path}; it is tried again"
        )
    if not response.is_success:
        raise _refusal(response, body)
    return body


@contextmanager
def _connection_errors() -> Iterator[None]:
    try:
        yield
    except httpx.HTTPError as error:
        reason = str(error) or type(error).__name__
        raise BrokerConnectionError(f"the broker cannot be reached ({reason}); it is tried again") from error


def _refusal(response: httpx.Response, body: bytes | None = None) -> RequestRefusedError:
    try:
        problem = _Problem.model_validate_json(response.content if body is None else body)
    except ValidationError:
        problem = _Problem(detail=f"HTTP {response.status_code} without a reason")
    return RequestRefusedError(response.status_code, problem.code, problem.detail or problem.title)


class _Problem(BaseModel):
    """RFC 9457, as far as a site reads it."""

    code: str = "unknown"
    title: str = ""
    detail: str = ""


def _parsed(kind: type[_Answer], body: bytes) -> _Answer:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise BrokerAnswerError(f"the broker's answer is no {kind.__name__}: {error.errors()[0]['msg']}") from None
