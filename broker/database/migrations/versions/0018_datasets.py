"""Which datasets a site holds, and what it could bring."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("site_abilities", sa.Column("data", sa.Text(), nullable=False, server_default=""))
