"""A placement's terms keep their prices, and a report of usage has a row for each term that it fell into."""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_COPY: Final = """
INSERT INTO usage_reports
SELECT lease_id, sequence, 1, epoch, gpu_milliseconds, samples, egress, price_micros_per_gpu_hour,
       payout_micros_per_gpu_hour, gpu_micros, rent_micros, egress_micros, discount_micros, cut_micros, charge_micros,
       uplift_micros, payout_micros, link_revenue_micros, fee_micros, received_ms
FROM former_usage_reports
"""


def upgrade() -> None:
    op.create_table(
        "terms",
        sa.Column("placement_id", sa.String(length=64), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("award", sa.Text(), nullable=False),
        sa.Column("starts_ms", sa.BigInteger(), nullable=True),
        sa.Column("ends_ms", sa.BigInteger(), nullable=True),
        sa.Column("reserved_micros", sa.BigInteger(), nullable=False),
        sa.Column("charged_micros", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("charged_micros <= reserved_micros", name="term_charge_bound"),
        sa.ForeignKeyConstraint(["placement_id"], ["placements.placement_id"]),
        sa.PrimaryKeyConstraint("placement_id", "number"),
    )
    # What was renewed before is one term at its newest price: its former prices were not kept.
    op.execute(
        "INSERT INTO terms (placement_id, number, award, starts_ms, ends_ms, reserved_micros, charged_micros) "
        "SELECT placement_id, 1, award, active_ms, term_ends_ms, reserved_micros, charged_micros FROM placements"
    )
    op.add_column("leases", sa.Column("usage_until_ms", sa.BigInteger(), nullable=True))
    if op.get_bind().dialect.name == "postgresql":
        op.add_column("usage_reports", sa.Column("term", sa.BigInteger(), nullable=False, server_default="1"))
        op.alter_column("usage_reports", "term", server_default=None)
        op.drop_constraint("usage_reports_pkey", "usage_reports", type_="primary")
        op.create_primary_key("usage_reports_pkey", "usage_reports", ["lease_id", "sequence", "term"])
    else:
        _remake_usage_reports()


def _remake_usage_reports() -> None:
    """SQLite changes a primary key only by making the table anew."""
    op.rename_table("usage_reports", "former_usage_reports")
    op.create_table(
        "usage_reports",
        sa.Column("lease_id", sa.String(length=64), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("term", sa.BigInteger(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("gpu_milliseconds", sa.BigInteger(), nullable=False),
        sa.Column("samples", sa.BigInteger(), nullable=False),
        sa.Column("egress", sa.Text(), nullable=False),
        sa.Column("price_micros_per_gpu_hour", sa.BigInteger(), nullable=False),
        sa.Column("payout_micros_per_gpu_hour", sa.BigInteger(), nullable=False),
        sa.Column("gpu_micros", sa.BigInteger(), nullable=False),
        sa.Column("rent_micros", sa.BigInteger(), nullable=False),
        sa.Column("egress_micros", sa.BigInteger(), nullable=False),
        sa.Column("discount_micros", sa.BigInteger(), nullable=False),
        sa.Column("cut_micros", sa.BigInteger(), nullable=False),
        sa.Column("charge_micros", sa.BigInteger(), nullable=False),
        sa.Column("uplift_micros", sa.BigInteger(), nullable=False),
        sa.Column("payout_micros", sa.BigInteger(), nullable=False),
        sa.Column("link_revenue_micros", sa.BigInteger(), nullable=False),
        sa.Column("fee_micros", sa.BigInteger(), nullable=False),
        sa.Column("received_ms", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "charge_micros + uplift_micros = payout_micros + link_revenue_micros + fee_micros", name="usage_balanced"
        ),
        sa.CheckConstraint(
            "gpu_micros + rent_micros + egress_micros - discount_micros - cut_micros = charge_micros",
            name="usage_charge_explained",
        ),
        sa.ForeignKeyConstraint(["lease_id"], ["leases.lease_id"]),
        sa.PrimaryKeyConstraint("lease_id", "sequence", "term"),
    )
    op.execute(_COPY)
    op.drop_table("former_usage_reports")
