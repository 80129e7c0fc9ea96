"""When jobs were said to start and finish, and when they did."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "forecasts",
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("what", sa.String(length=64), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("family", sa.String(length=64), nullable=False),
        sa.Column("stated_ms", sa.BigInteger(), nullable=False),
        sa.Column("predicted_s", sa.Double(), nullable=False),
        sa.Column("low_ms", sa.BigInteger(), nullable=False),
        sa.Column("middle_ms", sa.BigInteger(), nullable=False),
        sa.Column("high_ms", sa.BigInteger(), nullable=False),
        sa.Column("scored_ms", sa.BigInteger(), nullable=True),
        sa.Column("actual_ms", sa.BigInteger(), nullable=True),
        sa.CheckConstraint("low_ms <= middle_ms AND middle_ms <= high_ms", name="forecast_ordered"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"]),
        sa.PrimaryKeyConstraint("job_id", "what", "number"),
    )
    op.create_index("forecasts_by_family", "forecasts", ["family", "scored_ms"])
