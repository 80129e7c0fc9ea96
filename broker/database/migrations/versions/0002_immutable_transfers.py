"""A transfer is never changed or deleted: the database itself refuses it (invariant 3)."""

from __future__ import annotations

from typing import Final

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

SQLITE: Final = tuple(
    f"""CREATE TRIGGER transfers_refuse_{verb.lower()} BEFORE {verb} ON transfers
        BEGIN SELECT RAISE(ABORT, 'a transfer is never changed or deleted'); END"""
    for verb in ("UPDATE", "DELETE")
)
POSTGRESQL: Final = (
    """CREATE FUNCTION transfers_refuse() RETURNS trigger LANGUAGE plpgsql AS $$
       BEGIN RAISE EXCEPTION 'a transfer is never changed or deleted'; END $$""",
    """CREATE TRIGGER transfers_refuse_change BEFORE UPDATE OR DELETE ON transfers
       FOR EACH ROW EXECUTE FUNCTION transfers_refuse()""",
    """CREATE TRIGGER transfers_refuse_truncate BEFORE TRUNCATE ON transfers
       FOR EACH STATEMENT EXECUTE FUNCTION transfers_refuse()""",
)


def upgrade() -> None:
    for statement in SQLITE if op.get_bind().dialect.name == "sqlite" else POSTGRESQL:
        op.execute(statement)
