"""A market with two tenants, an admin and a site, served by the real application."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flask.testing import FlaskClient
from flask_openapi3.openapi import OpenAPI
from werkzeug.test import TestResponse

from broker.api.app import create_app
from broker.artifacts import ArtifactStore
from broker.bootstrap import open_market
from broker.database.engine import Database
from broker.doorbell import SilentDoorbell
from broker.identity.authority import Authority
from broker.identity.tokens import TokenKind, create_token
from broker.ids import RandomIds
from broker.market import Market
from broker.settings import Settings
from broker.tenants import create_tenant
from sites.identity import (
    Identity,
    certificate_request_pem,
    decode_join_string,
    prepare_identity,
    site_uri,
    store_identity,
)
from sites.protocol import Enrolment, EnrolmentAnswer, Heartbeat, Offer, PoolOffer
from tests.fixtures.databases import PostgresServer
from training.clock import ManualClock

YEAR_S = 365 * 86_400
Json = dict[str, Any]


@dataclass
class World:
    """The market under test and who speaks to it."""

    market: Market
    app: OpenAPI
    clock: ManualClock
    folder: Path
    tokens: dict[str, str]
    sites: dict[str, Identity] = field(default_factory=dict)

    @property
    def client(self) -> FlaskClient:
        return self.app.test_client()

    def call(self, method: str, path: str, who: str | None = None, **given: Any) -> TestResponse:
        headers = dict(given.pop("headers", {}))
        if who is not None:
            headers["Authorization"] = f"Bearer {self.tokens[who]}"
        return self.client.open(path, method=method, headers=headers, **given)

    def post(self, path: str, who: str, body: Any, key: str | None = "key-1") -> TestResponse:
        headers = {} if key is None else {"Idempotency-Key": key}
        return self.call("POST", path, who, json=body, headers=headers)

    def signed(self, site_id: str, method: str, path: str, body: bytes = b"", **headers: str) -> TestResponse:
        signature = self.sites[site_id].sign_request(method, path, body).as_dict()
        kind = {"Content-Type": "application/json"} if method == "POST" else {}
        return self.client.open(path, method=method, data=body, headers=kind | signature | headers)

    def join(self, site_id: str) -> Identity:
        answer = self.post("/v1/admin/sites/invite", "admin", {"site_id": site_id})
        join = decode_join_string(answer.get_json()["join_string"])
        folder = self.folder / f"{site_id}-{len(self.sites)}"
        key = prepare_identity(folder)
        enrolment = Enrolment(
            site_id=site_id, join_token=join.token, csr_pem=certificate_request_pem(key, site_uri(site_id))
        )
        enrolled = self.client.post("/site/v1/enrol", json=enrolment.model_dump())
        assert enrolled.status_code == 200, enrolled.text
        store_identity(folder, join, EnrolmentAnswer.model_validate_json(enrolled.data))
        self.sites[site_id] = Identity(folder, self.clock)
        return self.sites[site_id]

    def beat(self, site_id: str, gpus: int = 8) -> TestResponse:
        pool = PoolOffer(
            gpu_type="H100",
            gpu_ids=tuple(f"gpu-{number}" for number in range(gpus)),
            ask_micros_per_gpu_hour=1_000_000,
        )
        heartbeat = Heartbeat(agent_version="1", boot="b", offer=Offer(pools=(pool,)))
        return self.signed(site_id, "POST", "/site/v1/heartbeat", heartbeat.model_dump_json().encode())

    def upload(self, who: str, content: bytes) -> TestResponse:
        digest = hashlib.sha256(content).hexdigest()
        return self.call("PUT", f"/v1/workdirs/{digest}?offset=0&size={len(content)}", who, data=content)


def bundle(**files: bytes) -> bytes:
    """A workdir as `hansa` packs it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name.replace("__", "."))
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


WORKDIR = bundle(train__py=b"print('hello')\n")


def spec(**changes: Any) -> Json:
    """A job that the market can hold."""
    document: Json = {
        "name": "lm",
        "run": "python train.py",
        "workdir_digest": hashlib.sha256(WORKDIR).hexdigest(),
        "resources": {"accelerators": [{"gpu_type": "H100", "count_min": 1, "count_max": 2}]},
        "market": {
            "budget_micros": 5_000_000,
            "workload": {
                "samples": 1000,
                "batch_per_gpu": 8,
                "parameters": 1_000_000,
                "flops_per_sample": 1e9,
            },
        },
    }
    return document | changes


