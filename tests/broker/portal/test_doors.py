"""Who gets in where: roles, tenants apart, forms of one's own session only, and what the headers forbid."""

from __future__ import annotations

import re

import pytest
from flask_openapi3.openapi import OpenAPI
from sqlalchemy import func, select

from broker.database.tables import Event, Job
from broker.identity.passwords import SESSION_LIFE_S, open_session, verify_login
from broker.portal import ACCESS
from broker.portal.blueprint import SESSION_COOKIE, Access
from broker.portal.forms import example_values
from broker.portal.throttle import FAILURES_MAX, WINDOW_S
from tests.broker.portal.conftest import Client
from tests.broker.portal.scene import PASSWORD, Scene

pytestmark = pytest.mark.xdist_group("portal")

JOB_DOORS = ("/jobs/{}", "/jobs/{}/live", "/jobs/{}/curves.json", "/jobs/{}/files/workdir/workdir.tar.gz")


def _path(rule: str) -> str:
    return re.sub(r"<[^>]+>", "1", rule)


def test_every_page_says_who_may_see_it(app: OpenAPI) -> None:
    endpoints = {rule.endpoint for rule in app.url_map.iter_rules() if rule.endpoint.startswith("portal.")}
    assert endpoints == set(ACCESS)


def test_nobody_sees_a_page_without_signing_in(app: OpenAPI) -> None:
    closed = [rule for rule in app.url_map.iter_rules() if ACCESS.get(rule.endpoint, Access.PUBLIC) != Access.PUBLIC]
    assert len(closed) > 15
    for rule in closed:
        method = "POST" if "POST" in (rule.methods or ()) else "GET"
        answer = app.test_client().open(_path(rule.rule), method=method)
        assert answer.status_code == 303, rule.rule
        assert answer.location.startswith("/sign-in"), rule.rule


def test_a_tenant_sees_no_page_of_admins_and_an_admin_none_of_tenants(
    app: OpenAPI, client_of: dict[str, Client]
) -> None:
    for who, others in (("ada", Access.ADMIN), ("root", Access.TENANT)):
        for rule in app.url_map.iter_rules():
            if ACCESS.get(rule.endpoint) == others:
                method = "POST" if "POST" in (rule.methods or ()) else "GET"
                answer = client_of[who].client.open(_path(rule.rule), method=method)
                assert answer.status_code == 403, f"{who} {rule.rule}"


@pytest.mark.parametrize("door", JOB_DOORS)
def test_another_tenants_job_is_as_one_that_does_not_exist(
    client_of: dict[str, Client], scene: Scene, door: str
) -> None:
    assert client_of["ada"].client.get(door.format(scene.jobs["spanning"])).status_code == 200
    theirs = client_of["bob"].client.get(door.format(scene.jobs["spanning"]))
    none = client_of["bob"].client.get(door.format("job_nobodys"))
    assert theirs.status_code == none.status_code == 404
    said = [re.search("<main.*</main>", answer.text, re.DOTALL) for answer in (theirs, none)]
    assert said[0] is not None
    assert said[1] is not None
    assert said[0][0].replace(scene.jobs["spanning"], "job_nobodys") == said[1][0]


def test_a_log_is_read_only_through_its_own_job(client_of: dict[str, Client], scene: Scene) -> None:
    lease_id = scene.agents["lubeck"].orders[0].lease_id
    assert client_of["bob"].client.get(f"/jobs/{scene.jobs['bobs-own']}/logs/{lease_id}").status_code == 200
    assert client_of["ada"].client.get(f"/jobs/{scene.jobs['bobs-own']}/logs/{lease_id}").status_code == 404
    assert client_of["ada"].client.get(f"/jobs/{scene.jobs['spanning']}/logs/{lease_id}").status_code == 404


def test_another_tenants_job_is_not_cancelled(client_of: dict[str, Client], scene: Scene) -> None:
    bob = client_of["bob"]
    answer = bob.client.post(f"/jobs/{scene.jobs['spanning']}/cancel", data={"form_token": bob.form_token})
    assert answer.status_code == 404


@pytest.mark.parametrize("token", [None, "", "0" * 64, "another's"])
def test_a_form_without_its_sessions_token_changes_nothing(
    client_of: dict[str, Client], scene: Scene, token: str | None
) -> None:
    if token == "another's":
        token = client_of["bob"].form_token
    form = {} if token is None else {"form_token": token}
    answer = client_of["ada"].client.post(f"/jobs/{scene.jobs['left-out']}/cancel", data=form)
    assert answer.status_code == 403
    assert "portal.form_forged" in answer.text
    row = scene.market.database.read(lambda session: session.get_one(Job, scene.jobs["left-out"]))
    assert row.ended_ms is None


def test_no_form_of_admins_acts_without_its_sessions_token(
    app: OpenAPI, client_of: dict[str, Client], scene: Scene
) -> None:
    """Every one there is, now and later: the forged request of another website comes with the admin's own cookie."""
    before = scene.market.database.read(lambda session: session.scalar(select(func.count()).select_from(Event)))
    forms = [
        rule.rule
        for rule in app.url_map.iter_rules()
        if ACCESS.get(rule.endpoint) == Access.ADMIN and "POST" in (rule.methods or ())
    ]
    assert {"/admin/market/freeze", "/admin/accounts/close", "/admin/tenants/deposit"} <= set(forms)
    for rule in forms:
        forged = {"form_token": client_of["ada"].form_token, "login": "bob@example.org", "tenant_id": "bob"}
        answer = client_of["root"].client.post(_path(rule), data=forged)
        assert (answer.status_code, "portal.form_forged" in answer.text) == (403, True), rule
    after = scene.market.database.read(lambda session: session.scalar(select(func.count()).select_from(Event)))
    assert after == before


