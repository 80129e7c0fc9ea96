"""The portal as people meet it: served by the real application over a filled market, seen in Debian's Chromium."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from flask.testing import FlaskClient
from flask_openapi3.openapi import OpenAPI
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, sync_playwright
from werkzeug.serving import make_server

from broker.api.app import create_app
from broker.identity.passwords import open_session, verify_login
from broker.portal import portal
from broker.portal.blueprint import SESSION_COOKIE
from sites.bundle import pack
from tests.broker.portal.scene import PASSWORD, Scene, make_scene

REMEDY = "No Chromium: run deploy/test_parts.sh, or on Debian `apt-get install chromium`."
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")


@dataclass
class Visitor:
    """A browser window, and everything that went wrong in it."""

    page: Page
    address: str
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.errors.append(f"script: {error}"))

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"}:
            self.errors.append(f"{message.type}: {message.text}")

    def visit(self, path: str) -> int:
        response = self.page.goto(self.address + path)
        assert response is not None
        return response.status

    def become(self, cookie: str) -> None:
        """Go on as the person whose session this is."""
        self.page.context.add_cookies([{"name": SESSION_COOKIE, "value": cookie, "url": self.address}])


@dataclass
class Client:
    """A signed-in client without a browser, for what a browser would not do."""

    client: FlaskClient

    @property
    def form_token(self) -> str:
        found = re.search(r'name="form_token" value="([0-9a-f]+)"', self.client.get("/market").text)
        assert found is not None
        return found[1]


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("portal"))


@pytest.fixture(scope="session")
def app(scene: Scene) -> OpenAPI:
    return create_app(scene.market, [portal])


@pytest.fixture(scope="session")
def address(app: OpenAPI) -> Iterator[str]:
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip(REMEDY)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, headless=True, args=list(ARGUMENTS))
        yield browser
        browser.close()


@pytest.fixture
def context(chromium: Browser) -> Iterator[BrowserContext]:
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(10_000)
    yield context
    context.close()


@pytest.fixture
def visitor(context: BrowserContext, address: str) -> Iterator[Visitor]:
    visitor = Visitor(context.new_page(), address)
    yield visitor
    assert visitor.errors == [], "a page must not complain in the console"


@pytest.fixture
def tenant(visitor: Visitor, cookies: dict[str, str]) -> Visitor:
    visitor.become(cookies["ada"])
    return visitor


@pytest.fixture
def admin(visitor: Visitor, cookies: dict[str, str]) -> Visitor:
    visitor.become(cookies["root"])
    return visitor


@pytest.fixture
def operator(visitor: Visitor, cookies: dict[str, str]) -> Visitor:
    visitor.become(cookies["olga"])
    return visitor


@pytest.fixture(scope="session")
def cookies(scene: Scene) -> dict[str, str]:
    """A session of each person: signing in costs a password hash, which is slow on purpose."""
    logins = {name: f"{name}@example.org" for name in ("ada", "bob", "olga", "root")}
    people = {name: verify_login(scene.market, login, PASSWORD) for name, login in logins.items()}
    return {name: open_session(scene.market, person) for name, person in people.items()}


@pytest.fixture
def client_of(app: OpenAPI, cookies: dict[str, str]) -> dict[str, Client]:
    clients = {}
    for name, cookie in cookies.items():
        client = app.test_client()
        client.set_cookie(SESSION_COOKIE, cookie)
        clients[name] = Client(client)
    return clients


@pytest.fixture
def workdir_file(tmp_path: Path) -> Path:
    """A bundle that the market takes."""
    folder = tmp_path / "workdir"
    folder.mkdir()
    (folder / "train.py").write_text("print('a loop')\n")
    path = tmp_path / "workdir.tar.gz"
    path.write_bytes(pack(folder))
    return path
