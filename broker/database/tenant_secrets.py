"""The table of tenants' secrets: ciphertext alone (`broker.tenant_secrets`)."""

from __future__ import annotations

from sqlalchemy import ForeignKey, LargeBinary
from sqlalchemy.orm import Mapped, mapped_column

from broker.database.tables import Table


class TenantSecret(Table):
    """A secret that a tenant stored for its jobs. `sealed` is nonce and ciphertext, bound to tenant and name."""

    __tablename__ = "tenant_secrets"
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.tenant_id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    sealed: Mapped[bytes] = mapped_column(LargeBinary)
    set_ms: Mapped[int]
