"""Alembic's entry: run revisions on the connection that `broker.database.schema` hands over."""

from __future__ import annotations

from alembic import context

from broker.database.tables import Table

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Table.metadata,
    # Both engines roll back DDL (SQLite because the engine issues BEGIN itself), so an upgrade is whole or nothing.
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
