"""The doorbell: best-effort word that there is work, rung only after a commit.

A lost ring delays the work by at most one beat and changes nothing else; so a ring never waits,
never retries and never fails the caller.
"""

from __future__ import annotations

from typing import Protocol


class Doorbell(Protocol):
    """Says that something changed."""

    def ring_round(self) -> None:
        """Say that a round has something new to clear."""
        ...

    def wake_site(self, site_id: str) -> None:
        """Say to a site's agent: look now."""
        ...

    def wake_watchers(self, job_id: str) -> None:
        """Say to browsers and clients that watch a job: look now."""
        ...


class SilentDoorbell:
    """No doorbell at all: everything goes at the pace of beat, heartbeat and polling."""

    def ring_round(self) -> None:
        """Do nothing."""

    def wake_site(self, site_id: str) -> None:
        """Do nothing."""

    def wake_watchers(self, job_id: str) -> None:
        """Do nothing."""
