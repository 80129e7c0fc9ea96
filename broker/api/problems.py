"""One error shape for every answer: RFC 9457 problem+json with a stable `code`.

    {"type", "title", "status", "detail", "code", "errors": [{"pointer", "message"}], "request_id"}

A fault of the broker's own says nothing but its request id; the log has the rest.
"""

from __future__ import annotations

import traceback
from http import HTTPStatus
from typing import Final

import structlog
from flask import Flask, Response, json, request
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json
from werkzeug.exceptions import HTTPException
from werkzeug.sansio.response import Response as WerkzeugResponse

from broker.api.context import the_request_id
from broker.api.errors import (
    FieldError,
    HttpError,
    InvalidRequestError,
    MalformedRequestError,
    MediaTypeError,
    MethodError,
    RangeError,
    RouteError,
    TooLargeError,
    TooManyRequestsError,
)
from broker.errors import BrokerError, BusyError, CredentialError
from broker.process_logs import redacted

PROBLEM_TYPE: Final = "application/problem+json"
FIELD_ERRORS_MAX: Final = 50
_RETRY_AFTER_S: Final = "2"
# jiter, pydantic's reader, refuses deeper nesting by itself at about 200; nothing here needs 32.
_DEPTH_MAX: Final = 32
_BY_STATUS: Final[dict[int, type[BrokerError]]] = {
    404: RouteError,
    405: MethodError,
    413: TooLargeError,
    415: MediaTypeError,
    416: RangeError,
}
_log = structlog.get_logger(__name__)


class FieldProblem(BaseModel):
    """One fault in a request: `pointer` is a JSON pointer into the body, or names a parameter."""

    pointer: str
    message: str


class Problem(BaseModel):
    """Why a request was refused. `code` is stable and listed in the API's chapter."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    errors: list[FieldProblem]
    request_id: str


def register(app: Flask) -> None:
    """Answer every error of `app` in the one shape."""
    app.register_error_handler(BrokerError, _answer_refusal)
    app.register_error_handler(ValidationError, _answer_invalid)
    app.register_error_handler(HTTPException, _answer_http)
    app.register_error_handler(Exception, _answer_fault)


def problem(error: BrokerError) -> Response:
    """Return the answer that carries `error`."""
    errors = error.errors if isinstance(error, InvalidRequestError) else []
    document = Problem(
        type=f"urn:hansa:problem:{error.code}",
        title=HTTPStatus(error.status).phrase,
        status=error.status,
        detail=str(error),
        code=error.code,
        errors=[FieldProblem(pointer=fault.pointer, message=fault.message) for fault in errors],
        request_id=the_request_id(),
    )
    response = Response(document.model_dump_json(), status=error.status, content_type=PROBLEM_TYPE)
    if isinstance(error, CredentialError):
        response.headers["WWW-Authenticate"] = 'Bearer realm="hansa"'
    if isinstance(error, BusyError):
        response.headers["Retry-After"] = _RETRY_AFTER_S
    if isinstance(error, TooManyRequestsError):
        response.headers["Retry-After"] = str(error.retry_after_s)
    return response


def invalid(error: ValidationError) -> InvalidRequestError:
    """Return what pydantic found, each fault with its pointer and without the value that was sent."""
    faults = [_fault(details) for details in error.errors(include_url=False, include_input=False)[:FIELD_ERRORS_MAX]]
    first = faults[0]
    return InvalidRequestError(
        f"{error.error_count()} field(s) cannot be taken, the first one {first.pointer or 'the whole'}: {first.message}",
        faults,
    )


def answer_invalid(error: ValidationError) -> Response:
    """Return the answer to a request whose fields are wrong."""
    return problem(invalid(error))


def read_json(body: bytes) -> object:
    """Return the JSON value in `body`. Raises MalformedRequestError for anything that is not plain JSON.

    Stricter than most readers: no NaN, no number beyond double precision, no lone surrogate, no NUL
    (which PostgreSQL cannot hold) and no nesting that would exhaust a stack.
    """
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise MalformedRequestError(f"the body is not JSON: {str(error)[:200]}") from None
    _check_plain(value)
    return value


class StrictJson:
    """For Flask's Request: JSON bodies are read by `read_json`, and only where they say that they are JSON."""

    def get_json(self, force: bool = False, silent: bool = False, cache: bool = True) -> object:  # noqa: ARG002, FBT001, FBT002  Flask's own signature
        """Return the object in the body; MediaTypeError or MalformedRequestError where there is none."""
        if request.mimetype != "application/json":
            raise MediaTypeError("send the body as JSON, with Content-Type: application/json")
        value = read_json(request.get_data())
        if not isinstance(value, dict):
            raise InvalidRequestError(
                "the body must be a JSON object", [FieldError("", "must be an object, not a list or a plain value")]
            )
        return value


def _check_plain(document: object) -> None:
    waiting: list[tuple[object, int]] = [(document, 0)]
    while waiting:
        value, depth = waiting.pop()
        if depth > _DEPTH_MAX:
            raise MalformedRequestError(f"the body is nested deeper than {_DEPTH_MAX} levels")
        if isinstance(value, str) and "\0" in value:
            raise MalformedRequestError("the body holds a NUL character; leave it out")
        if isinstance(value, float) and value in (float("inf"), float("-inf")):
            raise MalformedRequestError("the body holds a number beyond double precision")
        if isinstance(value, dict):
            waiting += [(part, depth + 1) for pair in value.items() for part in pair]
        elif isinstance(value, list):
            waiting += [(part, depth + 1) for part in value]


def _fault(details: ErrorDetails) -> FieldError:
    parts = [str(part).replace("~", "~0").replace("/", "~1") for part in details["loc"]]
    pointer = "".join(f"/{part}" for part in parts)
    return FieldError(pointer[:300], details["msg"].removeprefix("Value error, ")[:500])


def _answer_refusal(error: BrokerError) -> Response:
    if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR and not isinstance(error, BusyError):
        return _answer_fault(error)
    return problem(error)


def _answer_invalid(error: ValidationError) -> Response:
    # Reached only by a document of our own that does not validate: what clients send is checked at the edge.
    return _answer_fault(error)


def _answer_http(error: HTTPException) -> Response | WerkzeugResponse:
    status = error.code or HTTPStatus.INTERNAL_SERVER_ERROR
    if error.response is not None or status < HTTPStatus.BAD_REQUEST:
        return error.get_response(request.environ)
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return _answer_fault(error)
    kind = _BY_STATUS.get(status, HttpError)
    response = problem(kind(error.description or HTTPStatus(status).phrase))
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        response.headers["Allow"] = ", ".join(sorted(getattr(error, "valid_methods", None) or ()))
    return response


def _answer_fault(error: Exception) -> Response:
    # Formatted here, without the frames' variables: those hold tokens and passwords.
    trace = redacted("".join(traceback.format_exception(error)))
    _log.error("request.fault", request_id=the_request_id(), path=request.path, trace=trace)
    return problem(BrokerError(f"the broker has a fault of its own; tell its admin the request id {the_request_id()}"))


def json_answer(document: BaseModel | dict[str, object], status: int = HTTPStatus.OK) -> Response:
    """Return `document` as the JSON body of an answer."""
    text = document.model_dump_json() if isinstance(document, BaseModel) else json.dumps(document)
    return Response(text, status=status, content_type="application/json")
