"""Transactions: short reads, and writes that are serial however many processes write.

SQLite (WAL, `BEGIN IMMEDIATE`, `synchronous=FULL`) on one host, PostgreSQL (`SERIALIZABLE`,
retried within a bound) beyond it. Work is handed over as a function, so that a retry can run it
again: it must do nothing but read and write its session. No network call is ever made inside.
"""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Final, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from broker.errors import BusyError

T = TypeVar("T")

SQLITE_BUSY_TIMEOUT_S: Final = 20.0
# As long as SQLite waits for its lock: on a busy machine twenty tries in two seconds were lost by bad luck alone.
SERIALIZATION_RETRIES_MAX: Final = 160
# PostgreSQL's codes for a transaction that must be run again: serialization failure, deadlock.
_RETRY_SQLSTATES: Final = frozenset({"40001", "40P01"})
_VALUE_SQLSTATE_CLASSES: Final = frozenset({"22", "23"})

# The first wait is about as long as a write takes; all together are twenty seconds on average.
BACKOFF_S: Final = 0.004
BACKOFF_S_MAX: Final = 0.25
_RANDOM: Final = random.SystemRandom()

# A read needs one snapshot and no serial order: REPEATABLE READ gives that and can never be made to run again.
_POSTGRESQL_READ: Final = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
_SQLITE_READ: Final = {"hansa_read": True}

CommitHook = Callable[[str], None]


class Database:
    """Opens transactions on one database URL.

    `at_commit` is called with `before:NAME` and `after:NAME` around each named write: the fault
    simulator and the kill tests crash there.
    """

    def __init__(self, url: str, *, at_commit: CommitHook | None = None) -> None:
        """Connect to `url`, a SQLAlchemy URL for SQLite or PostgreSQL (psycopg)."""
        self.url = url
        self._at_commit = at_commit or (lambda _point: None)
        self._is_sqlite = url.startswith("sqlite")
        self.engine = _sqlite_engine(url) if self._is_sqlite else _postgresql_engine(url)
        self._read_options = _SQLITE_READ if self._is_sqlite else _POSTGRESQL_READ

    def read(self, work: Callable[[Session], T]) -> T:
        """Run `work` on one consistent snapshot and return what it returns; a write in it is refused."""
        with Session(self.engine, expire_on_commit=False) as session:
            session.connection(execution_options=self._read_options)
            result = work(session)
            # Let go of the rows first: a rollback would empty them, and readers use them afterwards.
            session.expunge_all()
            session.rollback()
            return result

    def write(self, name: str, work: Callable[[Session], T]) -> T:
        """Run `work` in one serial transaction, commit, and return what it returns.

        `name` is the transaction's name in traces and crash points. `work` may run more than
        once; an exception rolls back and passes on. Raises BusyError when others kept winning.
        """
        for attempt in range(SERIALIZATION_RETRIES_MAX):
            try:
                with Session(self.engine, expire_on_commit=False) as session:
                    if self._is_sqlite:
                        session.connection(execution_options={"hansa_write": True})
                    result = work(session)
                    session.flush()
                    self._at_commit(f"before:{name}")
                    session.commit()
            except DBAPIError as error:
                if _gave_up_waiting(error):
                    break
                if not _must_retry(error):
                    raise
                _back_off(attempt)
                continue
            self._at_commit(f"after:{name}")
            return result
        message = f"the database stayed busy during {name!r}; nothing was changed, try again"
        raise BusyError(message)

    @contextmanager
    def migration(self) -> Iterator[Connection]:
        """Open the one transaction in which a schema is changed, committed where the body ends well."""
        options = {"hansa_write": True} if self._is_sqlite else {"isolation_level": "READ COMMITTED"}
        with self.engine.connect().execution_options(**options) as connection, connection.begin():
            yield connection

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def refuses_the_values(error: DBAPIError) -> bool:
    """Say whether a statement failed for what it was to write: the same would fail again, another would not."""
    if error.connection_invalidated:
        return False
    # SQLSTATE classes 22 and 23 are data and constraints.
    return _sqlstate(error)[:2] in _VALUE_SQLSTATE_CLASSES or isinstance(
        error.orig, sqlite3.IntegrityError | sqlite3.DataError
    )


def _sqlite_engine(url: str) -> Engine:
    engine = create_engine(url, connect_args={"timeout": SQLITE_BUSY_TIMEOUT_S})

    @event.listens_for(engine, "connect")
    def _configure(connection: sqlite3.Connection, _record: object) -> None:
        # The driver's own BEGIN is deferred: two readers that then write would fail. Ours is explicit.
        connection.isolation_level = None
        _enter_wal(connection)
        for pragma in ("synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        options = connection.get_execution_options()
        # The connection may have served a read before, so this is said anew each time.
        connection.exec_driver_sql(f"PRAGMA query_only={int(options.get('hansa_read', False))}")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if options.get("hansa_write", False) else "BEGIN")

    return engine


def _enter_wal(connection: sqlite3.Connection) -> None:
    """Set the journal mode, which stays with the file: only those who open a new one at once compete for it.

    SQLite's busy timeout does not cover this change, so it is tried for as long here.
    """
    give_up_s = time.monotonic() + SQLITE_BUSY_TIMEOUT_S
    for attempt in count():
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if "database is locked" not in str(error) or time.monotonic() > give_up_s:
                raise
            _back_off(attempt)
        else:
            return


def _postgresql_engine(url: str) -> Engine:
    return create_engine(url, isolation_level="SERIALIZABLE", pool_size=8, max_overflow=8, pool_pre_ping=True)


def _must_retry(error: DBAPIError) -> bool:
    return _sqlstate(error) in _RETRY_SQLSTATES


def _sqlstate(error: DBAPIError) -> str:
    """Return PostgreSQL's code for what failed; SQLite has none. Asked by name: not every broker loads psycopg."""
    return getattr(error.orig, "sqlstate", None) or ""


def _gave_up_waiting(error: DBAPIError) -> bool:
    # SQLite has waited for its lock already, for as long as the busy timeout says.
    return "database is locked" in str(error.orig)


def _back_off(attempt: int) -> None:
    """Wait a random time that doubles: with equal ones the same transactions would meet again and again."""
    time.sleep(min(BACKOFF_S * 2 ** min(attempt, 10), BACKOFF_S_MAX) * _RANDOM.random())
