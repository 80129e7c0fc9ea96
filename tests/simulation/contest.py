"""PostgreSQL under a simulated market, with a rival that makes some transactions run twice.

A simulated world has one thread, so no two of its transactions ever meet. Here a rival commits
between the snapshot and the end of some: the server then refuses the first run, after all of its
work was done, with a real serialization failure, and `Database.write` runs the work again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Final, TypeVar

from sqlalchemy import text
from sqlalchemy.orm import Session

from broker.database.engine import CommitHook, Database

T = TypeVar("T")

# A row that every market has; its values stay as they are.
_LOOK: Final = "SELECT balance_micros FROM accounts WHERE account_id = 'world'"
_TOUCH: Final = "UPDATE accounts SET owner = owner WHERE account_id = 'world'"


class ContestedDatabase(Database):
    """A database on which `contested` of all writes are refused once; which ones, `seed` says."""

    def __init__(self, url: str, at_commit: CommitHook, *, seed: int, contested: float) -> None:
        super().__init__(url, at_commit=at_commit)
        self._rng = Random(f"contest {seed}")  # noqa: S311  a seed that replays is the point
        self._contested = contested
        self.refused: Counter[str] = Counter()

    def write(self, name: str, work: Callable[[Session], T]) -> T:
        """As `Database.write`, but some of them meet a rival."""
        if self._rng.random() >= self._contested:
            return super().write(name, work)
        runs = 0

        def meet_a_rival(session: Session) -> T:
            nonlocal runs
            runs += 1
            if runs > 1:
                self.refused[name] += 1
                return work(session)
            if session.scalar(text(_LOOK)) is None:  # PostgreSQL takes the snapshot here
                return work(session)  # the market is being founded
            with self.engine.begin() as rival:
                rival.exec_driver_sql(_TOUCH)
            work(session)
            session.flush()
            session.execute(text(_TOUCH))
            message = f"{name!r} was not refused, although a rival changed what it changes"
            raise AssertionError(message)

        return super().write(name, meet_a_rival)
