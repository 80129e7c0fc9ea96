"""Pages of a list: a bounded number of rows and an opaque cursor to the next ones.

A cursor says where the page ended (values, not an offset), so rows that come or go between two
pages neither repeat nor vanish. It is signed for its list: a made-up one is refused.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from broker.api.errors import CursorError
from broker.market import Market

PAGE_ROWS_MAX: Final = 200
PAGE_ROWS: Final = 50
CURSOR_LENGTH_MAX: Final = 4000
_TAG_BYTES: Final = 12

Position = list[int | str]


class PageQuery(BaseModel):
    """Which page of a list."""

    model_config = ConfigDict(extra="ignore")

    limit: int = Field(default=PAGE_ROWS, ge=1, le=PAGE_ROWS_MAX)
    cursor: str | None = Field(default=None, max_length=CURSOR_LENGTH_MAX, description="`next_cursor` of the last page")


def encode_cursor(market: Market, listing: str, position: Position) -> str:
    """Return the cursor of `listing` (its name and filters) after `position`."""
    text = json.dumps(position, separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(_tag(market, listing, text) + text).decode().rstrip("=")


def decode_cursor(market: Market, listing: str, cursor: str) -> Position:
    """Return the position in `cursor`. Raises CursorError unless this listing gave it out."""
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    tag, text = raw[:_TAG_BYTES], raw[_TAG_BYTES:]
    if not hmac.compare_digest(tag, _tag(market, listing, text)):
        raise CursorError("this cursor is not of this list; start again without one")
    position: Position = json.loads(text)
    return position


def _tag(market: Market, listing: str, text: bytes) -> bytes:
    return hmac.digest(market.authority.derive_key("cursors"), listing.encode() + b"\0" + text, hashlib.sha256)[
        :_TAG_BYTES
    ]
