"""The table of what a site's agent can do for a job beyond running it, as its heartbeats say."""

from __future__ import annotations

from sqlalchemy import ForeignKey, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from broker.database.tables import Table


class SiteAbilities(Table):
    """What a site can do (`sites.protocol.Skill`); `skills` is space-separated, those that this broker knows.

    `data` is its part in datasets (`sites.protocol.SiteData`) as JSON, empty where it takes none.
    """

    __tablename__ = "site_abilities"
    site_id: Mapped[str] = mapped_column(ForeignKey("sites.site_id"), primary_key=True)
    skills: Mapped[str] = mapped_column(String(400), default="")
    data: Mapped[str] = mapped_column(Text, default="", server_default="")
