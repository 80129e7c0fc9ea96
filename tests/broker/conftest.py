"""What the tests of the journey ask for: a market of their own on each engine, copied from one that was made once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.database.engine import Database
from broker.database.schema import upgrade
from tests.broker.speaking import Scene
from tests.fixtures.databases import PostgresServer


@pytest.fixture(scope="session")
def sqlite_schema(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with the schema and nothing in it."""
    path = tmp_path_factory.mktemp("schema") / "market.sqlite3"
    _make(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def postgres_schema(postgres_server: PostgresServer) -> str:
    """The name of a PostgreSQL database with the schema and nothing in it."""
    name = postgres_server.create_database()
    _make(postgres_server.url(name))
    return name


@pytest.fixture(params=["sqlite", "postgresql"])
def market_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """As `database_url`, with the schema in it."""
    if request.param == "sqlite":
        path = tmp_path / "market.sqlite3"
        shutil.copy(request.getfixturevalue("sqlite_schema"), path)
        yield f"sqlite:///{path}"
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    name = server.create_database(request.getfixturevalue("postgres_schema"))
    yield server.url(name)
    server.drop_database(name)


@pytest.fixture
def scene(market_url: str, tmp_path: Path) -> Iterator[Scene]:
    """A market with three sites of two slots each, audited when the test ends."""
    scene = Scene(market_url, tmp_path / "home")
    yield scene
    scene.close()


def _make(url: str) -> None:
    database = Database(url)
    upgrade(database)
    database.close()
