"""API tokens: `hansa_KIND_PUBLICID_SECRET`, shown once; the broker keeps a keyed hash of the secret.

The prefix makes a leaked token findable by scanners, the public id makes it nameable in a list. A
fast hash is enough because the secret has 256 bits; the pepper, which is not in the database, makes
a stolen table useless for forging.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from typing import Final

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from broker.database.tables import Tenant, Token
from broker.errors import NotFoundError, RefusedError
from broker.identity.errors import (
    ExpiredCredentialError,
    MalformedCredentialError,
    RevokedCredentialError,
    UnknownCredentialError,
)
from broker.market import Market
from broker.transitions import record_event

LIFE_S_MAX: Final = 366 * 86_400
LABEL_LENGTH_MAX: Final = 200
TOKENS_LISTED_MAX: Final = 500
# `last_used_ms` is for people who tidy up: once an hour is often enough, and a read stays a read.
LAST_USED_STEP_MS: Final = 3600 * 1000
TOKEN: Final = re.compile(r"hansa_(tenant|admin)_([0-9a-f]{16})_([0-9a-f]{64})")


class TokenKind(enum.StrEnum):
    """Whose token it is."""

    TENANT = "tenant"
    ADMIN = "admin"


class Scope(enum.StrEnum):
    """What a token may be used for. `admin` includes the other scopes of an admin's token."""

    JOBS_READ = "jobs:read"
    JOBS_WRITE = "jobs:write"
    LEDGER_READ = "ledger:read"
    TOKENS_WRITE = "tokens:write"
    SITES_ADMIN = "sites:admin"
    ADMIN = "admin"


TENANT_SCOPES: Final = frozenset({Scope.JOBS_READ, Scope.JOBS_WRITE, Scope.LEDGER_READ, Scope.TOKENS_WRITE})
ADMIN_SCOPES: Final = frozenset({Scope.JOBS_READ, Scope.LEDGER_READ, Scope.SITES_ADMIN, Scope.ADMIN})


class TokenTermsError(RefusedError):
    """A token asked for with terms that none may have."""

    code = "token.terms"


