"""A job's secrets at its site: fetched just before the ranks start, handed to their run, forgotten. Never in a file.

The journal, the attempt's folder and its logs hold names alone. An agent that starts anew asks the broker again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from types import MappingProxyType
from typing import Final

from sites.errors import BrokerConnectionError
from sites.settings import SiteSettings

RETRY_S: Final = 2.0
NO_SECRETS: Final[Mapping[str, bytes]] = MappingProxyType({})
# What the broker refuses because of what the tenant did: another site would hear the same.
TENANTS_SECRET_CODES: Final = frozenset({"secret.missing"})

Values = dict[str, bytes]


def keeps_secrets(settings: SiteSettings) -> bool:
    """Return whether ranks here have a /tmp of their own, on the agent's host, that goes with them."""
    return settings.sandbox != "plain" and settings.slurm is None


class SecretsInHand:
    """The values of one attempt's secrets, from when they were fetched until its ranks have started."""

    def __init__(self, fetch: Callable[[], Values]) -> None:
        """Fetch with `fetch`, on a thread, once they are asked for."""
        self._fetch = fetch
        self._fetching: Future[Values] | None = None
        self._held: Values | None = None
        self._retry_at_s = 0.0

    @property
    def is_busy(self) -> bool:
        """Whether a thread works for it."""
        return self._fetching is not None and not self._fetching.done()

    def values(self, threads: Executor, now_s: float) -> Values | None:
        """Return the values, None while they are on their way. Raises SiteError where they cannot be had."""
        if self._held is not None:
            return self._held
        if self._fetching is None:
            if now_s >= self._retry_at_s:
                self._fetching = threads.submit(self._fetch)
            return None
        if not self._fetching.done():
            return None
        future, self._fetching = self._fetching, None
        try:
            self._held = future.result()
        except BrokerConnectionError:
            self._retry_at_s = now_s + RETRY_S  # for as long as the liveness lasts
        return self._held

    def forget(self) -> None:
        """Let go of the values."""
        self._held = None
