"""Idempotency keys: a POST that creates or spends may be sent again without doing it twice.

The key is kept in the transaction of the effect, with a digest of the request and the answer. The
same key with the same request gets the same answer; with another request, a conflict. A refused
request has no effect, so it leaves no key behind and may be corrected under the same one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from flask import Response, request
from pydantic import BaseModel, Field
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from broker.api.errors import IdempotencyConflictError, IdempotencyKeyMissingError
from broker.database.idempotency import IdempotencyKey
from broker.errors import BrokerError
from broker.market import Market

HEADER: Final = "Idempotency-Key"
REPLAYED_HEADER: Final = "Idempotency-Replayed"
_KEY: Final = re.compile(r"[\x21-\x7e]{1,200}")


class IdempotencyHeader(BaseModel):
    """The key that makes a retry safe."""

    idempotency_key: str | None = Field(default=None, alias=HEADER, max_length=200)


class _AnsweredError(Exception):
    """Inside the write transaction: another request with this key was faster."""


@dataclass(frozen=True, slots=True)
class Once:
    """The idempotency key of one request."""

    market: Market
    owner: str
    key: str
    request_digest: str

    def record(self, session: Session, status: int, body: str) -> None:
        """Keep the answer, in the transaction of the effect."""
        if session.get(IdempotencyKey, (self.owner, self.key)) is not None:
            raise _AnsweredError
        session.add(
            IdempotencyKey(
                owner=self.owner,
                key=self.key,
                request_digest=self.request_digest,
                status=status,
                body=body,
                created_ms=self.market.clock.now_ms(),
            )
        )
        session.flush()

    def run(self, effect: Callable[[], Response]) -> Response:
        """Return the answer kept under this key, else that of `effect`, which must call `record`.

        Raises IdempotencyConflictError where the key was used for another request.
        """
        kept = self._kept()
        if kept is not None:
            return kept
        try:
            return effect()
        except (_AnsweredError, IntegrityError, BrokerError):
            # A twin may have been faster, and its effect the very reason of this refusal.
            kept = self._kept()
            if kept is not None:
                return kept
            raise

    def _kept(self) -> Response | None:
        row = self.market.database.read(lambda session: session.get(IdempotencyKey, (self.owner, self.key)))
        if row is None:
            return None
        if row.request_digest != self.request_digest:
            raise IdempotencyConflictError(f"the {HEADER} was used for another request; use a new one for this")
        response = Response(row.body, status=row.status, content_type="application/json")
        response.headers[REPLAYED_HEADER] = "true"
        return response


def once(market: Market, owner: str) -> Once:
    """Return the idempotency key of the current request, kept apart for each `owner`.

    Raises IdempotencyKeyMissingError where there is none, or it has not the form of one.
    """
    key = request.headers.get(HEADER, "")
    if not _KEY.fullmatch(key):
        raise IdempotencyKeyMissingError(
            f"send a header {HEADER} of 1 to 200 visible characters, new for each thing that you want done once"
        )
    body = hashlib.sha256(f"{request.method} {request.path}\0".encode() + request.get_data()).hexdigest()
    return Once(market, owner, key, body)
