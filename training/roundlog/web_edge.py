"""The edge that the round log's three servers share: refusals as answers, limits on what is read."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import structlog
from aiohttp import web
from pydantic import BaseModel, ValidationError

from training.roundlog.errors import Reason, Refusal

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Document = TypeVar("Document", bound=BaseModel)
_NUMBER_DIGITS_MAX: Final = 18

log: Final = structlog.get_logger(__name__)


@web.middleware
async def refusals(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer a refusal with its code, a document of the wrong form with `malformed`."""
    try:
        return await handler(request)
    except Refusal as refusal:
        return _refused(refusal)
    except ValidationError as error:
        return _refused(
            Refusal(Reason.MALFORMED, f"the document is not of the agreed form: {error.errors()[0]['msg']}")
        )
    except TimeoutError:
        answer = _refused(Refusal(Reason.BUSY, "the body did not arrive in time; send it again"))
        # What is left of the body is not read: the connection ends with this answer.
        answer.force_close()
        return answer
    except web.HTTPRequestEntityTooLarge:
        answer = _refused(Refusal(Reason.TOO_LARGE, "the body exceeds the limit of this address"))
        answer.force_close()
        return answer


async def json_body(request: web.Request, kind: type[Document], wait_s: float) -> Document:
    """Return the body as a document, read within `wait_s` seconds and the application's size limit."""
    async with asyncio.timeout(wait_s):
        body = await request.read()
    return kind.model_validate_json(body)


def json_answer(document: BaseModel) -> web.Response:
    """Return `document` as an answer."""
    return web.Response(body=document.model_dump_json().encode(), content_type="application/json")


def number(request: web.Request, name: str) -> int:
    """Return a whole number from the query, 0 where it is left out. Raises Refusal."""
    text = request.query.get(name, "0")
    if not (text.isascii() and text.isdigit() and len(text) <= _NUMBER_DIGITS_MAX):
        raise Refusal(Reason.MALFORMED, f"{name} must be a whole number, not below 0")
    return int(text)


def seconds(request: web.Request, name: str, longest_s: float) -> float:
    """Return a wait from the query, cut to `longest_s`. Raises Refusal."""
    try:
        value = float(request.query.get(name, "0"))
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise Refusal(Reason.MALFORMED, f"{name} must be seconds, not below 0")
    return min(value, longest_s)


def _refused(refusal: Refusal) -> web.Response:
    return web.Response(
        status=refusal.http_status,
        body=refusal.answer().model_dump_json().encode(),
        content_type="application/json",
    )
