"""The table of terms: the price that a placement holds for a stretch of time."""

from __future__ import annotations

from sqlalchemy import CheckConstraint, ForeignKey, Text
from sqlalchemy.orm import Mapped, mapped_column

from broker.database.tables import Table


class Term(Table):
    """The price that was locked for a stretch of a placement's time; without times before the gang is active.

    `round_number` is the round whose prices it has, None for terms from before rounds were written down here.
    """

    __tablename__ = "terms"
    placement_id: Mapped[str] = mapped_column(ForeignKey("placements.placement_id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    award: Mapped[str] = mapped_column(Text)
    starts_ms: Mapped[int | None]
    ends_ms: Mapped[int | None]
    reserved_micros: Mapped[int]
    charged_micros: Mapped[int] = mapped_column(default=0)
    round_number: Mapped[int | None] = mapped_column(ForeignKey("rounds.round_number"))
    __table_args__ = (CheckConstraint("charged_micros <= reserved_micros", name="term_charge_bound"),)
