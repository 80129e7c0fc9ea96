"""Who calls `hansa` in these tests, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from broker.market import Market


@dataclass(frozen=True)
class Broker:
    """A market that listens, with a token for its admin and one for a tenant with 10 credits."""

    market: Market
    url: str
    tokens: dict[str, str]


@dataclass(frozen=True)
class Outcome:
    """How a call of `hansa` went."""

    code: int
    out: str
    err: str


Hansa = Callable[..., Outcome]
