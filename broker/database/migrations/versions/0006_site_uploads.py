"""Which site brought which file, when a lease ran by the monotonic clock, and how far the sweep has come."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "site_uploads",
        sa.Column("site_id", sa.String(length=64), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["digest"], ["artifacts.digest"]),
        sa.ForeignKeyConstraint(["site_id"], ["sites.site_id"]),
        sa.PrimaryKeyConstraint("site_id", "digest"),
    )
    # What was taken as a site's checkpoint or output was reported by it: it goes on without a second upload.
    op.execute(
        "INSERT INTO site_uploads (site_id, digest, created_ms) "
        "SELECT site_id, digest, MIN(created_ms) FROM job_artifacts WHERE site_id IS NOT NULL "
        "GROUP BY site_id, digest"
    )
    for instant in ("active", "ended"):
        op.add_column("leases", sa.Column(f"{instant}_monotonic_ms", sa.BigInteger(), nullable=True))
        op.add_column("leases", sa.Column(f"{instant}_era", sa.String(length=64), nullable=True))
    for kind in ("documents", "streams"):
        op.add_column(
            "market_state", sa.Column(f"{kind}_swept_to", sa.BigInteger(), nullable=False, server_default="0")
        )
