"""A round's signed certificate, the round behind each term, who asked for what, and how buyers are charged."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "round_certificates",
        sa.Column("round_number", sa.BigInteger(), nullable=False),
        sa.Column("economics", sa.String(length=64), nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.Column("sites", sa.Text(), nullable=False),
        sa.Column("signed_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["round_number"], ["rounds.round_number"]),
        sa.PrimaryKeyConstraint("round_number"),
    )
    op.add_column("tenants", sa.Column("home_site", sa.String(length=64), nullable=True))
    op.add_column("events", sa.Column("actor", sa.String(length=120), nullable=True))
    op.add_column(
        "market_state",
        sa.Column("payment_rule", sa.String(length=64), nullable=False, server_default="uniform"),
    )
    op.add_column("placements", sa.Column("lane", sa.String(length=64), nullable=False, server_default="round"))
    # Written out: both engines take a reference with a new column, Alembic writes it as a change that SQLite refuses.
    op.execute("ALTER TABLE terms ADD COLUMN round_number BIGINT REFERENCES rounds (round_number)")
    # The first term has the round that placed it; the rounds of renewals were not kept.
    op.execute(
        "UPDATE terms SET round_number = (SELECT placements.round_number FROM placements "
        "WHERE placements.placement_id = terms.placement_id) WHERE number = 1"
    )
