"""The ledger does what a model of forty lines does, whatever the order, the retries and the refusals.

Ten thousand short runs, a hundred to a transaction, each with a tenant and sites of its own: a
commit for each would take most of the time. A run's number is its seed. What differs is shrunk to
the fewest steps before it is told; HANSA_LEDGER_FIRST=4700 HANSA_LEDGER_RUNS=100 plays those of one
transaction again, and HANSA_LEDGER_RUNS=200000 is a campaign.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from sqlalchemy.orm import Session

from broker import ledger
from broker.audit import Finding
from broker.audit.money import check_balances, check_holds, check_transfers
from broker.database.engine import Database
from broker.database.tables import Hold
from tests.broker.ledger.ledger_model import (
    DifferenceError,
    Play,
    Step,
    play,
    random_steps,
    run_accounts,
    run_jobs,
    set_the_stage,
    shrink,
)

FIRST = int(os.environ.get("HANSA_LEDGER_FIRST", "0"))
RUNS = int(os.environ.get("HANSA_LEDGER_RUNS", "10000"))
PARTS = 8  # so that several test processes share them
RUNS_PER_TRANSACTION = 100
STEPS = 5
RUN = "m"


@pytest.fixture
def database(market_url: str) -> Iterator[Database]:
    database = Database(market_url)
    yield database
    database.close()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("market_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("part", range(PARTS))
def test_ten_thousand_short_runs_agree_with_the_model(database: Database, part: int) -> None:
    numbers = range(FIRST, FIRST + RUNS)[len(range(RUNS)) * part // PARTS : len(range(RUNS)) * (part + 1) // PARTS]
    _play_all(database, numbers, STEPS)


@pytest.mark.timeout(300)
def test_longer_runs_agree_on_each_database(database: Database) -> None:
    _play_all(database, range(10**6, 10**6 + 100), 3 * STEPS)


def test_runs_agree_when_every_step_is_a_transaction_of_its_own(database: Database) -> None:
    runs = [str(number) for number in range(10)]
    stage = database.write("probe", lambda session: set_the_stage(session, runs))

    def turn(session: Session, run: str, step: Step) -> None:
        stage.enter(session)
        stage.pairs[run].take(step)
        stage.compare()

    for run in runs:
        for step in random_steps(run, STEPS):
            database.write("probe", lambda session, run=run, step=step: turn(session, run, step))
    assert database.read(_money_findings) == []


def _pay_first_line_only(session: Session, job_id: str, lease_id: str | None, lines: Any, **more: Any) -> bool:
    return _POST(session, job_id, lease_id, lines[:1], **more)


def _close_and_forget_the_hold(session: Session, job_id: str, now_ms: int) -> int:
    rest = _CLOSE(session, job_id, now_ms)
    session.delete(session.get_one(Hold, job_id))
    session.flush()
    return rest


_POST, _CLOSE = ledger.post, ledger.close_hold


@pytest.mark.parametrize("market_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("place", "broken", "turns_max"),
    [
        ("broker.ledger.post", _pay_first_line_only, 3),
        ("broker.ledger.close_hold", _close_and_forget_the_hold, 3),
        ("broker.ledger.transfers._require_same", lambda _row, _movement: None, 2),
        ("broker.ledger.holds.made_already", lambda _session, _movements, _prefix: False, 4),
    ],
    ids=["pays one line", "loses a hold", "takes any retry", "pays twice"],
)
def test_a_broken_ledger_is_found_and_told_in_the_fewest_steps(
    database: Database, monkeypatch: pytest.MonkeyPatch, place: str, broken: Callable[..., Any], turns_max: int
) -> None:
    monkeypatch.setattr(place, broken)
    with pytest.raises(AssertionError, match=r"differs after (\d+) turns") as found:
        _play_all(database, range(RUNS_PER_TRANSACTION), STEPS)
    assert len(str(found.value).splitlines()) - 1 <= turns_max, found.value


class LedgerMachine(RuleBasedStateMachine):
    """The same pair under hypothesis, which shrinks what it finds; a run is one transaction, rolled back at its end."""

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
        self.stage = set_the_stage(self.session, [RUN])
        self.pair = self.stage.pairs[RUN]
        if equity:
            self.pair.take(Step("fund", amount=equity, key="e"))

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
        if hasattr(self, "stage"):
            self.stage.compare()

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


class _RollBack(Exception):  # noqa: N818  no error, but the way out of a write that keeps nothing
    pass


def _play_all(database: Database, numbers: Sequence[int], steps: int) -> None:
    for start in range(0, len(numbers), RUNS_PER_TRANSACTION):
        runs = [str(number) for number in numbers[start : start + RUNS_PER_TRANSACTION]]
        turns = [(run, step) for run in runs for step in random_steps(run, steps)]
        try:
            database.write("probe", lambda session, runs=runs, turns=turns: play(set_the_stage(session, runs), turns))
        except DifferenceError as difference:
            _tell(database, turns, difference)
    assert database.read(_money_findings) == []


def _tell(database: Database, turns: Play, difference: DifferenceError) -> NoReturn:
    """Fail with the fewest turns that show what the first, long play met."""

    def differs(fewer: Play) -> bool:
        def work(session: Session) -> NoReturn:
            play(set_the_stage(session, list(dict.fromkeys(run for run, _ in fewer))), fewer)
            raise _RollBack

        try:
            database.write("probe", work)
        except DifferenceError:
            return True
        except _RollBack:
            return False

    fewest = shrink(turns, differs)
    story = "\n".join(f"  run {run}: {step}" for run, step in fewest)
    message = f"the ledger differs after {len(fewest)} turns; {difference}\n{story}"
    raise AssertionError(message) from difference


def _money_findings(session: Session) -> list[Finding]:
    return [*check_balances(session), *check_holds(session), *check_transfers(session)]
