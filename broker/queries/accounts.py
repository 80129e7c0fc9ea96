"""What an admin sees of people's accounts."""

from __future__ import annotations

from typing import Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from broker.database.tables import User

ACCOUNTS_PER_PAGE: Final = 100


def list_accounts(session: Session, *, after: str = "", limit: int = ACCOUNTS_PER_PAGE) -> list[User]:
    """Return `limit` accounts by login, and one more where there is a next page."""
    return list(session.scalars(select(User).where(User.login > after).order_by(User.login).limit(limit + 1)))
