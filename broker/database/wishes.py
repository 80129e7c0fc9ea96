"""The table of operators' wishes: what they would have their site offer, for its agent to take or to refuse."""

from __future__ import annotations

from sqlalchemy import ForeignKey, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from broker.database.tables import Table


class SiteWish(Table):
    """What a site's operator asked for in the portal. `number` rises with each wish.

    `asks` are micro-credits per GPU-hour by GPU type as JSON; `draining` None leaves that to the site. `answered` is the
    number that the site has answered, `answer` its words where it refused something.
    """

    __tablename__ = "site_wishes"
    site_id: Mapped[str] = mapped_column(ForeignKey("sites.site_id"), primary_key=True)
    number: Mapped[int]
    asks: Mapped[str] = mapped_column(Text)
    draining: Mapped[bool | None]
    asked_ms: Mapped[int]
    answered: Mapped[int] = mapped_column(default=0)
    answer: Mapped[str] = mapped_column(String(1000), default="")
