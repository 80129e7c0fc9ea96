"""A person who runs a site, and what they wish it to offer."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Written out: both engines take a reference with a new column, Alembic writes it as a change that SQLite refuses.
    op.execute("ALTER TABLE users ADD COLUMN site_id VARCHAR(64) REFERENCES sites (site_id)")
    op.create_table(
        "site_wishes",
        sa.Column("site_id", sa.String(length=64), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("asks", sa.Text(), nullable=False),
        sa.Column("draining", sa.Boolean(), nullable=True),
        sa.Column("asked_ms", sa.BigInteger(), nullable=False),
        sa.Column("answered", sa.BigInteger(), nullable=False),
        sa.Column("answer", sa.String(length=1000), nullable=False),
        sa.ForeignKeyConstraint(["site_id"], ["sites.site_id"]),
        sa.PrimaryKeyConstraint("site_id"),
    )
