"""The server's side of every page on PostgreSQL, and what a page says to a person who asks too often."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from flask.testing import FlaskClient
from flask_openapi3.openapi import OpenAPI
from sqlalchemy import select

from broker.api import rate_limits
from broker.api.app import create_app
from broker.api.rate_limits import RateLimits
from broker.database.tables import JobArtifact, Lease
from broker.identity.passwords import open_session, verify_login
from broker.portal import portal
from broker.portal.blueprint import SESSION_COOKIE
from broker.settings import Settings
from tests.broker.portal.scene import PASSWORD, Scene, make_scene
from tests.fixtures.databases import PostgresServer
from training.clock import ManualClock

pytestmark = pytest.mark.xdist_group("portal")


@pytest.fixture(scope="module")
def postgres_scene(
    postgres_server: PostgresServer, postgres_schema: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scene]:
    name = postgres_server.create_database(postgres_schema)
    scene = make_scene(tmp_path_factory.mktemp("portal-on-postgresql"), postgres_server.url(name))
    yield scene
    scene.market.database.close()
    postgres_server.drop_database(name)


def signed_in(app: OpenAPI, scene: Scene, name: str) -> FlaskClient:
    client = app.test_client()
    person = verify_login(scene.market, f"{name}@example.org", PASSWORD)
    client.set_cookie(SESSION_COOKIE, open_session(scene.market, person))
    return client


def test_every_page_is_served_from_postgresql(postgres_scene: Scene) -> None:
    scene = postgres_scene
    app = create_app(scene.market, [portal])
    job_id = scene.jobs["spanning"]
    read = scene.market.database.read
    lease_id = read(lambda session: session.scalar(select(Lease.lease_id).where(Lease.job_id == job_id)))
    kept = read(lambda session: session.scalar(select(JobArtifact).where(JobArtifact.job_id == job_id)))
    assert kept is not None
    values = {
        "job_id": job_id,
        "lease_id": lease_id,
        "kind": kept.kind,
        "name": kept.name,
        "round_number": 1,
        "site_id": "bremen",
        "filename": "portal.css",
    }
    clients = {name: signed_in(app, scene, name) for name in ("ada", "root")}
    seen = set()
    for rule in app.url_map.iter_rules():
        if not rule.endpoint.startswith("portal.") or "GET" not in (rule.methods or ()):
            continue
        built = rule.build({name: values[name] for name in rule.arguments}, append_unknown=False)
        assert built is not None
        answers = {name: client.get(built[1]).status_code for name, client in clients.items()}
        assert set(answers.values()) <= {200, 302, 303, 403, 404}, f"{built[1]}: {answers}"
        if 200 in answers.values():
            seen.add(rule.endpoint)
    assert len(seen) >= 15, seen


def test_a_person_who_asks_too_often_gets_a_page_that_says_so(postgres_scene: Scene) -> None:
    app = create_app(postgres_scene.market, [portal])
    settings = Settings(home=postgres_scene.market.settings.home, requests_per_s=1)
    app.extensions[rate_limits.EXTENSION] = RateLimits(settings, ManualClock())
    ada, root = (signed_in(app, postgres_scene, name) for name in ("ada", "root"))
    answers = [ada.get("/market") for _ in range(11)]
    assert [answer.status_code for answer in answers] == [200] * 10 + [429]
    assert answers[-1].headers["Retry-After"] == "1"
    assert "request.rate" in answers[-1].text
    assert root.get("/market").status_code == 200
    assert ada.get("/static/portal.css").status_code != 429
