"""The tables of link probes: who was asked when and what came of it, and what was measured of each direction."""

from __future__ import annotations

from sqlalchemy import Index, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from broker.database.tables import Table


class LinkProbe(Table):
    """A probe of the links between two sites, both ways. `state` is asked, running, done or failed.

    `bytes_charged` counts against both sites' bytes of a day: the most it may move while it lives, then what it moved.
    Keys are Ed25519 in hex, `…_report` what each end said (`sites.links.messages.ProbeReport`, JSON).
    """

    __tablename__ = "link_probes"
    probe_id: Mapped[str] = mapped_column(primary_key=True)
    dialler: Mapped[str]
    listener: Mapped[str]
    state: Mapped[str]
    bytes_max: Mapped[int]
    bytes_charged: Mapped[int]
    asked_ms: Mapped[int]
    expires_ms: Mapped[int]
    ended_ms: Mapped[int | None]
    address: Mapped[str | None] = mapped_column(String(300))
    dialler_key: Mapped[str | None]
    listener_key: Mapped[str | None]
    dialler_certificate: Mapped[str | None] = mapped_column(Text)
    listener_certificate: Mapped[str | None] = mapped_column(Text)
    dialler_report: Mapped[str | None] = mapped_column(Text)
    listener_report: Mapped[str | None] = mapped_column(Text)
    detail: Mapped[str] = mapped_column(String(1000), default="")
    __table_args__ = (Index("link_probes_by_time", "asked_ms"), Index("link_probes_by_state", "state"))


class LinkMeasurement(Table):
    """One direction of a link as one probe found it; the figures that count, and what each end said."""

    __tablename__ = "link_measurements"
    source: Mapped[str] = mapped_column(primary_key=True)
    target: Mapped[str] = mapped_column(primary_key=True)
    probe_id: Mapped[str] = mapped_column(primary_key=True)
    measured_ms: Mapped[int]
    bandwidth_bits_per_s: Mapped[float]
    delay_s: Mapped[float | None]
    loss: Mapped[float | None]
    sent_bits_per_s: Mapped[float]
    received_bits_per_s: Mapped[float]
    disagreement: Mapped[str] = mapped_column(String(1000), default="")
