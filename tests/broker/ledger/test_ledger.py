"""What the ledger says to people, what it refuses, and that many at once lose nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from broker import ledger
from broker.audit.money import check_balances, check_holds
from broker.database.engine import Database
from broker.database.schema import upgrade
from broker.database.tables import Hold, Job, Tenant, Transfer
from broker.errors import BusyError, InsufficientFundsError, LedgerError, NotFoundError
from broker.ledger.transfers import AMOUNT_MICROS_MAX, BALANCE_MICROS_MAX

WAIT_S = 60.0
CREDIT = 1_000_000


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    upgrade(database)
    database.write("setup", _open)
    yield database
    database.close()


def test_a_hold_over_the_balance_is_refused_with_both_figures(database: Database) -> None:
    with pytest.raises(InsufficientFundsError, match=r"40\.00 credits and the account has 10\.00 available") as refusal:
        database.write("probe", lambda session: ledger.place_hold(session, _job(session), 40 * CREDIT, 1))
    assert "at least 30.00 credits" in str(refusal.value)
    assert database.read(ledger.balances)["tenant/acme"] == 10 * CREDIT
    assert database.read(lambda session: session.scalar(select(func.count()).select_from(Hold))) == 0


def test_money_goes_from_the_world_to_a_site_and_the_rest_back_to_its_tenant(database: Database) -> None:
    def work(session: Session) -> int:
        ledger.place_hold(session, _job(session), 4 * CREDIT, 1)
        ledger.post(session, "job", "lease", [("site/ada", 100), ("fees", 1)], key="usage/lease/1", now_ms=2)
        ledger.draw_equity(session, "job", "lease", [("site/ada", 20)], key="usage/lease/1", now_ms=2)
        return ledger.close_hold(session, "job", 3)

    assert database.write("probe", work) == 4 * CREDIT - 101
    assert database.read(ledger.balances) == {
        "equity": 5 * CREDIT - 20,
        "fees": 1,
        "held/acme": 0,
        "site/ada": 120,
        "tenant/acme": 10 * CREDIT - 101,
        "world": -15 * CREDIT,
    }


def test_a_closed_hold_takes_no_posting_but_knows_its_old_ones(database: Database) -> None:
    def work(session: Session) -> None:
        ledger.place_hold(session, _job(session), CREDIT, 1)
        assert ledger.post(session, "job", None, [("site/ada", 9)], key="k", now_ms=1)
        ledger.close_hold(session, "job", 2)
        assert not ledger.post(session, "job", None, [("site/ada", 9)], key="k", now_ms=3)
        with pytest.raises(LedgerError, match="closed"):
            ledger.post(session, "job", None, [("site/ada", 9)], key="other", now_ms=3)

    database.write("probe", work)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([("tenant/acme", 1)], "only sites and fees"),
        ([("equity", 1)], "only sites and fees"),
        ([("site/ada", 5), ("site/ada", -1)], "not negative"),
        ([("site/ada", 2 * CREDIT)], "pass the hold"),
        ([("site/nobody", 1)], "no account"),
    ],
)
def test_a_posting_that_the_rules_do_not_allow_changes_nothing(
    tmp_path: object, lines: list[tuple[str, int]], message: str
) -> None:
    database = Database(f"sqlite:///{tmp_path}/market.sqlite3")
    upgrade(database)
    database.write("setup", _open)
    database.write("setup", lambda session: ledger.place_hold(session, _job(session), CREDIT, 1))
    before = database.read(ledger.balances)

    def work(session: Session) -> None:
        with pytest.raises((LedgerError, NotFoundError), match=message):
            ledger.post(session, "job", None, lines, key="k", now_ms=1)

    database.write("probe", work)
    assert database.read(ledger.balances) == before
    database.close()


def test_equity_is_not_overdrawn_and_pays_no_fees(database: Database) -> None:
    lines = [("site/ada", 4 * CREDIT), ("site/ada", 2 * CREDIT)]

    def work(session: Session) -> None:
        with pytest.raises(InsufficientFundsError, match=r"equity holds 5\.00"):
            ledger.draw_equity(session, "job", None, lines, key="k", now_ms=1)
        with pytest.raises(LedgerError, match="only sites can"):
            ledger.draw_equity(session, "job", None, [("fees", 1)], key="k", now_ms=1)

    database.write("probe", work)
    assert database.read(ledger.balances)["equity"] == 5 * CREDIT


@pytest.mark.parametrize("amount", [0, -1, AMOUNT_MICROS_MAX + 1, 2**70])
def test_no_amount_leaves_the_range_of_the_column(tmp_path: object, amount: int) -> None:
    database = Database(f"sqlite:///{tmp_path}/market.sqlite3")
    upgrade(database)
    database.write("setup", _open)
    with pytest.raises(LedgerError, match="cannot be moved"):
        database.write("probe", lambda session: ledger.deposit(session, "acme", amount, "big", 1))
    database.close()


def test_no_balance_grows_beyond_its_bound(tmp_path: object) -> None:
    database = Database(f"sqlite:///{tmp_path}/market.sqlite3")
    upgrade(database)
    database.write("setup", _open)

    def fill(session: Session) -> None:
        for number in range(BALANCE_MICROS_MAX // AMOUNT_MICROS_MAX + 1):
            ledger.deposit(session, "acme", AMOUNT_MICROS_MAX, f"big-{number}", 1)

    with pytest.raises(LedgerError, match="largest balance"):
        database.write("probe", fill)
    assert database.read(ledger.balances)["tenant/acme"] == 10 * CREDIT
    database.close()


def test_opening_twice_keeps_what_is_there(database: Database) -> None:
    before = database.read(ledger.balances)

    def work(session: Session) -> None:
        ledger.open_accounts(session, 9)
        ledger.open_tenant(session, "acme", 9)
        ledger.open_site(session, "ada", 9)

    database.write("probe", work)
    assert database.read(ledger.balances) == before


def test_two_threads_on_one_account_lose_nothing(database: Database) -> None:
    """Both post to the same site and to fees, and each sends every posting twice."""
    database.write("setup", lambda session: ledger.place_hold(session, _job(session), 1000, 1))

    def post(key: str) -> Callable[[Session], bool]:
        lines = [("site/ada", 4), ("fees", 1)]
        return lambda session: ledger.post(session, "job", "lease", lines, key=key, now_ms=2)

    def hammer(name: str) -> int:
        moved = 0
        for number in range(60):
            key = f"shared-{number}" if number % 3 == 0 else f"{name}-{number}"
            for _ in range(2):
                try:
                    moved += database.write("probe", post(key))
                except BusyError:
                    continue  # said to have changed nothing: the second try is the retry
        return moved

    with ThreadPoolExecutor(2) as threads:
        moved = sum(future.result(WAIT_S) for future in [threads.submit(hammer, name) for name in "ab"])
    assert moved == 20 + 2 * 40
    balances = database.read(ledger.balances)
    assert (balances["site/ada"], balances["fees"], balances["held/acme"]) == (400, 100, 500)
    assert database.read(lambda session: [*check_balances(session), *check_holds(session)]) == []
    posted = select(func.count()).where(Transfer.kind == "post")
    assert database.read(lambda session: session.scalar(posted)) == 2 * moved


def test_two_threads_cannot_set_the_same_credits_aside_twice(database: Database) -> None:
    """Ten credits, two jobs of seven: one wins, whoever it is."""

    def submit(job_id: str) -> bool:
        def work(session: Session) -> bool:
            job = Job(job_id=job_id, tenant_id="acme", name=job_id, state="queued", spec="", submitted_ms=1)
            session.add(job)
            session.flush()
            ledger.place_hold(session, job, 7 * CREDIT, 1)
            return True

        try:
            return database.write("probe", work)
        except InsufficientFundsError:
            return False

    for attempt in range(5):
        names = [f"first-{attempt}", f"second-{attempt}"]
        with ThreadPoolExecutor(2) as threads:
            assert sorted(threads.map(submit, names)) == [False, True]
        winner = database.read(lambda session: session.scalars(select(Hold).where(Hold.closed_ms.is_(None))).one())
        database.write("probe", lambda session, job_id=winner.job_id: ledger.close_hold(session, job_id, 2))


def _open(session: Session) -> None:
    ledger.open_accounts(session, 0)
    session.add(Tenant(tenant_id="acme", name="Acme", created_ms=0))
    ledger.open_tenant(session, "acme", 0)
    ledger.open_site(session, "ada", 0)
    ledger.deposit(session, "acme", 10 * CREDIT, "first", 0, memo="to begin with")
    ledger.fund_equity(session, 5 * CREDIT, "first", 0)
    session.add(Job(job_id="job", tenant_id="acme", name="job", state="queued", spec="", submitted_ms=0))


def _job(session: Session) -> Job:
    return session.get_one(Job, "job")
