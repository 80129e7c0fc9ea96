"""What a round leaves for the next: the prices of its links, and up to which event it knew the market."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("rounds", sa.Column("link_prices", sa.Text(), nullable=True))
    op.add_column("rounds", sa.Column("events_seen", sa.BigInteger(), nullable=False, server_default="0"))
