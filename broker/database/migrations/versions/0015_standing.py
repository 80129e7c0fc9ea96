"""What stands now, found among all that ever was: nothing that runs with every beat reads history any more."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # SQLite's queries ask for `live = 1`, and did not use an index over `live`.
    op.drop_index("one_live_lease_per_gpu", "leased_gpus")
    op.create_index(
        "one_live_lease_per_gpu",
        "leased_gpus",
        ["site_id", "gpu_id"],
        unique=True,
        sqlite_where=sa.text("live = 1"),
        postgresql_where=sa.text("live"),
    )
    op.create_index(op.f("ix_leases_job_id"), "leases", ["job_id"])
    for name, table, columns, condition in (
        ("standing_leases", "leases", ["site_id"], "state <> 'ended'"),
        ("leases_by_start", "leases", ["active_ms"], "delivered_samples > 0"),
        ("open_holds", "holds", ["job_id"], "closed_ms IS NULL"),
        ("forecasts_unscored", "forecasts", ["job_id"], "scored_ms IS NULL"),
    ):
        where = sa.text(condition)
        op.create_index(name, table, columns, sqlite_where=where, postgresql_where=where)
    op.create_index("certificates_by_economics", "round_certificates", ["economics", "round_number"])
