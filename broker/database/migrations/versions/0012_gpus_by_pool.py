"""What a round and the market's page count of every pool, found without reading every GPU."""

from __future__ import annotations

from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("gpus_by_pool", "gpus", ["pool_id", "present"])
