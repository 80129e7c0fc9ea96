"""Writes are serial, reads see one snapshot, and whoever loses a race runs again: on both engines."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from broker.database import engine as engine_module
from broker.database.engine import SERIALIZATION_RETRIES_MAX, Database
from broker.errors import BusyError

WAIT_S = 30.0


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    database.write("setup", _execute("CREATE TABLE counters (name VARCHAR(20) PRIMARY KEY, value BIGINT NOT NULL)"))
    database.write("setup", _execute("INSERT INTO counters VALUES ('a', 0), ('b', 0)"))
    yield database
    database.close()


def test_a_write_takes_its_lock_before_it_reads_anything(database: Database) -> None:
    seen: list[str] = []
    event.listen(database.engine, "before_cursor_execute", lambda _c, _u, sql, *_: seen.append(sql))
    database.write("probe", _value)
    if database.engine.dialect.name == "sqlite":
        begins = [sql for sql in seen if sql.startswith("BEGIN")]
        assert begins == ["BEGIN IMMEDIATE"]
        assert seen.index("BEGIN IMMEDIATE") < seen.index("SELECT value FROM counters WHERE name = 'a'")
    level = "SHOW transaction_isolation"
    if database.engine.dialect.name == "postgresql":
        assert database.write("probe", lambda session: session.scalar(text(level))) == "serializable"


def test_sqlite_keeps_what_it_acknowledged(database: Database) -> None:
    if database.engine.dialect.name == "postgresql":
        assert database.write("probe", lambda session: session.scalar(text("SHOW server_version"))) is not None
        return
    pragmas = ("journal_mode", "synchronous", "foreign_keys")
    found = database.write("probe", lambda session: [session.scalar(text(f"PRAGMA {name}")) for name in pragmas])
    assert found == ["wal", 2, 1]  # 2 is FULL


def test_a_read_sees_one_snapshot_while_others_commit(database: Database) -> None:
    def read_twice(session: Session) -> tuple[int, int]:
        before = _value(session)
        with ThreadPoolExecutor(1) as other:
            other.submit(database.write, "probe", _increment).result(WAIT_S)
        return before, _value(session)

    assert database.read(read_twice) == (0, 0)
    assert database.read(_value) == 1


def test_a_read_that_writes_is_refused(database: Database) -> None:
    with pytest.raises(DBAPIError, match=r"readonly|read-only"):
        database.read(_increment)
    assert database.read(_value) == 0
    database.write("probe", _increment)  # the connection that went back to the pool may write again
    assert database.read(_value) == 1


def test_an_error_inside_a_write_leaves_nothing_behind(database: Database) -> None:
    def fail(session: Session) -> None:
        _increment(session)
        raise KeyError

    with pytest.raises(KeyError):
        database.write("probe", fail)
    assert database.read(_value) == 0


def test_threads_that_write_the_same_row_lose_nothing(database: Database) -> None:
    with ThreadPoolExecutor(4) as threads:
        for future in [threads.submit(database.write, "probe", _increment) for _ in range(200)]:
            future.result(WAIT_S)
    assert database.read(_value) == 200


def test_processes_that_write_the_same_row_lose_nothing(database: Database) -> None:
    program = (
        "import sys\n"
        "from sqlalchemy import text\n"
        "from broker.database.engine import Database\n"
        "database = Database(sys.argv[1])\n"
        "def work(session):\n"
        "    value = session.scalar(text(\"SELECT value FROM counters WHERE name = 'a'\"))\n"
        "    session.execute(text(\"UPDATE counters SET value = :v WHERE name = 'a'\"), {'v': value + 1})\n"
        "sys.stdin.readline()\n"
        "for _ in range(100):\n"
        "    database.write('probe', work)\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program, database.url], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    results = [ThreadPoolExecutor(1).submit(process.communicate, b"go\n", WAIT_S) for process in processes]
    for process, result in zip(processes, results, strict=True):
        assert result.result(WAIT_S)[1].decode() == ""
        assert process.returncode == 0
    assert database.read(_value) == 200


def test_two_that_read_before_either_writes_are_made_serial(database: Database) -> None:
    """The classic write skew: each reads both rows and writes one of them."""
    met = threading.Barrier(2)
    attempts = dict.fromkeys("ab", 0)

    def work(name: str) -> Callable[[Session], None]:
        def skew(session: Session) -> None:
            attempts[name] += 1
            total = _total(session)
            if attempts[name] == 1 and database.engine.dialect.name == "postgresql":
                met.wait(WAIT_S)  # SQLite lets only one in at a time
            session.execute(text("UPDATE counters SET value = :value WHERE name = :name"), _row(name, total + 1))

        return skew

    with ThreadPoolExecutor(2) as threads:
        for future in [threads.submit(database.write, "probe", work(name)) for name in "ab"]:
            future.result(WAIT_S)
    values = sorted(database.read(lambda session: list(session.scalars(text("SELECT value FROM counters")))))
    assert values == [1, 2]  # in either order, but never 1 and 1
    if database.engine.dialect.name == "postgresql":
        assert sum(attempts.values()) == 3


def test_two_that_insert_the_same_key_are_made_serial(database: Database) -> None:
    """Neither sees the other's row when it looks first; the loser must find it, not fail."""
    met = threading.Barrier(2)
    attempts = [0, 0]

    def insert_once(number: int) -> Callable[[Session], bool]:
        def work(session: Session) -> bool:
            attempts[number] += 1
            found = session.scalar(text("SELECT 1 FROM counters WHERE name = 'new'"))
            if attempts[number] == 1 and database.engine.dialect.name == "postgresql":
                met.wait(WAIT_S)
            if found is None:
                session.execute(text("INSERT INTO counters VALUES ('new', 1)"))
            return found is None

        return work

    with ThreadPoolExecutor(2) as threads:
        futures = [threads.submit(database.write, "probe", insert_once(number)) for number in (0, 1)]
        assert sorted(future.result(WAIT_S) for future in futures) == [False, True]


