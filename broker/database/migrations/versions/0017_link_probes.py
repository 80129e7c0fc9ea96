"""Probes of the links between sites, what they measured, and what each site's owner allows of them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("sites", sa.Column("probe_terms", sa.Text(), nullable=True))
    op.create_table(
        "link_probes",
        sa.Column("probe_id", sa.String(length=64), nullable=False),
        sa.Column("dialler", sa.String(length=64), nullable=False),
        sa.Column("listener", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=64), nullable=False),
        sa.Column("bytes_max", sa.BigInteger(), nullable=False),
        sa.Column("bytes_charged", sa.BigInteger(), nullable=False),
        sa.Column("asked_ms", sa.BigInteger(), nullable=False),
        sa.Column("expires_ms", sa.BigInteger(), nullable=False),
        sa.Column("ended_ms", sa.BigInteger(), nullable=True),
        sa.Column("address", sa.String(length=300), nullable=True),
        sa.Column("dialler_key", sa.String(length=64), nullable=True),
        sa.Column("listener_key", sa.String(length=64), nullable=True),
        sa.Column("dialler_certificate", sa.Text(), nullable=True),
        sa.Column("listener_certificate", sa.Text(), nullable=True),
        sa.Column("dialler_report", sa.Text(), nullable=True),
        sa.Column("listener_report", sa.Text(), nullable=True),
        sa.Column("detail", sa.String(length=1000), nullable=False),
        sa.PrimaryKeyConstraint("probe_id"),
    )
    op.create_index("link_probes_by_time", "link_probes", ["asked_ms"])
    op.create_index("link_probes_by_state", "link_probes", ["state"])
    op.create_table(
        "link_measurements",
        sa.Column("source", sa.String(length=64), nullable=False),
        sa.Column("target", sa.String(length=64), nullable=False),
        sa.Column("probe_id", sa.String(length=64), nullable=False),
        sa.Column("measured_ms", sa.BigInteger(), nullable=False),
        sa.Column("bandwidth_bits_per_s", sa.Double(), nullable=False),
        sa.Column("delay_s", sa.Double(), nullable=True),
        sa.Column("loss", sa.Double(), nullable=True),
        sa.Column("sent_bits_per_s", sa.Double(), nullable=False),
        sa.Column("received_bits_per_s", sa.Double(), nullable=False),
        sa.Column("disagreement", sa.String(length=1000), nullable=False),
        sa.PrimaryKeyConstraint("source", "target", "probe_id"),
    )
