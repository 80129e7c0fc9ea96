"""What a tenant may spend in an hour over all of its jobs, and how many GPUs it is to have at least."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("tenants", sa.Column("budget_micros_per_hour", sa.BigInteger(), nullable=True))
    op.add_column("tenants", sa.Column("floor_gpus", sa.BigInteger(), nullable=True))
