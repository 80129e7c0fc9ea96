"""How fast a lease trained between its reports, without its start."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("leases", sa.Column("pace_from_gpu_milliseconds", sa.BigInteger(), nullable=True))
    for name in ("pace_from_samples", "pace_to_gpu_milliseconds", "pace_reports"):
        op.add_column("leases", sa.Column(name, sa.BigInteger(), nullable=False, server_default="0"))
