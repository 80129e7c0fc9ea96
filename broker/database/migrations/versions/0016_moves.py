"""Moves of running placements, and whose place a lease's site took."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "moves",
        sa.Column("move_id", sa.String(length=64), nullable=False),
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("placement_id", sa.String(length=64), nullable=False),
        sa.Column("round_number", sa.BigInteger(), nullable=True),
        sa.Column("state", sa.String(length=64), nullable=False),
        sa.Column("award", sa.Text(), nullable=True),
        sa.Column("in_place", sa.Boolean(), nullable=False),
        sa.Column("leaving", sa.Text(), nullable=False),
        sa.Column("heirs", sa.Text(), nullable=False),
        sa.Column("before_key", sa.String(length=500), nullable=False),
        sa.Column("after_key", sa.String(length=500), nullable=False),
        sa.Column("restart_micros", sa.BigInteger(), nullable=False),
        sa.Column("opened_ms", sa.BigInteger(), nullable=False),
        sa.Column("until_monotonic_ms", sa.BigInteger(), nullable=False),
        sa.Column("until_era", sa.String(length=64), nullable=False),
        sa.Column("ended_ms", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"]),
        sa.ForeignKeyConstraint(["placement_id"], ["placements.placement_id"]),
        sa.ForeignKeyConstraint(["round_number"], ["rounds.round_number"]),
        sa.PrimaryKeyConstraint("move_id"),
    )
    op.create_index("moves_by_placement", "moves", ["placement_id"])
    op.create_index(
        "one_open_move_per_job",
        "moves",
        ["job_id"],
        unique=True,
        sqlite_where=sa.text("state = 'leaving'"),
        postgresql_where=sa.text("state = 'leaving'"),
    )
    op.add_column("leases", sa.Column("heir_of", sa.String(length=64), nullable=True))
