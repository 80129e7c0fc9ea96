"""The same seeds on PostgreSQL: crashes at commits, and transactions that the server makes run again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from broker import ledger
from broker.database.engine import CommitHook, Database
from tests.fixtures.databases import PostgresServer
from tests.simulation.contest import ContestedDatabase
from tests.simulation.founding import make_template
from tests.simulation.seeds import run_seed

STEPS = 150
STORY_STEPS = 80
CONTESTED = 0.2

Open = Callable[[int, float], Callable[[CommitHook], ContestedDatabase]]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_template(tmp_path_factory.mktemp("template"))


@pytest.fixture
def opened() -> list[ContestedDatabase]:
    return []


@pytest.fixture
def open_contested(
    postgres_server: PostgresServer, postgres_schema: str, opened: list[ContestedDatabase]
) -> Iterator[Open]:
    names: list[str] = []

    def choose(seed: int, contested: float) -> Callable[[CommitHook], ContestedDatabase]:
        def open_database(at_commit: CommitHook) -> ContestedDatabase:
            names.append(postgres_server.create_database(postgres_schema))
            opened.append(ContestedDatabase(postgres_server.url(names[-1]), at_commit, seed=seed, contested=contested))
            return opened[-1]

        return open_database

    yield choose
    for name in names:
        postgres_server.drop_database(name)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_no_seed_breaks_an_invariant_on_postgresql(
    template: Path, open_contested: Open, opened: list[ContestedDatabase], seed: int
) -> None:
    outcome = run_seed(seed, STEPS, template, tell=True, open_database=open_contested(seed, CONTESTED))
    assert not outcome.failure, outcome.failure + "\n".join(outcome.story[-40:])
    refused = opened[0].refused
    assert refused.total() >= 10, f"few transactions ran twice: {refused}"
    assert len(refused) >= 3


@pytest.mark.timeout(300)
def test_a_seed_tells_one_story_on_either_database(template: Path, open_contested: Open) -> None:
    """What is read without an order would come in another one here."""
    told = run_seed(4, STORY_STEPS, template, tell=True)
    assert not told.failure
    assert len(told.story) > 10
    # Nothing contested: a write that runs again draws new names, which a tie would fall to.
    assert run_seed(4, STORY_STEPS, template, tell=True, open_database=open_contested(4, 0.0)).story == told.story


def test_a_contested_write_runs_twice_and_commits_once(open_contested: Open) -> None:
    commits: list[str] = []
    database = open_contested(1, 1.0)(commits.append)
    database.write("open", lambda session: ledger.open_accounts(session, 0))
    runs: list[int] = []

    def work(_session: Session) -> int:
        runs.append(1)
        return len(runs)

    assert isinstance(database, Database)
    assert database.write("probe", work) == 2
    assert commits == ["before:open", "after:open", "before:probe", "after:probe"]
    database.close()
