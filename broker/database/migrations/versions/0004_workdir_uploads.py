"""Who brought a workdir, what a lease sent to whom; a cancelled job's time of request was its end's."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "workdir_uploads",
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["digest"], ["artifacts.digest"]),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.tenant_id"]),
        sa.PrimaryKeyConstraint("tenant_id", "digest"),
    )
    # A job was accepted with it: its tenant has had it.
    op.execute(
        "INSERT INTO workdir_uploads (tenant_id, digest, created_ms) "
        "SELECT jobs.tenant_id, job_artifacts.digest, MIN(job_artifacts.created_ms) FROM job_artifacts "
        "JOIN jobs ON jobs.job_id = job_artifacts.job_id WHERE job_artifacts.kind = 'workdir' "
        "GROUP BY jobs.tenant_id, job_artifacts.digest"
    )
    op.drop_column("jobs", "cancel_requested_ms")
    op.add_column("leases", sa.Column("egress", sa.Text(), nullable=True))
