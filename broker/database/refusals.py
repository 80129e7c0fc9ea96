"""The table of what sites' owners refuse."""

from __future__ import annotations

from sqlalchemy import ForeignKey, String
from sqlalchemy.orm import Mapped, mapped_column

from broker.database.tables import Table


class SiteRefusal(Table):
    """A job that a site's owner refuses: here at all (`scope` site), or beside other sites (gangs), until a time."""

    __tablename__ = "site_refusals"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.job_id"), primary_key=True)
    site_id: Mapped[str] = mapped_column(ForeignKey("sites.site_id"), primary_key=True)
    scope: Mapped[str]
    code: Mapped[str]
    reason: Mapped[str] = mapped_column(String(1000))
    until_ms: Mapped[int]
