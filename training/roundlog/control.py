"""How a site's agent steers its gateway: the documents and a small client for agent.sock.

The agent is thin: this module needs the standard library, pydantic and the signing of documents,
and neither aiohttp nor torch. The other end is `training.roundlog.agent_api`.

    POST /view         SignedDocument -> 204
    POST /promise      PromiseRequest -> ViewReport
    GET  /status       GatewayStatus
    POST /certificate  CertificateRequest -> 204
    POST /ranks        -> 204
    POST /leave        LeaveRequest -> 204
"""

from __future__ import annotations

import http.client
from typing import ClassVar, Final, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from training.errors import TrainingError
from training.exchange import Leaving
from training.roundlog.errors import read_refusal
from training.roundlog.signing import SignedDocument
from training.roundlog.unix_http import exchange
from training.roundlog.view import Hash, ViewReport

CERTIFICATE_BYTES_MAX: Final = 64_000
EQUIVOCATIONS_MAX: Final = 100
# A status names at most 8 sites and 100 equivocations; a report at most 10,000 digests.
_ANSWER_BYTES_MAX: Final = 4_000_000
_TIMEOUT_S: Final = 10.0

_Answer = TypeVar("_Answer", bound=BaseModel)


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PromiseRequest(_Document):
    """Ask a gateway to refuse seals of views below `number` from now on."""

    number: int = Field(ge=1)


class LeaveRequest(_Document):
    """Ask a gateway to say with its next contribution that its site stops after that round, or that all do."""

    leaving: Leaving


class CertificateRequest(_Document):
    """A renewed certificate (PEM, leaf first) for the attempt key that the gateway holds."""

    pem: str = Field(max_length=CERTIFICATE_BYTES_MAX)


class LinkBytes(_Document):
    """Payload bytes between this gateway and one other site, counted since the gateway's state began."""

    bytes_sent: int = Field(ge=0)
    bytes_received: int = Field(ge=0)


class Equivocation(_Document):
    """A site that signed, in `round_number`, a hash that differs from what the others hold.

    `about` says which: the last `manifest` or the `outer` state.
    """

    round_number: int
    site_id: str
    about: str
    expected: str
    named: str


class GatewayStatus(_Document):
    """What a gateway knows of its log.

    `hub_lost_s` is None while the hub answers, else the seconds since it last did, or since its
    connection broke. At the hub, `members_lost_s` says the same of each member that is out of reach.
    `waiting_for` names the sites whose contribution to the open round the hub lacks, as far as this
    gateway heard.
    `samples_by_site` counts the samples in the chain by the site that trained them.
    """

    view_number: int | None
    promised: int
    sealed_round: int
    chain_hash: Hash
    applied_round: int
    outer_hash: Hash | None
    needs_snapshot: bool
    samples_done: int
    hub_lost_s: float | None
    members_lost_s: dict[str, float] = Field(default_factory=dict)
    waiting_for: tuple[str, ...]
    links: dict[str, LinkBytes]
    equivocations: tuple[Equivocation, ...]
    samples_by_site: dict[str, int]


class GatewayControlError(TrainingError):
    """A gateway that does not answer its agent, or refuses; `reason` is a code of the round log."""

    code: ClassVar[str] = "gateway.control"

    def __init__(self, reason: str, message: str) -> None:
        """Keep the reason beside the sentence that people read."""
        self.reason = reason
        super().__init__(message)


class GatewayControl:
    """One gateway as its agent sees it. Each call is one request on a connection of its own."""

    def __init__(self, socket_path: str, timeout_s: float = _TIMEOUT_S) -> None:
        """Speak to the gateway behind `socket_path`; nothing is sent yet."""
        self._socket_path = socket_path
        self._timeout_s = timeout_s

    def install_view(self, document: SignedDocument) -> None:
        """Hand over a view. Repeating one changes nothing; forged and older ones are refused."""
        self._call("POST", "/view", document)

    def promise(self, number: int) -> ViewReport:
        """Make the gateway promise view `number` and return how far its log reaches."""
        return _read(ViewReport, self._call("POST", "/promise", PromiseRequest(number=number)))

    def status(self) -> GatewayStatus:
        """Return the gateway's status."""
        return _read(GatewayStatus, self._call("GET", "/status", None))

    def replace_certificate(self, pem: str) -> None:
        """Hand over a renewed certificate; new connections use it."""
        self._call("POST", "/certificate", CertificateRequest(pem=pem))

    def ranks_started_anew(self) -> None:
        """Say that the ranks lost their state: they need a snapshot of what they had applied."""
        self._call("POST", "/ranks", None)

    def leave(self, leaving: Leaving) -> None:
        """Ask that the ranks stop at the end of a round, with a checkpoint of it."""
        self._call("POST", "/leave", LeaveRequest(leaving=leaving))

    def _call(self, method: str, path: str, document: BaseModel | None) -> bytes:
        """Return the body of a successful answer. Raises GatewayControlError otherwise."""
        body = None if document is None else document.model_dump_json().encode()
        try:
            answer = exchange(
                self._socket_path,
                method,
                path,
                body=body,
                timeout_s=self._timeout_s,
                body_bytes_max=_ANSWER_BYTES_MAX,
            )
        except (OSError, http.client.HTTPException) as error:
            message = f"the gateway behind {self._socket_path} does not answer ({error}); see its gateway.log"
            raise GatewayControlError("gateway.away", message) from error
        if answer.status >= http.client.BAD_REQUEST:
            refusal = read_refusal(answer.status, answer.body)
            raise GatewayControlError(refusal.code, f"{method} {path}: {refusal.message}")
        return answer.body


def _read(kind: type[_Answer], body: bytes) -> _Answer:
    """Return the document in `body`. A gateway of another version outlives the agent that started it."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        message = f"the gateway's answer is no {kind.__name__} of this version ({error.error_count()} faults)"
        raise GatewayControlError("gateway.version", message) from error
