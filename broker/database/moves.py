"""The table of moves: a running placement that a round gave other GPUs, from its round until its sites have left."""

from __future__ import annotations

from typing import Final

from sqlalchemy import Boolean, ForeignKey, Index, String, Text, text
from sqlalchemy.orm import Mapped, mapped_column

from broker.database.tables import Table

_OPEN: Final = text("state = 'leaving'")


class Move(Table):
    """What becomes of a placement once the sites in `leaving` have stopped with a checkpoint.

    `award` is what the round gave it instead; None where its term was not renewed and it only stops. `in_place` keeps the
    placement and its other sites; else all leave, and another placement follows. `heirs` maps a site that joins to the
    one whose place it takes. The sites have until `until_monotonic_ms` (of `until_era`), then they are stopped as they are.
    """

    __tablename__ = "moves"
    move_id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.job_id"))
    placement_id: Mapped[str] = mapped_column(ForeignKey("placements.placement_id"))
    round_number: Mapped[int | None] = mapped_column(ForeignKey("rounds.round_number"))
    state: Mapped[str]
    award: Mapped[str | None] = mapped_column(Text)
    in_place: Mapped[bool] = mapped_column(Boolean)
    leaving: Mapped[str] = mapped_column(Text)
    heirs: Mapped[str] = mapped_column(Text)
    before_key: Mapped[str] = mapped_column(String(500))
    after_key: Mapped[str] = mapped_column(String(500))
    restart_micros: Mapped[int]
    opened_ms: Mapped[int]
    until_monotonic_ms: Mapped[int]
    until_era: Mapped[str]
    ended_ms: Mapped[int | None]
    __table_args__ = (
        Index("one_open_move_per_job", "job_id", unique=True, sqlite_where=_OPEN, postgresql_where=_OPEN),
        Index("moves_by_placement", "placement_id"),
    )