@dataclass(frozen=True, slots=True)
class Principal:
    """The bearer of a valid token."""

    token_id: str
    kind: TokenKind
    tenant_id: str | None
    scopes: frozenset[Scope]
    expires_ms: int

    def may(self, scope: Scope) -> bool:
        """Say whether the token covers `scope`."""
        return scope in self.scopes or Scope.ADMIN in self.scopes


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token just made. `text` is shown to its owner once and kept nowhere."""

    token_id: str
    text: str
    scopes: tuple[str, ...]
    expires_ms: int


def create_token(
    market: Market,
    kind: TokenKind,
    *,
    life_s: int | None = None,
    tenant_id: str | None = None,
    scopes: frozenset[Scope] | None = None,
    label: str = "",
    maker: Principal | None = None,
) -> NewToken:
    """Make a token; one made with the token `maker` can do no more and lives no longer than that.

    Raises TokenTermsError for a life or scope that it cannot have.
    """
    allowed = TENANT_SCOPES if kind is TokenKind.TENANT else ADMIN_SCOPES
    granted = allowed if scopes is None else scopes
    now_ms = market.clock.now_ms()
    if life_s is None:
        assert maker is not None, "a token has a life of its own or its maker's"
        life_s = (maker.expires_ms - now_ms) // 1000
    _check_terms(kind, tenant_id, granted - allowed, life_s)
    if maker is not None:
        _check_within(maker, granted, now_ms + life_s * 1000)
    public_id, secret = secrets.token_hex(8), secrets.token_hex(32)
    row = Token(
        token_id=public_id,
        kind=kind,
        tenant_id=tenant_id,
        secret_digest=_digest(market, secret),
        scopes=" ".join(sorted(granted)),
        label=label[:LABEL_LENGTH_MAX],
        created_ms=now_ms,
        expires_ms=now_ms + life_s * 1000,
    )

    def work(session: Session) -> None:
        if tenant_id is not None and session.get(Tenant, tenant_id) is None:
            raise NotFoundError(f"there is no tenant {tenant_id!r}; create it first")
        session.merge(row)
        record_event(
            session, "token", now_ms=now_ms, after="created", tenant_id=tenant_id, detail=f"{kind} token {public_id}"
        )

    market.database.write("create token", work)
    return NewToken(public_id, f"hansa_{kind}_{public_id}_{secret}", tuple(sorted(granted)), row.expires_ms)


def verify_token(market: Market, text: str) -> Principal:
    """Return who bears the token `text`.

    Raises a CredentialError that says why not; an unknown id and a wrong secret look alike.
    """
    parts = TOKEN.fullmatch(text)
    if parts is None:
        raise MalformedCredentialError(
            "this is not a token of this market; it starts with hansa_tenant_ or hansa_admin_"
        )
    kind, public_id, secret = parts.groups()
    row = market.database.read(lambda session: session.get(Token, public_id))
    digest = _digest(market, secret)
    # Compared also where there is no row, so that time tells nothing about which ids exist.
    matches = hmac.compare_digest(row.secret_digest if row is not None else "0" * 64, digest)
    if row is None or not matches or row.kind != kind:
        raise UnknownCredentialError("this token is not known here; check that it was copied whole")
    now_ms = market.clock.now_ms()
    if row.revoked_ms is not None:
        raise RevokedCredentialError("this token was revoked; ask for a new one")
    if row.expires_ms <= now_ms:
        raise ExpiredCredentialError("this token has expired; ask for a new one")
    if row.last_used_ms is None or now_ms - row.last_used_ms >= LAST_USED_STEP_MS:
        _note_use(market, public_id, now_ms)
    scopes = frozenset(Scope(word) for word in row.scopes.split())
    return Principal(public_id, TokenKind(row.kind), row.tenant_id, scopes, row.expires_ms)


def revoke_token(market: Market, token_id: str, tenant_id: str | None = None) -> None:
    """Revoke a token, of `tenant_id` only if that is given. Raises NotFoundError; revoking twice is no fault."""
    now_ms = market.clock.now_ms()

    def work(session: Session) -> None:
        row = session.get(Token, token_id)
        if row is None or (tenant_id is not None and row.tenant_id != tenant_id):
            raise NotFoundError(f"there is no token {token_id!r}")
        if row.revoked_ms is None:
            row.revoked_ms = now_ms
            record_event(
                session, "token", now_ms=now_ms, after="revoked", tenant_id=row.tenant_id, detail=f"token {token_id}"
            )

    market.database.write("revoke token", work)


def tokens_of(session: Session, tenant_id: str | None) -> list[Token]:
    """Return the newest tokens of a tenant, or of the admins for None, revoked and expired ones too."""
    newest = select(Token).where(Token.tenant_id == tenant_id).order_by(Token.created_ms.desc(), Token.token_id)
    return list(session.scalars(newest.limit(TOKENS_LISTED_MAX)))


def _check_terms(kind: TokenKind, tenant_id: str | None, excess: frozenset[Scope], life_s: int) -> None:
    if not 1 <= life_s <= LIFE_S_MAX:
        raise TokenTermsError(f"a token lives 1 to {LIFE_S_MAX} seconds; renew it before its time is over")
    if excess:
        raise TokenTermsError(f"a {kind} token cannot have the scope {', '.join(sorted(excess))}")
    if (kind is TokenKind.TENANT) != (tenant_id is not None):
        raise TokenTermsError("a tenant token names its tenant, an admin token names none")


def _check_within(maker: Principal, granted: frozenset[Scope], expires_ms: int) -> None:
    # Else whoever finds a narrow or short-lived token could make a better one of it.
    if granted - maker.scopes:
        excess = ", ".join(sorted(granted - maker.scopes))
        raise TokenTermsError(f"your own token lacks the scope {excess}; ask for no more than it has")
    if expires_ms > maker.expires_ms:
        raise TokenTermsError("a token cannot outlive the one that makes it; ask for a shorter life")


def _note_use(market: Market, token_id: str, now_ms: int) -> None:
    market.database.write(
        "token used",
        lambda session: session.execute(update(Token).where(Token.token_id == token_id).values(last_used_ms=now_ms)),
    )


def _digest(market: Market, secret: str) -> str:
    return hmac.digest(market.authority.derive_key("tokens"), secret.encode(), hashlib.sha256).hex()
