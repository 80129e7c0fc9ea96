"""What admins do with accounts and tokens after they have made them, and what they read of a site's earnings."""

from __future__ import annotations

import pytest

from broker.errors import BrokerError
from broker.identity.passwords import open_session, read_session, verify_login
from tests.broker.api.conftest import World, code_of

FIRST, SECOND = "a password of ada's", "another one of ada's"


def test_a_tenants_tokens_are_listed_without_their_secrets_and_can_be_revoked(world: World) -> None:
    made = world.post("/v1/admin/tenants/acme/tokens", "admin", {"label": "nightly runs"}).get_json()
    listed = world.call("GET", "/v1/admin/tenants/acme/tokens", "admin")
    assert made["token"].split("_")[3] not in listed.text
    (row,) = (row for row in listed.get_json()["items"] if row["label"] == "nightly runs")
    assert (row["token_id"], row["revoked_ms"]) == (made["token_id"], None)
    assert made["token_id"] not in world.call("GET", "/v1/admin/tenants/rival/tokens", "admin").text
    assert world.post(f"/v1/admin/tokens/{row['token_id']}/revoke", "admin", {}).status_code == 200
    after = world.call("GET", "/v1/admin/tenants/acme/tokens", "admin").get_json()["items"]
    assert [row["revoked_ms"] is not None for row in after if row["label"] == "nightly runs"] == [True]


def test_a_new_password_and_a_closed_account_keep_a_person_out(world: World) -> None:
    terms = {"login": "ada", "password": FIRST, "role": "tenant", "tenant_id": "acme"}
    assert world.post("/v1/admin/users", "admin", terms).status_code == 201
    cookie = open_session(world.market, verify_login(world.market, "ada", FIRST))
    assert world.post("/v1/admin/users/ada/password", "admin", {"password": SECOND}).status_code == 200
    with pytest.raises(BrokerError):
        verify_login(world.market, "ada", FIRST)
    with pytest.raises(BrokerError):
        read_session(world.market, cookie)
    verify_login(world.market, "ada", SECOND)
    assert world.post("/v1/admin/users/ada/close", "admin", {}).status_code == 200
    with pytest.raises(BrokerError):
        verify_login(world.market, "ada", SECOND)


def test_an_account_that_is_not_there_is_told_as_such(world: World) -> None:
    for path, body in (("password", {"password": SECOND}), ("close", {})):
        answer = world.post(f"/v1/admin/users/nobody/{path}", "admin", body)
        assert (answer.status_code, code_of(answer)) == (404, "request.not_found")
    short = world.post("/v1/admin/users/nobody/password", "admin", {"password": "short"})
    assert (short.status_code, code_of(short)) == (422, "login.password")


def test_a_sites_statement_is_the_admins_to_read(trading: World) -> None:
    statement = trading.call("GET", "/v1/admin/sites/lyon/statement", "admin").get_json()
    assert statement == {"site_id": "lyon", "lines": [], "earned_micros": 0, "balance_micros": 0, "next_cursor": None}
    missing = trading.call("GET", "/v1/admin/sites/oslo/statement", "admin")
    assert (missing.status_code, code_of(missing)) == (404, "request.not_found")