def test_who_loses_every_time_is_told_that_nothing_was_changed(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "SQLITE_BUSY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(engine_module, "BACKOFF_S_MAX", 0.001)
    database = Database(database_url)
    attempts = 0

    def lose(session: Session) -> None:
        nonlocal attempts
        attempts += 1
        session.execute(text("DO $$ BEGIN RAISE EXCEPTION 'lost' USING ERRCODE = '40001'; END $$"))

    if database.engine.dialect.name == "postgresql":
        with pytest.raises(BusyError, match="nothing was changed"):
            database.write("probe", lose)
        assert attempts == SERIALIZATION_RETRIES_MAX
    else:
        with database.migration(), pytest.raises(BusyError, match="nothing was changed"):
            database.write("probe", lose)
        assert attempts == 0
    database.close()


def test_a_failure_that_is_no_race_is_passed_on_at_once(database: Database) -> None:
    attempts = 0

    def break_the_key(session: Session) -> None:
        nonlocal attempts
        attempts += 1
        session.execute(text("INSERT INTO counters VALUES ('a', 1)"))

    with pytest.raises(DBAPIError, match=r"counters"):
        database.write("probe", break_the_key)
    assert attempts == 1


def test_the_commit_is_announced_before_and_after(database_url: str) -> None:
    points: list[str] = []
    database = Database(database_url, at_commit=points.append)
    database.write("setup", _execute("CREATE TABLE counters (name VARCHAR(20) PRIMARY KEY, value BIGINT NOT NULL)"))
    database.read(_count)
    assert points == ["before:setup", "after:setup"]
    database.close()


def test_a_crash_before_the_commit_leaves_nothing_and_one_after_it_everything(database: Database) -> None:
    class Crash(BaseException):
        """What `kill -9` is to a process: nobody handles it."""

    def crash_at(point: str) -> Callable[[str], None]:
        def hook(reached: str) -> None:
            if reached == point:
                raise Crash

        return hook

    for point, value in (("before:probe", 0), ("after:probe", 1)):
        crashing = Database(database.url, at_commit=crash_at(point))
        with pytest.raises(Crash):
            crashing.write("probe", _increment)
        crashing.close()
        assert database.read(_value) == value


def test_several_may_open_a_new_sqlite_file_at_once(tmp_path: object) -> None:
    for attempt in range(10):
        url = f"sqlite:///{tmp_path}/new-{attempt}.sqlite3"
        start = threading.Barrier(6)

        def open_and_write(url: str = url, start: threading.Barrier = start) -> None:
            database = Database(url)
            start.wait(WAIT_S)
            database.write("probe", _execute("CREATE TABLE IF NOT EXISTS counters (name VARCHAR(20))"))
            database.close()

        with ThreadPoolExecutor(6) as threads:
            for future in [threads.submit(open_and_write) for _ in range(6)]:
                future.result(WAIT_S)


def _execute(sql: str) -> Callable[[Session], None]:
    def work(session: Session) -> None:
        session.execute(text(sql))

    return work


def _value(session: Session) -> int:
    return int(session.scalar(text("SELECT value FROM counters WHERE name = 'a'")) or 0)


def _total(session: Session) -> int:
    return int(session.scalar(text("SELECT SUM(value) FROM counters")) or 0)


def _count(session: Session) -> int:
    return int(session.scalar(text("SELECT COUNT(*) FROM counters")) or 0)


def _increment(session: Session) -> None:
    value = _value(session)
    session.execute(text("UPDATE counters SET value = :value WHERE name = :name"), _row("a", value + 1))


def _row(name: str, value: int) -> dict[str, object]:
    return {"name": name, "value": value}