@dataclass(frozen=True)
class Template:
    """A home made once and copied for each test, with the tokens of those in it, and PostgreSQL's database if it has one."""

    home: Path
    tokens: dict[str, str]
    site: Path | None = None
    database: str | None = None

    def open(self, folder: Path, database_url: str = "") -> World:
        """Return a world of its own in `folder`."""
        shutil.copytree(self.home, folder / "home")
        clock = ManualClock()
        settings = Settings(home=folder / "home", database_url=database_url)
        # As `open_market`, but for the schema, which the template has.
        market = Market(
            settings=settings,
            database=Database(settings.resolved_database_url),
            clock=clock,
            ids=RandomIds(),
            authority=Authority(settings.home, clock),
            artifacts=ArtifactStore(settings.home / "artifacts"),
            doorbell=SilentDoorbell(),
        )
        world = World(market, create_app(market), clock, folder, dict(self.tokens))
        if self.site is not None:
            shutil.copytree(self.site, folder / self.site.name)
            world.sites["lyon"] = Identity(folder / self.site.name, clock)
        return world


# What these ask is decided before the database is: two engines would answer the same, a hundred and seventy times.
ONE_ENGINE = frozenset({"test_access", "test_problems", "test_secrets", "test_served"})


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the tests that write on both engines."""
    if "engine" in metafunc.fixturenames:
        one = metafunc.module.__name__.rpartition(".")[2] in ONE_ENGINE
        metafunc.parametrize("engine", ["sqlite"] if one else ["sqlite", "postgresql"])


class Templates:
    """Makes each template when it is first asked for."""

    def __init__(self, request: pytest.FixtureRequest, factory: pytest.TempPathFactory) -> None:
        self._request = request
        self._factory = factory
        self._made: dict[tuple[str, bool], Template] = {}

    @property
    def server(self) -> PostgresServer:
        server: PostgresServer = self._request.getfixturevalue("postgres_server")
        return server

    def get(self, engine: str, *, trading: bool) -> Template:
        if (engine, trading) not in self._made:
            self._made[engine, trading] = self._make(engine, trading=trading)
        return self._made[engine, trading]

    def _make(self, engine: str, *, trading: bool) -> Template:
        folder = self._factory.mktemp(f"{engine}-{'trading' if trading else 'template'}")
        name, url = None, ""
        if engine == "postgresql":
            name = self.server.create_database(self._request.getfixturevalue("postgres_schema"))
            url = self.server.url(name)
        clock = ManualClock()
        world = populate(open_market(Settings(home=folder / "home", database_url=url), clock=clock), clock, folder)
        if trading:
            open_for_trade(world)
        world.market.database.close()
        return Template(folder / "home", world.tokens, folder / "lyon-0" if trading else None, name)


@pytest.fixture(scope="session")
def templates(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Templates:
    return Templates(request, tmp_path_factory)


@pytest.fixture
def world(templates: Templates, engine: str, tmp_path: Path) -> Iterator[World]:
    yield from _opened(templates, templates.get(engine, trading=False), tmp_path)


@pytest.fixture
def trading(templates: Templates, engine: str, tmp_path: Path) -> Iterator[World]:
    yield from _opened(templates, templates.get(engine, trading=True), tmp_path)


def _opened(templates: Templates, template: Template, folder: Path) -> Iterator[World]:
    name = None if template.database is None else templates.server.create_database(template.database)
    world = template.open(folder, "" if name is None else templates.server.url(name))
    yield world
    world.market.database.close()
    if name is not None:
        templates.server.drop_database(name)


def populate(market: Market, clock: ManualClock, folder: Path) -> World:
    tokens: dict[str, str] = {}
    for tenant_id in ("acme", "rival"):
        create_tenant(market, tenant_id)
        tokens[tenant_id] = create_token(market, TokenKind.TENANT, tenant_id=tenant_id, life_s=YEAR_S).text
    tokens["admin"] = create_token(market, TokenKind.ADMIN, life_s=YEAR_S).text
    return World(market, create_app(market), clock, folder, tokens)


def open_for_trade(world: World) -> World:
    """Let a site offer GPUs, give the tenants credits and upload a workdir."""
    world.join("lyon")
    assert world.beat("lyon").status_code == 200
    for tenant_id in ("acme", "rival"):
        world.post(
            f"/v1/admin/tenants/{tenant_id}/deposit", "admin", {"amount_micros": 10**8}, key=f"deposit-{tenant_id}"
        )
        assert world.upload(tenant_id, WORKDIR).get_json()["complete"]
    return world


def code_of(answer: TestResponse) -> str:
    return str(json.loads(answer.data)["code"])


def new_key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()
