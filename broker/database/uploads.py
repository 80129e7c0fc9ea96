"""Tables of who has brought which file: a digest alone is no pass (`broker.uploads`)."""

from __future__ import annotations

from sqlalchemy import ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from broker.database.tables import Table


class WorkdirUpload(Table):
    """A workdir that a tenant has brought itself: only by that may its jobs name the digest."""

    __tablename__ = "workdir_uploads"
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.tenant_id"), primary_key=True)
    digest: Mapped[str] = mapped_column(ForeignKey("artifacts.digest"), primary_key=True)
    created_ms: Mapped[int]


class SiteUpload(Table):
    """A file that a site has brought itself: only by that may it name the digest as a job's."""

    __tablename__ = "site_uploads"
    site_id: Mapped[str] = mapped_column(ForeignKey("sites.site_id"), primary_key=True)
    digest: Mapped[str] = mapped_column(ForeignKey("artifacts.digest"), primary_key=True)
    created_ms: Mapped[int]
