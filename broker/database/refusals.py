"""Tables of what sites refuse: configurations that one vetoed, jobs that its owner will not have."""

from __future__ import annotations

from sqlalchemy import ForeignKey, String
from sqlalchemy.orm import Mapped, mapped_column

from broker.database.tables import Table


class BarredConfiguration(Table):
    """A configuration that a job may not win before `until_round`, because a site vetoed it."""

    __tablename__ = "barred_configurations"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.job_id"), primary_key=True)
    configuration_key: Mapped[str] = mapped_column(String(500), primary_key=True)
    until_round: Mapped[int]
    reason: Mapped[str] = mapped_column(String(1000))


class SiteRefusal(Table):
    """A job that a site's owner refuses: here at all (`scope` site), or beside other sites (gangs), until a time."""

    __tablename__ = "site_refusals"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.job_id"), primary_key=True)
    site_id: Mapped[str] = mapped_column(ForeignKey("sites.site_id"), primary_key=True)
    scope: Mapped[str]
    code: Mapped[str]
    reason: Mapped[str] = mapped_column(String(1000))
    until_ms: Mapped[int]
