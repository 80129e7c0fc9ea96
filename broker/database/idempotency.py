"""The table of answers that were given once: sending a request again makes nothing twice."""

from __future__ import annotations

from sqlalchemy import String, Text
from sqlalchemy.orm import Mapped, mapped_column

from broker.database.tables import Table


class IdempotencyKey(Table):
    """A POST that was answered: the same key with the same request gets the same answer again."""

    __tablename__ = "idempotency_keys"
    owner: Mapped[str] = mapped_column(String(100), primary_key=True)
    key: Mapped[str] = mapped_column(String(200), primary_key=True)
    request_digest: Mapped[str]
    status: Mapped[int]
    body: Mapped[str] = mapped_column(Text)
    created_ms: Mapped[int]
