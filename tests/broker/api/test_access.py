"""Who may call what: every route against every credential, generated from the routes themselves."""

from __future__ import annotations

import io
import json
import re

import pytest
from werkzeug.test import create_environ, run_wsgi_app

from broker.api.auth import OPEN_BLUEPRINTS, TABLE, Who
from broker.identity.tokens import TENANT_SCOPES, Scope, TokenKind, create_token
from tests.broker.api.conftest import World, code_of, open_for_trade, spec

FILLED = {
    "digest": "0" * 64,
    "job_id": "job_aaaaaaaaaaaaaaaaaaaa",
    "name": "log",
    "tenant_id": "acme",
    "token_id": "0" * 16,
    "login": "nobody",
    "site_id": "lyon",
    "lease_id": "lease_a",
    "round_number": "1",
    "epoch": "1",
}
ROWS = sorted(TABLE.items())
IDS = [f"{method} {rule}" for (method, rule), _ in ROWS]


def _path(rule: str) -> str:
    return re.sub(r"<(?:\w+:)?(\w+)>", lambda part: FILLED[part[1]], rule)


def test_every_route_has_a_row_and_every_row_a_route(world: World) -> None:
    routes = {
        (method, rule.rule)
        for rule in world.app.url_map.iter_rules()
        if rule.endpoint.split(".")[0] not in OPEN_BLUEPRINTS
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    assert routes == set(TABLE)


def test_a_route_without_a_row_is_closed_even_to_admins(world: World) -> None:
    world.app._got_first_request = False
    world.app.add_url_rule("/v1/forgotten", "forgotten", lambda: "secret")
    answer = world.call("GET", "/v1/forgotten", "admin")
    assert (answer.status_code, code_of(answer)) == (403, "credential.scope")


@pytest.mark.parametrize(("row", "access"), ROWS, ids=IDS)
def test_each_route_takes_its_own_credential_and_no_other(world: World, row: tuple[str, str], access: object) -> None:
    method, rule = row
    access = TABLE[row]
    narrow = {"tenant": TENANT_SCOPES, "admin": frozenset({Scope.JOBS_READ, Scope.LEDGER_READ, Scope.SITES_ADMIN})}
    if access.who in {Who.TENANT, Who.ADMIN}:
        assert access.scope is not None
        scopes = narrow[access.who] - {access.scope}
        tenant_id = "acme" if access.who is Who.TENANT else None
        world.tokens["narrow"] = create_token(
            world.market, TokenKind(access.who), tenant_id=tenant_id, scopes=scopes, life_s=60
        ).text
    world.tokens["garbage"] = "hansa_tenant_zz"
    world.tokens["forged"] = f"hansa_admin_{'0' * 16}_{'0' * 64}"
    expected: dict[str | None, tuple[int, str]] = {
        "garbage": (401, "credential.malformed"),
        "forged": (401, "credential.unknown"),
    }
    if access.who is Who.TENANT:
        expected |= {
            None: (401, "credential.missing"),
            "admin": (403, "credential.kind"),
            "narrow": (403, "credential.scope"),
        }
    elif access.who is Who.ADMIN:
        expected |= {
            None: (401, "credential.missing"),
            "acme": (403, "credential.kind"),
            "narrow": (403, "credential.scope"),
        }
    elif access.who is Who.SITE:
        missing = (401, "credential.missing")
        expected = dict.fromkeys((None, "acme", "admin", "garbage", "forged"), missing)
    for who, refusal in expected.items():
        answer = world.call(method, _path(rule), who)
        assert (answer.status_code, code_of(answer)) == refusal, who
    admitted = {Who.TENANT: "acme", Who.ADMIN: "admin", Who.ANYONE: None}
    if access.who in admitted:
        answer = world.call(method, _path(rule), admitted[access.who])
        assert answer.status_code not in {401, 403} or rule == "/site/v1/enrol"


@pytest.mark.parametrize(("row", "access"), ROWS, ids=IDS)
def test_each_route_caps_its_body_before_reading_it(world: World, row: tuple[str, str], access: object) -> None:
    limit = TABLE[row].body_bytes_max
    answer = world.call(row[0], _path(row[1]), data=b" " * (limit + 1))
    assert (answer.status_code, code_of(answer)) == (413, "request.too_large")


def test_a_body_without_a_stated_length_is_capped_all_the_same(world: World) -> None:
    class Endless(io.RawIOBase):
        taken = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: bytearray) -> int:
            self.taken += len(buffer)
            buffer[:] = b" " * len(buffer)
            return len(buffer)

    stream = Endless()
    headers = {
        "Authorization": f"Bearer {world.tokens['acme']}",
        "Content-Type": "application/json",
        "Transfer-Encoding": "chunked",
    }
    environ = create_environ("/v1/quote", method="POST", headers=headers)
    environ.pop("CONTENT_LENGTH", None)
    environ |= {"wsgi.input": stream, "wsgi.input_terminated": True}
    body, status, _ = run_wsgi_app(world.app, environ)
    assert status.startswith("413"), b"".join(body)
    assert json.loads(b"".join(body))["code"] == "request.too_large"
    assert 0 < stream.taken < 2_000_000


def test_another_tenants_job_is_not_there(world: World) -> None:
    open_for_trade(world)
    job_id = world.post("/v1/jobs", "acme", spec()).get_json()["job_id"]
    for (method, rule), access in ROWS:
        if "<string:job_id>" not in rule or access.who is not Who.TENANT:
            continue
        path = rule.replace("<string:job_id>", job_id).replace("<path:name>", "workdir.tar.gz?kind=workdir")
        assert world.call(method, path, "rival").status_code == 404, rule
        own = world.call(method, path, "acme")
        assert own.status_code == 200, (rule, own.text)


def test_revoked_and_expired_tokens_say_so(world: World) -> None:
    token_id = world.tokens["acme"].split("_")[2]
    assert world.post(f"/v1/admin/tokens/{token_id}/revoke", "admin", None, key=None).status_code == 200
    answer = world.call("GET", "/v1/account", "acme")
    assert (answer.status_code, code_of(answer)) == (401, "credential.revoked")
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    world.clock.advance_s(365 * 86_400)
    answer = world.call("GET", "/v1/account", "rival")
    assert (answer.status_code, code_of(answer)) == (401, "credential.expired")


def test_a_wrong_secret_and_a_wrong_kind_are_unknown(world: World) -> None:
    _, kind, public_id, secret = world.tokens["acme"].split("_")
    world.tokens["guess"] = f"hansa_{kind}_{public_id}_{'0' * 64}"
    world.tokens["raised"] = f"hansa_admin_{public_id}_{secret}"
    for who in ("guess", "raised"):
        answer = world.call("GET", "/v1/admin/audit", who)
        assert (answer.status_code, code_of(answer)) == (401, "credential.unknown")
