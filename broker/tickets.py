"""Tickets for the streams of the wake process: a keyed digest of what the stream is about.

Apart from `broker.wake`, so that the API can give tickets out without loading its server.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

from broker.market import Market

TICKET_PURPOSE: Final = "wake"


def stream_url(market: Market, kind: str, name: str) -> str | None:
    """Return where the stream of one site or job is, with its ticket; None where this market has no wake process."""
    if not market.settings.wake_url:
        return None
    key = market.authority.derive_key(TICKET_PURPOSE)
    return f"{market.settings.wake_url.rstrip('/')}/wake/{kind}/{name}?ticket={ticket(key, kind, name)}"


def ticket(key: bytes, kind: str, name: str) -> str:
    """Return the ticket that opens the stream of one site or job."""
    return hmac.new(key, f"wake/{kind}/{name}".encode(), hashlib.sha256).hexdigest()[:32]
