"""People: accounts with argon2id passwords, and the browser sessions that a sign-in opens.

A session's cookie is a 256-bit secret; the broker keeps its hash. Signing out, a disabled account
and a changed password end sessions at once because every request looks them up.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import secrets
from typing import Final

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from broker.database.tables import BrowserSession, Site, Tenant, User
from broker.errors import ConflictError, NotFoundError, RefusedError
from broker.identity.errors import (
    ExpiredCredentialError,
    LoginError,
    MissingCredentialError,
    PasswordError,
    RevokedCredentialError,
)
from broker.market import Market
from broker.transitions import SiteState, record_event

PASSWORD_LENGTH_MIN: Final = 12
PASSWORD_LENGTH_MAX: Final = 256
SESSION_LIFE_S: Final = 12 * 3600
_COOKIE_LENGTH: Final = 64

# RFC 9106, second recommended option (64 MiB, 3 passes), on one lane: a broker has few cores.
_hasher = PasswordHasher(time_cost=3, memory_cost=64 * 1024, parallelism=1)
# Verified in place of an unknown user's, so that time does not tell which names exist.
_NOBODY: Final = _hasher.hash(secrets.token_hex(16))


class Role(enum.StrEnum):
    """What a person is to the market."""

    TENANT = "tenant"
    OPERATOR = "operator"
    ADMIN = "admin"


class UserTermsError(RefusedError):
    """An account asked for with a role and a tenant or site that do not fit."""

    code = "user.terms"


def create_user(
    market: Market,
    login: str,
    password: str,
    role: Role,
    tenant_id: str | None = None,
    *,
    site_id: str | None = None,
    actor: str | None = None,
) -> User:
    """Make an account; `actor` goes on record.

    Raises PasswordError, ConflictError where the name is taken, UserTermsError, NotFoundError for a tenant or site
    that is not there.
    """
    if (role is Role.TENANT) != (tenant_id is not None) or (role is Role.OPERATOR) != (site_id is not None):
        raise UserTermsError(
            "a person with the role tenant belongs to a tenant, one with the role operator to a site; admins to none"
        )
    row = User(
        user_id=market.ids.new("user"),
        login=login,
        password_hash=_hashed(password),
        role=role,
        tenant_id=tenant_id,
        site_id=site_id,
        created_ms=market.clock.now_ms(),
    )

    def work(session: Session) -> User:
        if session.scalar(select(User).where(User.login == login)) is not None:
            raise ConflictError(f"the name {login!r} is taken; choose another")
        if tenant_id is not None and session.get(Tenant, tenant_id) is None:
            raise NotFoundError(f"there is no tenant {tenant_id!r}; create it first")
        site = None if site_id is None else session.get(Site, site_id)
        if site_id is not None and (site is None or site.state == SiteState.REMOVED):
            raise NotFoundError(f"there is no site {site_id!r}; invite it, and let it join, first")
        user = session.merge(row)
        record_event(
            session,
            "user",
            now_ms=row.created_ms,
            after="created",
            tenant_id=tenant_id,
            site_id=site_id,
            detail=login,
            actor=actor,
        )
        return user

    return market.database.write("create user", work)


def verify_login(market: Market, login: str, password: str) -> User:
    """Return the account of `login`. Raises LoginError, the same for a wrong name and a wrong password."""
    user = market.database.read(lambda session: session.scalar(select(User).where(User.login == login)))
    matches = _verifies(user.password_hash if user else _NOBODY, password)
    if user is None or not matches or user.disabled_ms is not None:
        raise LoginError("this name and password do not belong together")
    return user


def change_password(market: Market, login: str, password: str, *, actor: str | None = None) -> None:
    """Set a new password and end all of the person's sessions. Raises NotFoundError, PasswordError."""
    hashed = _hashed(password)

    def work(session: Session) -> None:
        user = _account(session, login)
        user.password_hash = hashed
        session.execute(delete(BrowserSession).where(BrowserSession.user_id == user.user_id))
        record_event(session, "user", now_ms=market.clock.now_ms(), after="password", detail=user.login, actor=actor)

    market.database.write("change password", work)


def disable_user(market: Market, login: str, *, actor: str | None = None) -> None:
    """Close an account for good; its sessions end with the next request. Raises NotFoundError."""

    def work(session: Session) -> None:
        user = _account(session, login)
        user.disabled_ms = user.disabled_ms or market.clock.now_ms()
        record_event(session, "user", now_ms=market.clock.now_ms(), after="disabled", detail=user.login, actor=actor)

    market.database.write("disable user", work)


def _account(session: Session, login: str) -> User:
    user = session.scalar(select(User).where(User.login == login))
    if user is None:
        raise NotFoundError(f"there is no account {login!r}")
    return user


def open_session(market: Market, user: User) -> str:
    """Open a browser session and return its cookie's value."""
    cookie = secrets.token_hex(_COOKIE_LENGTH // 2)
    now_ms = market.clock.now_ms()
    row = BrowserSession(
        session_digest=_cookie_digest(market, cookie),
        user_id=user.user_id,
        created_ms=now_ms,
        expires_ms=now_ms + SESSION_LIFE_S * 1000,
    )
    market.database.write("sign in", lambda session: session.merge(row))
    return cookie


def read_session(market: Market, cookie: str) -> User:
    """Return who is signed in with `cookie`. Raises a CredentialError that says why nobody is."""
    digest = _cookie_digest(market, cookie[:_COOKIE_LENGTH])

    def work(session: Session) -> tuple[BrowserSession | None, User | None]:
        held = session.get(BrowserSession, digest)
        return held, None if held is None else session.get(User, held.user_id)

    held, user = market.database.read(work)
    if held is None or user is None:
        raise MissingCredentialError("nobody is signed in; sign in and try again")
    if held.expires_ms <= market.clock.now_ms():
        raise ExpiredCredentialError("this session is over; sign in again")
    if user.disabled_ms is not None:
        raise RevokedCredentialError("this account is closed; ask the market's admin")
    return user


def close_session(market: Market, cookie: str) -> None:
    """Sign out; a session that is not there is no fault."""
    digest = _cookie_digest(market, cookie[:_COOKIE_LENGTH])
    market.database.write(
        "sign out",
        lambda session: session.execute(delete(BrowserSession).where(BrowserSession.session_digest == digest)),
    )


def form_token(market: Market, cookie: str) -> str:
    """Return the token that a session's forms must carry against forged requests (CSRF)."""
    return hmac.digest(market.authority.derive_key("forms"), cookie.encode(), hashlib.sha256).hex()


def _hashed(password: str) -> str:
    if not PASSWORD_LENGTH_MIN <= len(password) <= PASSWORD_LENGTH_MAX:
        raise PasswordError(f"a password has {PASSWORD_LENGTH_MIN} to {PASSWORD_LENGTH_MAX} characters")
    return _hasher.hash(password)


def _verifies(hashed: str, password: str) -> bool:
    try:
        return _hasher.verify(hashed, password[:PASSWORD_LENGTH_MAX])
    except (VerificationError, InvalidHashError):
        return False


def _cookie_digest(market: Market, cookie: str) -> str:
    return hmac.digest(market.authority.derive_key("sessions"), cookie.encode(), hashlib.sha256).hex()
