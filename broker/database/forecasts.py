"""The table of forecasts: when a job was said to start or finish, kept as it was said and scored once it is known."""

from __future__ import annotations

from sqlalchemy import CheckConstraint, ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from broker.database.tables import Table, where


class Forecast(Table):
    """One interval as it was stated. `what` is start or finish; `family` says whose past it was drawn from.

    `number` is the epoch under which the job ran when its finish was stated, 0 while it waited. `predicted_s` is the
    plain prediction that the interval was laid around, `middle_ms` the single best guess. Once the job has started,
    or ended, `scored_ms` says when that was written down, and `actual_ms` when it happened: None where it never did.
    """

    __tablename__ = "forecasts"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.job_id"), primary_key=True)
    what: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    family: Mapped[str]
    stated_ms: Mapped[int]
    predicted_s: Mapped[float]
    low_ms: Mapped[int]
    middle_ms: Mapped[int]
    high_ms: Mapped[int]
    scored_ms: Mapped[int | None]
    actual_ms: Mapped[int | None]
    __table_args__ = (
        CheckConstraint("low_ms <= middle_ms AND middle_ms <= high_ms", name="forecast_ordered"),
        Index("forecasts_by_family", "family", "scored_ms"),
        Index("forecasts_unscored", "job_id", **where("scored_ms IS NULL")),
    )
