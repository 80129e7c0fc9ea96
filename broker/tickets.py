"""Tickets for the streams of the wake process: a keyed digest of what the stream is about.

Apart from `broker.wake`, so that the API can give tickets out without loading its server.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

TICKET_PURPOSE: Final = "wake"


def ticket(key: bytes, kind: str, name: str) -> str:
    """Return the ticket that opens the stream of one site or job."""
    return hmac.new(key, f"wake/{kind}/{name}".encode(), hashlib.sha256).hexdigest()[:32]
