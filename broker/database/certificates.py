"""The table of what the market signs about its rounds."""

from __future__ import annotations

from sqlalchemy import ForeignKey, Index, Text
from sqlalchemy.orm import Mapped, mapped_column

from broker.database.tables import Table


class RoundCertificate(Table):
    """What the market signs about a round: at its commit, and again once its economics are known.

    `document` is the signed document as JSON (`broker.rounds.certificate`). `economics` is pending, done or
    left_out; `sites` are the sites' own rows, which the document names by digest.
    """

    __tablename__ = "round_certificates"
    round_number: Mapped[int] = mapped_column(ForeignKey("rounds.round_number"), primary_key=True)
    economics: Mapped[str]
    document: Mapped[str] = mapped_column(Text)
    sites: Mapped[str] = mapped_column(Text, default="[]")
    signed_ms: Mapped[int]
    __table_args__ = (Index("certificates_by_economics", "economics", "round_number"),)
