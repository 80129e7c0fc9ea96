"""Tokens, passwords, sessions and the replay window: what holds, and why the rest does not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from broker.bootstrap import open_market
from broker.database.tables import BrowserSession, Site, Token, User
from broker.errors import ConflictError, NotFoundError
from broker.identity.errors import (
    ExpiredCredentialError,
    LoginError,
    MalformedCredentialError,
    MissingCredentialError,
    PasswordError,
    ReplayError,
    RevokedCredentialError,
    UnknownCredentialError,
)
from broker.identity.passwords import (
    SESSION_LIFE_S,
    Role,
    UserTermsError,
    change_password,
    close_session,
    create_user,
    disable_user,
    open_session,
    read_session,
    verify_login,
)
from broker.identity.site_requests import _next_window
from broker.identity.tokens import (
    ADMIN_SCOPES,
    LIFE_S_MAX,
    TENANT_SCOPES,
    Scope,
    TokenKind,
    TokenTermsError,
    create_token,
    revoke_token,
    verify_token,
)
from broker.market import Market
from broker.process_logs import CUT, configure_logs, redacted
from broker.settings import Settings
from broker.tenants import create_tenant
from sites.protocol import SEQUENCE_WINDOW
from training.clock import ManualClock

PASSWORD = "correct horse battery"


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def market(tmp_path: Path, clock: ManualClock) -> Iterator[Market]:
    market = open_market(Settings(home=tmp_path), clock=clock)
    create_tenant(market, "acme")
    yield market
    market.database.close()


def _tenant_token(market: Market, life_s: int = 60) -> str:
    return create_token(market, TokenKind.TENANT, tenant_id="acme", life_s=life_s).text


def test_a_token_holds_until_it_expires(market: Market, clock: ManualClock) -> None:
    text = _tenant_token(market)
    principal = verify_token(market, text)
    assert (principal.kind, principal.tenant_id, principal.scopes) == (TokenKind.TENANT, "acme", TENANT_SCOPES)
    clock.advance_s(60)
    with pytest.raises(ExpiredCredentialError):
        verify_token(market, text)


def test_a_revoked_token_is_out_at_once(market: Market) -> None:
    made = create_token(market, TokenKind.ADMIN, life_s=60)
    with pytest.raises(NotFoundError):
        revoke_token(market, made.token_id, tenant_id="acme")
    revoke_token(market, made.token_id)
    revoke_token(market, made.token_id)
    with pytest.raises(RevokedCredentialError):
        verify_token(market, made.text)


@pytest.mark.parametrize("text", ["", "hansa_tenant_x_y", "hansa_root_" + "0" * 16 + "_" + "0" * 64, "x" * 10_000])
def test_what_has_not_the_form_of_a_token_is_not_looked_up(market: Market, text: str) -> None:
    with pytest.raises(MalformedCredentialError):
        verify_token(market, text)


def test_no_part_of_a_token_can_be_changed(market: Market) -> None:
    text = _tenant_token(market)
    for index in (len("hansa_tenant_"), len(text) - 1):
        changed = text[:index] + ("0" if text[index] != "0" else "1") + text[index + 1 :]
        with pytest.raises(UnknownCredentialError):
            verify_token(market, changed)


def test_another_markets_pepper_makes_every_token_unknown(market: Market, tmp_path: Path) -> None:
    text = _tenant_token(market)
    (tmp_path / "keys" / "pepper.hex").write_text("00" * 32)
    reopened = open_market(Settings(home=tmp_path), clock=market.clock)
    with pytest.raises(UnknownCredentialError):
        verify_token(reopened, text)


def test_only_a_hash_of_the_secret_is_kept(market: Market) -> None:
    secret = _tenant_token(market).split("_")[3]
    (row,) = market.database.read(lambda session: session.query(Token).all())
    assert secret not in repr(vars(row))
    assert len(row.secret_digest) == 64


@pytest.mark.parametrize(
    ("kind", "tenant_id", "scopes", "life_s"),
    [
        (TokenKind.TENANT, "acme", {Scope.ADMIN}, 60),
        (TokenKind.ADMIN, None, {Scope.JOBS_WRITE}, 60),
        (TokenKind.TENANT, None, TENANT_SCOPES, 60),
        (TokenKind.ADMIN, "acme", ADMIN_SCOPES, 60),
        (TokenKind.ADMIN, None, ADMIN_SCOPES, 0),
        (TokenKind.ADMIN, None, ADMIN_SCOPES, LIFE_S_MAX + 1),
    ],
)
def test_terms_that_no_token_may_have_are_refused(
    market: Market, kind: TokenKind, tenant_id: str | None, scopes: set[Scope], life_s: int
) -> None:
    with pytest.raises(TokenTermsError):
        create_token(market, kind, tenant_id=tenant_id, scopes=frozenset(scopes), life_s=life_s)


def test_the_last_use_is_noted_once_an_hour(market: Market, clock: ManualClock) -> None:
    text = _tenant_token(market, life_s=10_000)

    def last_used() -> int | None:
        return market.database.read(lambda session: session.query(Token).one().last_used_ms)

    verify_token(market, text)
    first = last_used()
    clock.advance_s(3599)
    verify_token(market, text)
    assert last_used() == first
    clock.advance_s(1)
    verify_token(market, text)
    assert last_used() == clock.now_ms()


def test_a_person_signs_in_and_out(market: Market, clock: ManualClock) -> None:
    user = create_user(market, "eva", PASSWORD, Role.TENANT, "acme")
    cookie = open_session(market, verify_login(market, "eva", PASSWORD))
    assert read_session(market, cookie).user_id == user.user_id
    rows = market.database.read(lambda session: session.query(BrowserSession).all())
    assert cookie not in repr([vars(row) for row in rows])
    close_session(market, cookie)
    with pytest.raises(MissingCredentialError):
        read_session(market, cookie)
    late = open_session(market, user)
    clock.advance_s(SESSION_LIFE_S)
    with pytest.raises(ExpiredCredentialError):
        read_session(market, late)


def test_a_wrong_name_and_a_wrong_password_look_alike(market: Market) -> None:
    create_user(market, "eva", PASSWORD, Role.ADMIN)
    messages = []
    for login, password in (("eva", "wrong password!"), ("adam", PASSWORD), ("eva", "")):
        with pytest.raises(LoginError) as refused:
            verify_login(market, login, password)
        messages.append(str(refused.value))
    assert len(set(messages)) == 1


def test_passwords_are_kept_as_argon2id_only(market: Market) -> None:
    create_user(market, "eva", PASSWORD, Role.ADMIN)
    user = market.database.read(lambda session: session.query(User).one())
    assert user.password_hash.startswith("$argon2id$")
    for short in ("short", "x" * 257):
        with pytest.raises(PasswordError):
            create_user(market, "adam", short, Role.ADMIN)


def test_a_new_password_and_a_closed_account_end_sessions(market: Market) -> None:
    user = create_user(market, "eva", PASSWORD, Role.ADMIN)
    cookie = open_session(market, user)
    change_password(market, user.login, "another long password")
    with pytest.raises(MissingCredentialError):
        read_session(market, cookie)
    cookie = open_session(market, user)
    disable_user(market, user.login)
    with pytest.raises(RevokedCredentialError):
        read_session(market, cookie)
    with pytest.raises(LoginError):
        verify_login(market, "eva", "another long password")


def test_accounts_have_one_name_each_and_a_role_that_fits(market: Market) -> None:
    create_user(market, "eva", PASSWORD, Role.ADMIN)
    with pytest.raises(ConflictError):
        create_user(market, "eva", PASSWORD, Role.ADMIN)
    for role, tenant_id in ((Role.TENANT, None), (Role.ADMIN, "acme")):
        with pytest.raises(UserTermsError):
            create_user(market, "adam", PASSWORD, role, tenant_id)


@given(numbers=st.lists(st.integers(1, 3 * SEQUENCE_WINDOW), max_size=120))
def test_each_sequence_number_is_taken_at_most_once(numbers: list[int]) -> None:
    """Against a model: the set of numbers taken, and the highest of them."""
    site = Site(sequence_max=0, sequence_seen="0")
    taken: set[int] = set()
    for number in numbers:
        highest = max(taken, default=0)
        fresh = number not in taken and number > highest - SEQUENCE_WINDOW
        try:
            site.sequence_max, seen = _next_window(site, number)
            site.sequence_seen = f"{seen:x}"
        except ReplayError:
            assert not fresh, number
            continue
        assert fresh, number
        taken.add(number)
        assert len(site.sequence_seen) <= 64


def test_secrets_are_cut_out_of_every_line(market: Market, capsys: pytest.CaptureFixture[str]) -> None:
    text = _tenant_token(market)
    secret = text.split("_")[3]
    former = structlog.get_config()
    try:
        configure_logs(json_lines=True)
        log = structlog.get_logger("test")
        log.warning("said", header=f"Bearer {text}", password="hunter2 hunter2", inner={"deep": [text]})
        try:
            Path("/nowhere", text).read_text()
        except FileNotFoundError:
            log.exception("failed")
        lines = capsys.readouterr().err
    finally:
        structlog.configure(**former)
    assert secret not in lines
    assert "hunter2" not in lines
    said = json.loads(lines.splitlines()[0])
    assert said["header"] == f"Bearer {CUT}"
    assert "FileNotFoundError" in lines
    assert redacted("hansa-join.abc_-9 rest") == f"{CUT} rest"