def test_a_form_sent_from_another_website_is_refused_even_with_a_token(
    client_of: dict[str, Client], scene: Scene
) -> None:
    ada = client_of["ada"]
    answer = ada.client.post(
        f"/jobs/{scene.jobs['left-out']}/cancel",
        data={"form_token": ada.form_token},
        headers={"Sec-Fetch-Site": "cross-site"},
    )
    assert answer.status_code == 403


def test_the_sign_in_form_belongs_to_the_browser_that_fetched_it(app: OpenAPI) -> None:
    found = re.search(r'name="form_token" value="([0-9a-f]+)"', app.test_client().get("/sign-in").text)
    assert found is not None
    form = {"login": "ada@example.org", "password": PASSWORD, "form_token": found[1]}
    assert app.test_client().post("/sign-in", data=form).status_code == 403


def test_headers_forbid_what_the_portal_never_does(client_of: dict[str, Client]) -> None:
    for path in ("/jobs", "/sign-in", "/static/portal.css", "/jobs/none"):
        answer = client_of["ada"].client.get(path)
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "same-origin"
    first, second = (client_of["ada"].client.get("/jobs") for _ in range(2))
    assert first.headers["Content-Security-Policy"] != second.headers["Content-Security-Policy"], "a nonce is used once"
    assert " style=" not in first.text
    assert " onclick=" not in first.text


def test_the_session_cookie_is_out_of_reach(app: OpenAPI) -> None:
    client = app.test_client()
    found = re.search(r'name="form_token" value="([0-9a-f]+)"', client.get("/sign-in", base_url="https://x").text)
    assert found is not None
    form = {"login": "ada@example.org", "password": PASSWORD, "form_token": found[1], "next": "//evil.example/x"}
    answer = client.post("/sign-in", data=form, base_url="https://x")
    assert answer.location == "/", "no sign-in leads to another website"
    cookie = next(value for value in answer.headers.getlist("Set-Cookie") if value.startswith(SESSION_COOKIE))
    assert {"HttpOnly", "Secure", "SameSite=Lax", "Path=/"} <= set(cookie.split("; "))


def test_a_session_ends_by_the_clock_and_by_signing_out(app: OpenAPI, scene: Scene) -> None:
    person = verify_login(scene.market, "bob@example.org", PASSWORD)
    client = app.test_client()
    client.set_cookie(SESSION_COOKIE, open_session(scene.market, person))
    answer = client.get("/jobs")
    assert answer.status_code == 200
    found = re.search(r'name="form_token" value="([0-9a-f]+)"', answer.text)
    assert found is not None
    cookie = client.get_cookie(SESSION_COOKIE)
    assert cookie is not None
    client.post("/sign-out", data={"form_token": found[1]})
    client.set_cookie(SESSION_COOKIE, cookie.value)
    assert client.get("/jobs").status_code == 303, "the cookie's copy is worth nothing"


def test_guessing_has_to_wait(app: OpenAPI, scene: Scene) -> None:
    client = app.test_client()
    found = re.search(r'name="form_token" value="([0-9a-f]+)"', client.get("/sign-in").text)
    assert found is not None
    form = {"login": "eve@example.org", "password": "wrong", "form_token": found[1]}
    # From an address of its own, so that no other test has to wait.
    here = {"REMOTE_ADDR": "203.0.113.9"}
    for _ in range(FAILURES_MAX):
        assert client.post("/sign-in", data=form, environ_base=here).status_code == 401
    answer = client.post("/sign-in", data={**form, "login": "other@example.org"}, environ_base=here)
    assert answer.status_code == 429
    assert 0 < int(answer.headers["Retry-After"]) <= WINDOW_S
    scene.clock.advance_s(WINDOW_S + 1)
    assert WINDOW_S + 1 < SESSION_LIFE_S
    assert client.post("/sign-in", data=form, environ_base=here).status_code == 401


def test_sending_a_form_twice_submits_one_job(client_of: dict[str, Client], scene: Scene) -> None:
    ada = client_of["ada"]
    form = {
        **example_values(),
        "name": "only-once",
        "workdir": "example",
        "step": "submit",
        "submission": "ab" * 16,
        "form_token": ada.form_token,
    }
    first, second = (ada.client.post("/jobs/new", data=form) for _ in range(2))
    assert first.status_code == second.status_code == 303
    assert first.location == second.location
    assert ada.client.get("/jobs").text.count("only-once</a>") == 1


def test_sending_a_deposit_twice_gives_it_once(client_of: dict[str, Client]) -> None:
    root = client_of["root"]
    form = {"tenant_id": "ada", "amount": "0.000001", "deposit_key": "cd" * 16, "form_token": root.form_token}
    for _ in range(2):
        assert root.client.post("/admin/tenants/deposit", data=form).status_code == 303
    assert root.client.get("/admin/ledger").text.count("0.000001</td>") == 1


def test_a_body_beyond_the_limit_is_refused(client_of: dict[str, Client]) -> None:
    answer = client_of["ada"].client.post("/jobs/quote", data={"job_text": "x" * 400_000})
    assert answer.status_code == 413
    assert "<h1>" in answer.text
