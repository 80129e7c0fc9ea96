"""Why the round log refuses something: stable reasons that travel as `code` between processes.

A refusal is an answer, not a fault: the sender learns the reason and what to do next, and a
repeat of the same request meets the same refusal. What may work later answers `busy` instead.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from training.errors import ExchangeError, TrainingError


class Reason(StrEnum):
    """A stable code for each refusal."""

    BUSY = "busy"
    MALFORMED = "malformed"
    TOO_LARGE = "too_large"
    NOT_FOUND = "not_found"
    SIGNATURE = "signature.invalid"
    PEER = "peer.refused"
    NOT_HUB = "hub.elsewhere"
    VIEW_FORGED = "view.forged"
    VIEW_OLDER = "view.older"
    VIEW_DIFFERS = "view.differs"
    VIEW_CONFLICT = "view.conflict"
    VIEW_ABSENT = "view.absent"
    PROMISE_OLDER = "promise.older"
    CERTIFICATE = "certificate.invalid"
    ROUND_SEALED = "round.sealed"
    ROUND_FUTURE = "round.future"
    ROUND_UNSEALED = "round.unsealed"
    WRONG_JOB = "contribution.wrong_job"
    WRONG_EPOCH = "contribution.wrong_epoch"
    NOT_MEMBER = "contribution.not_member"
    OVERWEIGHT = "contribution.overweight"
    CHANGED = "contribution.changed"
    INCOMPLETE = "contribution.incomplete"
    LENGTHS = "contribution.lengths"
    SAMPLES = "samples.invalid"
    SAMPLES_OVERLAP = "samples.overlap"
    EQUIVOCATION = "equivocation"
    CHAIN_BROKEN = "chain.broken"
    DIGEST = "blob.digest"
    OFFSET = "blob.offset"
    UNANNOUNCED = "blob.unannounced"
    SNAPSHOT_NEEDED = "snapshot.needed"
    SNAPSHOT_ABSENT = "snapshot.absent"


_STATUS: Final[dict[Reason, int]] = {
    Reason.BUSY: 503,
    Reason.TOO_LARGE: 413,
    Reason.MALFORMED: 400,
    Reason.NOT_FOUND: 404,
    Reason.SNAPSHOT_ABSENT: 404,
    Reason.SIGNATURE: 403,
    Reason.PEER: 403,
    Reason.VIEW_FORGED: 403,
    Reason.OFFSET: 416,
}
_CONFLICT: Final = 409
_MESSAGE_MAX: Final = 2000


class Refusal(TrainingError):  # noqa: N818  a refusal is an answer; "RefusalError" would say fault
    """What the round log will not do, with a `reason` that code may rely on."""

    code: ClassVar[str] = "roundlog.refused"

    def __init__(self, reason: Reason, message: str) -> None:
        """Keep the reason beside the sentence that people read."""
        self.reason = reason
        super().__init__(message)

    @property
    def http_status(self) -> int:
        """Return the HTTP status that carries this refusal."""
        return _STATUS.get(self.reason, _CONFLICT)

    def answer(self) -> RefusalAnswer:
        """Return the body that carries this refusal."""
        return RefusalAnswer(code=str(self.reason), message=str(self)[:_MESSAGE_MAX])


class RefusalAnswer(BaseModel):
    """The one error shape on every socket of the round log."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    code: str = Field(max_length=64)
    message: str = Field(max_length=_MESSAGE_MAX)


class ExchangeRefusedError(ExchangeError):
    """A refusal as the ranks see it: `reason` is one of `Reason`, such as snapshot.needed."""

    code: ClassVar[str] = "exchange.refused"

    def __init__(self, reason: str, message: str) -> None:
        """Keep the reason beside the sentence that people read."""
        self.reason = reason
        super().__init__(message)


def read_refusal(status: int, body: bytes) -> RefusalAnswer:
    """Return the refusal in an HTTP error answer, whatever answered."""
    try:
        return RefusalAnswer.model_validate_json(body)
    except ValidationError:
        return RefusalAnswer(code=str(Reason.MALFORMED), message=f"HTTP {status} without a readable reason")
