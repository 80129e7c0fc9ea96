"""Invitations: a one-time token for one named site, handed over inside a join string.

The token works once, for a quarter of an hour, for its site alone; the broker keeps its hash. The
join string also pins the market's certificate authority, so the first request already goes to the
right broker.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from typing import Final
from urllib.parse import urlsplit

from sqlalchemy.orm import Session

from broker.database.tables import JoinToken, Site
from broker.errors import ConflictError, RefusedError
from broker.identity.errors import JoinTokenError
from broker.market import Market
from broker.transitions import SiteState, record_event
from sites.identity import JoinString, encode_join_string

LIFE_S: Final = 15 * 60
# The same pattern as `training.spec.SiteId`.
_SITE_ID: Final = re.compile(r"[a-z][a-z0-9-]{0,30}")


class SiteNameError(RefusedError):
    """A name that no site can have."""

    code = "site.name"


def invite_site(market: Market, site_id: str, *, actor: str | None = None) -> str:
    """Return a join string for `site_id`, new or joining again. Raises ConflictError for a removed one."""
    if not _SITE_ID.fullmatch(site_id):
        raise SiteNameError("a site's name has up to 31 lower-case letters, digits and dashes, a letter first")
    token = secrets.token_hex(32)
    now_ms = market.clock.now_ms()
    digest = _digest(market, token)

    def work(session: Session) -> None:
        site = session.get(Site, site_id)
        if site is not None and site.state == SiteState.REMOVED:
            raise ConflictError(f"site {site_id} was removed for good; invite it under another name")
        session.add(
            JoinToken(token_digest=digest, site_id=site_id, created_ms=now_ms, expires_ms=now_ms + LIFE_S * 1000)
        )
        # Not of kind "site": the site has no state until it joins.
        record_event(session, "invitation", now_ms=now_ms, after="made", site_id=site_id, actor=actor)

    market.database.write("invite", work)
    url = market.settings.public_url
    ca_pem = "" if urlsplit(url).scheme == "http" else market.authority.ca_pem
    return encode_join_string(JoinString(url=url, site_id=site_id, token=token, ca_pem=ca_pem))


def find_join_token(session: Session, market: Market, site_id: str, token: str) -> JoinToken:
    """Return the invitation of `site_id` that `token` belongs to, used or not.

    Raises JoinTokenError, the same whatever is wrong: a stranger learns nothing.
    """
    row = session.get(JoinToken, _digest(market, token))
    if row is None or row.site_id != site_id or row.expires_ms <= market.clock.now_ms():
        raise JoinTokenError("this invitation is unknown, used, too old or another site's; ask the admin for a new one")
    return row


def _digest(market: Market, token: str) -> str:
    return hmac.digest(market.authority.derive_key("joins"), token.encode(), hashlib.sha256).hex()
