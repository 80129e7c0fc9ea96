"""The revisions and the declared tables say the same, on both engines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Inspector, inspect, text
from sqlalchemy.exc import DBAPIError

from broker.database.engine import Database
from broker.database.schema import upgrade
from broker.database.tables import Table

WAIT_S = 30.0


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    yield database
    database.close()


def test_the_revisions_lead_to_the_tables_as_declared(database: Database) -> None:
    upgrade(database)
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Table.metadata) == []


def test_the_revisions_make_every_constraint_that_the_tables_declare(database: Database) -> None:
    """Alembic compares no CHECK and no index predicate; invariants stand in both."""
    with database.migration() as connection:
        Table.metadata.create_all(connection)
    declared = _described(database)
    with database.migration() as connection:
        Table.metadata.drop_all(connection)
    upgrade(database)
    migrated = _described(database)
    migrated.pop("alembic_version")
    assert migrated == declared
    assert "account_not_overdrawn" in json.dumps(migrated)
    assert "state <> 'ended'" in json.dumps(migrated) or "state)::text <> 'ended'" in json.dumps(migrated)


def test_an_upgrade_of_what_is_up_to_date_changes_nothing(database: Database) -> None:
    upgrade(database)
    before = _described(database)
    upgrade(database)
    assert _described(database) == before


def test_processes_that_start_at_once_upgrade_once(database: Database) -> None:
    others = [Database(database.url) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        for future in [threads.submit(upgrade, other) for other in others]:
            future.result(WAIT_S)
    for other in others:
        other.close()
    assert "transfers" in _described(database)


def test_a_failed_upgrade_leaves_nothing_behind(database: Database) -> None:
    with database.migration() as connection:
        # In the way of a table that a revision makes.
        connection.execute(text("CREATE TABLE transfers (transfer_id VARCHAR(10) PRIMARY KEY)"))
    with pytest.raises(DBAPIError):
        upgrade(database)
    assert set(_described(database)) == {"transfers"}


def test_a_transfer_is_never_changed_or_deleted_by_anyone(database: Database) -> None:
    upgrade(database)
    with database.migration() as connection:
        connection.execute(text("INSERT INTO accounts VALUES ('a', 'world', NULL, 0, 0), ('b', 'fees', NULL, 0, 0)"))
        connection.execute(
            text("INSERT INTO transfers VALUES ('deposit/1', 'deposit', 'a', 'b', 5, NULL, NULL, '', 0)")
        )
    statements = [
        "UPDATE transfers SET memo = 'other'",
        "UPDATE transfers SET amount_micros = 6",
        "DELETE FROM transfers",
    ]
    if database.engine.dialect.name == "postgresql":
        statements.append("TRUNCATE transfers")
    for statement in statements:
        with pytest.raises(DBAPIError, match="never changed or deleted"), database.migration() as connection:
            connection.execute(text(statement))
    with database.engine.connect() as connection:
        assert connection.execute(text("SELECT amount_micros, memo FROM transfers")).all() == [(5, "")]


def _described(database: Database) -> dict[str, object]:
    inspector = inspect(database.engine)
    return {table: _described_table(inspector, table) for table in inspector.get_table_names()}


def _described_table(inspector: Inspector, table: str) -> dict[str, object]:
    parts = {
        "columns": inspector.get_columns(table),
        "key": [inspector.get_pk_constraint(table)],
        "checks": inspector.get_check_constraints(table),
        "indexes": inspector.get_indexes(table),
        "references": inspector.get_foreign_keys(table),
        "uniques": inspector.get_unique_constraints(table),
    }
    return {
        name: sorted(json.dumps(item, default=str, sort_keys=True) for item in items) for name, items in parts.items()
    }
