"""A tenant's own tokens: seen without their secrets, made only narrower, revoked by whoever may."""

from __future__ import annotations

import pytest

from broker.identity.tokens import Scope, TokenKind, create_token
from tests.broker.api.conftest import World, code_of

DAY_S = 86_400


def test_a_tenant_sees_its_own_tokens_with_their_use_and_never_a_secret(world: World) -> None:
    listed = world.call("GET", "/v1/tokens", "acme")
    assert listed.status_code == 200, listed.text
    document = listed.get_json()
    (row,) = document["items"]
    assert row["token_id"] == document["own"]
    assert row["scopes"] == ["jobs:read", "jobs:write", "ledger:read", "tokens:write"]
    assert row["last_used_ms"] == world.clock.now_ms()
    assert row["expires_ms"] > row["created_ms"]
    for who in ("acme", "rival", "admin"):
        assert world.tokens[who].split("_")[3] not in listed.text
    assert world.call("GET", "/v1/tokens", "rival").get_json()["items"][0]["token_id"] != row["token_id"]


def test_a_token_made_of_another_does_what_it_says_and_no_more(world: World) -> None:
    terms = {"scopes": ["jobs:read"], "life_s": DAY_S, "label": "dashboard"}
    answer = world.post("/v1/tokens", "acme", terms)
    assert answer.status_code == 201, answer.text
    made = answer.get_json()
    assert made["expires_ms"] == world.clock.now_ms() + DAY_S * 1000
    world.tokens["narrow"] = made["token"]
    assert world.call("GET", "/v1/jobs", "narrow").status_code == 200
    assert code_of(world.call("GET", "/v1/account", "narrow")) == "credential.scope"
    for path in ("/v1/tokens", f"/v1/tokens/{'0' * 16}/revoke"):
        assert code_of(world.post(path, "narrow", {})) == "credential.scope"
    world.clock.advance_s(DAY_S)
    assert code_of(world.call("GET", "/v1/jobs", "narrow")) == "credential.expired"


@pytest.mark.parametrize(
    ("terms", "says"),
    [
        ({"scopes": ["ledger:read"]}, "lacks the scope ledger:read"),
        ({"scopes": ["admin"]}, "cannot have the scope admin"),
        ({"life_s": DAY_S + 1}, "cannot outlive"),
    ],
)
def test_no_token_makes_a_better_one_of_itself(world: World, terms: dict[str, object], says: str) -> None:
    scopes = frozenset({Scope.JOBS_READ, Scope.TOKENS_WRITE})
    made = create_token(world.market, TokenKind.TENANT, tenant_id="acme", scopes=scopes, life_s=DAY_S)
    world.tokens["narrow"] = made.text
    refused = world.post("/v1/tokens", "narrow", terms)
    assert (refused.status_code, code_of(refused)) == (422, "token.terms")
    assert says in refused.get_json()["detail"]
    like = world.post("/v1/tokens", "narrow", {}).get_json()  # without terms: as its maker
    assert (like["scopes"], like["expires_ms"]) == (sorted(scopes), made.expires_ms)


def test_a_tenant_revokes_its_own_tokens_and_no_others(world: World) -> None:
    made = world.post("/v1/tokens", "acme", {"label": "leaked"}).get_json()
    world.tokens["leaked"] = made["token"]
    path = f"/v1/tokens/{made['token_id']}/revoke"
    refused = world.post(path, "rival", {})
    assert (refused.status_code, code_of(refused)) == (404, "request.not_found")
    assert world.call("GET", "/v1/jobs", "leaked").status_code == 200
    assert world.post(path, "acme", {}).status_code == 200
    assert code_of(world.call("GET", "/v1/jobs", "leaked")) == "credential.revoked"
    (row,) = (row for row in world.call("GET", "/v1/tokens", "acme").get_json()["items"] if row["label"] == "leaked")
    assert row["revoked_ms"] == world.clock.now_ms()


def test_accounts_are_listed_for_admins_alone(world: World) -> None:
    terms = {"login": "ada", "password": "a password of ada's", "role": "tenant", "tenant_id": "acme"}
    assert world.post("/v1/admin/users", "admin", terms).status_code == 201
    listed = world.call("GET", "/v1/admin/users", "admin")
    (row,) = listed.get_json()["items"]
    assert (row["login"], row["role"], row["tenant_id"], row["closed_ms"]) == ("ada", "tenant", "acme", None)
    assert "argon2" not in listed.text
    assert world.call("GET", "/v1/admin/users", "acme").status_code == 403
