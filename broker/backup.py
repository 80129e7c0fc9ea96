"""Backup and restore: the whole market in one folder, written while the market goes on.

    FOLDER/market.sqlite3    every row, as one transaction saw them, whichever engine the market uses
    FOLDER/keys/             the market's keys: who reads a backup can speak as the market
    FOLDER/artifacts/        workdirs, checkpoints, outputs, snapshots
    FOLDER/streams/          logs and measurements
    FOLDER/backup.json       when, of which market, how many rows; written last, so that without it nothing is whole

Rows come first and files after them: a file is there before a row names it, and its content never changes, so what the
rows name is in the copy, but for what retention took away in between. Since rows are kept apart from the engine, a
backup of a SQLite market restores into PostgreSQL and the other way round.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Final

from sqlalchemy import Connection, func, insert, select, text
from sqlalchemy.orm import Session

from broker.database.engine import Database
from broker.database.schema import upgrade
from broker.database.tables import Event, MarketState, Round, Table
from broker.errors import BrokerError
from broker.market import Market
from broker.settings import Settings
from broker.transitions import record_event
from training.clock import Clock

DATABASE_FILE: Final = "market.sqlite3"
MANIFEST_FILE: Final = "backup.json"
FOLDERS: Final = ("keys", "artifacts", "streams")
# Uploads under way and locks belong to the processes of the moment.
_NOT_COPIED: Final = shutil.ignore_patterns("partial", "locks")
ROWS_PER_INSERT: Final = 500
MANIFEST_BYTES_MAX: Final = 100_000


class BackupError(BrokerError):
    """A backup cannot be written or read as things stand; nothing was changed."""

    code: ClassVar[str] = "backup.refused"
    status = 409


@dataclass(frozen=True, slots=True)
class Backup:
    """What a backup holds."""

    market: str
    taken_ms: int
    rows: int
    round_number: int | None
    files_bytes: int


def back_up(market: Market, folder: Path) -> Backup:
    """Write the market to `folder`, which must not exist yet; the market may be in full use.

    Raises BackupError where the folder is there.
    """
    if folder.exists():
        raise BackupError(f"{folder} is there already; name a folder that is not, so that no backup is half of another")
    folder.mkdir(mode=0o700, parents=True)
    taken_ms = market.clock.now_ms()
    copy = Database(f"sqlite:///{(folder / DATABASE_FILE).resolve()}")
    try:
        upgrade(copy)
        with copy.migration() as target:
            _empty(target)
            rows, newest = market.database.read(lambda session: (_copy_rows(session, target), _newest_round(session)))
    finally:
        copy.close()
    home = market.settings.home
    for name in FOLDERS:
        if (home / name).is_dir():
            shutil.copytree(home / name, folder / name, ignore=_NOT_COPIED, ignore_dangling_symlinks=True)
    backup = Backup(
        market=market.settings.market_name,
        taken_ms=taken_ms,
        rows=rows,
        round_number=newest,
        files_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
    )
    (folder / MANIFEST_FILE).write_text(json.dumps(asdict(backup), indent=2) + "\n")
    return backup


def restore(settings: Settings, folder: Path, clock: Clock) -> Backup:
    """Fill an empty home and an empty database from `folder`, and leave the market frozen.

    Frozen, because what was leased after the backup is not known here: an admin thaws it once every such lease has run
    out. Raises BackupError where the backup is not whole or the target is not empty.
    """
    backup = _read_manifest(folder)
    home = settings.home
    if any((home / name).exists() for name in FOLDERS):
        raise BackupError(f"{home} holds a market already; set HANSA_HOME to an empty folder, or move it away first")
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Worked on as a copy: the backup may have an older schema, and stays as it was written.
    staged = home / f"restoring-{DATABASE_FILE}"
    shutil.copy(folder / DATABASE_FILE, staged)
    source, target = Database(f"sqlite:///{staged.resolve()}"), Database(settings.resolved_database_url)
    try:
        upgrade(source)
        upgrade(target)
        with target.migration() as connection:
            if connection.scalar(select(func.count()).select_from(Event)):
                raise BackupError("the database holds a market already; set HANSA_DATABASE_URL to an empty one")
            _empty(connection)
            source.read(lambda session: _copy_rows(session, connection))
            _set_serials(connection)
        target.write("freeze restored", lambda session: _freeze(session, clock.now_ms(), backup))
    finally:
        source.close()
        target.close()
        for path in home.glob(f"{staged.name}*"):
            path.unlink()
    for name in FOLDERS:
        if (folder / name).is_dir():
            shutil.copytree(folder / name, home / name)
    return backup


def _copy_rows(source: Session, target: Connection) -> int:
    """Copy every row of the source's one transaction, parents before children; return how many."""
    copied = 0
    for table in Table.metadata.sorted_tables:
        rows = iter(source.execute(select(table).execution_options(yield_per=ROWS_PER_INSERT)).mappings())
        while batch := [dict(row) for row in islice(rows, ROWS_PER_INSERT)]:
            target.execute(insert(table), batch)
            copied += len(batch)
    return copied


def _empty(connection: Connection) -> None:
    """Take away what the migrations themselves put into a new schema."""
    for table in reversed(Table.metadata.sorted_tables):
        if connection.scalar(select(func.count()).select_from(table)):
            connection.execute(table.delete())


def _set_serials(connection: Connection) -> None:
    """Let PostgreSQL number on after the restored rows; SQLite does so by itself."""
    if connection.dialect.name != "postgresql":
        return
    key = Event.__table__.c.event_id
    newest = connection.scalar(select(func.max(key)))
    if newest:
        sequence = text("SELECT setval(pg_get_serial_sequence('events', 'event_id'), :newest)")
        connection.execute(sequence, {"newest": newest})


def _newest_round(session: Session) -> int | None:
    number: int | None = session.scalar(select(func.max(Round.round_number)))
    return number


def _freeze(session: Session, now_ms: int, backup: Backup) -> None:
    state = session.get(MarketState, 1)
    if state is None or state.frozen_ms is not None:
        return
    state.frozen_ms = now_ms
    detail = f"restored from a backup of {backup.taken_ms} ms; thaw once all leases made since then have run out"
    record_event(session, "market", now_ms=now_ms, after="frozen", detail=detail, actor="restore")


def _read_manifest(folder: Path) -> Backup:
    path = folder / MANIFEST_FILE
    try:
        document: dict[str, Any] = json.loads(path.read_bytes()[:MANIFEST_BYTES_MAX])
        return Backup(**document)
    except FileNotFoundError:
        raise BackupError(f"{folder} is no whole backup: it has no {MANIFEST_FILE}; take another") from None
    except (ValueError, TypeError):
        raise BackupError(f"{path} cannot be read as what `hansa admin backup` writes; take another backup") from None
