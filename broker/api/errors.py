"""What the API itself refuses, before any service is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from broker.errors import BrokerError, ConflictError, NotFoundError, RefusedError


@dataclass(frozen=True, slots=True)
class FieldError:
    """One fault in a request: `pointer` is a JSON pointer into the body, or names a parameter."""

    pointer: str
    message: str


class MalformedRequestError(BrokerError):
    """A body that is not JSON as RFC 8259 has it: cut, nested without end, NaN, NUL."""

    code: ClassVar[str] = "request.malformed"
    status = 400


class MediaTypeError(BrokerError):
    """A body of a type that the route does not take."""

    code = "request.media_type"
    status = 415


class TooLargeError(BrokerError):
    """A body larger than the route takes."""

    code = "request.too_large"
    status = 413


class InvalidRequestError(RefusedError):
    """A request whose form is right and whose fields are not; `errors` names each."""

    code = "request.invalid"

    def __init__(self, message: str, errors: list[FieldError]) -> None:
        """Keep the faults beside the sentence."""
        self.errors = errors
        super().__init__(message)


class RouteError(NotFoundError):
    """A path that the API does not have."""

    code = "request.route"


class MethodError(BrokerError):
    """A method that the path does not take."""

    code = "request.method"
    status = 405


class RangeError(BrokerError):
    """A byte range that lies outside the file."""

    code = "request.range"
    status = 416


class HttpError(BrokerError):
    """Anything else that the web server refuses."""

    code = "request.http"
    status = 400


class TooManyRequestsError(BrokerError):
    """A credential that sends more requests than its bucket holds; `retry_after_s` says when to come again."""

    code = "request.rate"
    status = 429

    def __init__(self, message: str, retry_after_s: int) -> None:
        """Keep the wait beside the sentence."""
        self.retry_after_s = retry_after_s
        super().__init__(message)


class IdempotencyKeyMissingError(BrokerError):
    """A POST that creates or spends, without the key that makes a retry safe."""

    code = "idempotency.missing"
    status = 400


class IdempotencyConflictError(ConflictError):
    """An idempotency key that was used for another request."""

    code = "idempotency.conflict"


class CursorError(BrokerError):
    """A page cursor that this list did not give out."""

    code = "page.cursor"
    status = 400
