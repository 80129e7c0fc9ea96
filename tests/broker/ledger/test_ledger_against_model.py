"""The ledger does what a model of forty lines does, whatever the order, the retries and the refusals.

Many short runs share a transaction, each with a tenant and sites of its own: a commit for each
would take most of the time. HANSA_LEDGER_RUNS sets how many (10000 for a campaign); of SQLite's,
about 80 run in a second on one shared core, and PostgreSQL takes a fifth as many, 300 at most.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from sqlalchemy.orm import Session

from broker import ledger
from broker.audit import Finding
from broker.audit.money import check_balances, check_holds, check_transfers
from broker.database.engine import Database
from broker.database.schema import upgrade
from tests.broker.ledger.ledger_model import Pair, Step, random_steps, run_accounts, run_jobs, set_the_stage

RUNS = int(os.environ.get("HANSA_LEDGER_RUNS", "300"))
RUNS_POSTGRESQL_MAX = 300
RUNS_PER_TRANSACTION = 100
STEPS = 8
RUN = "m"


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    upgrade(database)
    yield database
    database.close()


@pytest.mark.timeout(600)
def test_random_runs_agree_with_the_model(database: Database) -> None:
    count = min(RUNS // 5, RUNS_POSTGRESQL_MAX) if database.engine.dialect.name == "postgresql" else RUNS

    def play(session: Session, first: int) -> int:
        runs = [str(number) for number in range(first, min(first + RUNS_PER_TRANSACTION, count))]
        set_the_stage(session, runs)
        ledger.fund_equity(session, 40, f"batch-{first}", 0)
        for run in runs:
            pair = Pair(session, run)
            for step in random_steps(run, STEPS):
                pair.take(step)
            pair.compare()
            session.expunge_all()
        return len(runs)

    played = sum(
        database.write("probe", lambda session, first=first: play(session, first))
        for first in range(0, count, RUNS_PER_TRANSACTION)
    )
    assert played == count
    assert database.read(_money_findings) == []


class LedgerMachine(RuleBasedStateMachine):
    """The same pair under hypothesis, which shrinks what it finds; every step is one transaction's savepoint."""

    database: Database
    jobs = st.sampled_from(run_jobs(RUN))
    keys = st.sampled_from(["k", "l"])
    amounts = st.sampled_from([-1, 0, 1, 7, 50, 100])
    lines = st.lists(st.tuples(st.sampled_from([f"site/a{RUN}", f"site/b{RUN}"]), amounts), min_size=1, max_size=3).map(
        tuple
    )

    def __init__(self) -> None:
        super().__init__()
        self.session = Session(self.database.engine)
        self.session.connection(execution_options={"hansa_write": True})

    @initialize(equity=st.sampled_from([0, 60]))
    def open(self, equity: int) -> None:
        set_the_stage(self.session, [RUN])
        if equity:
            ledger.fund_equity(self.session, equity, "e", 0)
        self.pair = Pair(self.session, RUN)

    @rule(amount=amounts, key=keys, forget=st.booleans())
    def deposit(self, amount: int, key: str, *, forget: bool) -> None:
        self.pair.take(Step("deposit", amount=amount, key=key, forget=forget))

    @rule(job=jobs, amount=amounts)
    def hold(self, job: str, amount: int) -> None:
        self.pair.take(Step("hold", job=job, amount=amount))

    @rule(job=jobs, lines=lines, key=keys, verb=st.sampled_from(["post", "post", "draw"]))
    def pay(self, job: str, lines: tuple[tuple[str, int], ...], key: str, verb: str) -> None:
        self.pair.take(Step(verb, job=job, lines=lines, key=key))

    @rule(job=jobs)
    def close(self, job: str) -> None:
        self.pair.take(Step("close", job=job))

    @invariant()
    def agree(self) -> None:
        if hasattr(self, "pair"):
            self.pair.compare()

    def teardown(self) -> None:
        findings = [*check_balances(self.session), *check_holds(self.session)]
        self.session.close()  # rolls back: the next run starts from an empty ledger
        assert findings == []


def test_hypothesis_finds_no_difference_from_the_model(database: Database) -> None:
    examples = 40 if database.engine.dialect.name == "sqlite" else 15
    machine = type("Machine", (LedgerMachine,), {"database": database})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=20,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_the_stage_of_a_run_is_its_own() -> None:
    assert not set(run_accounts("1")) & set(run_accounts("11"))


def _money_findings(session: Session) -> list[Finding]:
    return [*check_balances(session), *check_holds(session), *check_transfers(session)]
