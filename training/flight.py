"""A contribution on its way through the rounds, and the figures of the round that it came to an end in.

`training.synchronizer` sends it off and settles it; `training.session` and `training.metrics` read the figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from training.dealing import Ranges
from training.round_statistics import RoundStatistics


@dataclass(frozen=True, slots=True)
class RoundFigures:
    """What one round cost and how it went, at this site. Bytes are payload, of all its ranks."""

    counted: bool
    sites_merged: int
    bytes_posted: int
    fetched: dict[str, int] = field(default_factory=dict)
    elements: int = 0
    stall_s: float = 0.0
    round_s: float = 0.0
    late_rounds: int = 0
    statistics: RoundStatistics | None = None

    @property
    def bytes_fetched(self) -> int:
        """The bytes fetched of all other sites."""
        return sum(self.fetched.values())


@dataclass(slots=True)
class Flight:
    """A contribution on its way: the round that it is offered to, and what came of it so far."""

    number: int
    samples: Ranges
    started_s: float
    has_content: bool = False
    elements: int = 0
    is_open: bool = True
    counted: bool = False
    sites_merged: int = 0
    bytes_posted: int = 0
    fetched: dict[str, int] = field(default_factory=dict)
    late_rounds: int = 0
    stall_s: float = 0.0

    def count_fetched(self, fetched: Mapping[str, int]) -> None:
        """Add the bytes fetched of each other site in one round."""
        for site, size in fetched.items():
            self.fetched[site] = self.fetched.get(site, 0) + size

    def figures(self, settling_s: float, now_s: float, statistics: RoundStatistics | None) -> RoundFigures:
        """Return what came of it, settled at `now_s` after `settling_s` of waiting and merging."""
        return RoundFigures(
            counted=self.counted,
            sites_merged=self.sites_merged,
            bytes_posted=self.bytes_posted,
            fetched=self.fetched,
            elements=self.elements if self.bytes_posted else 0,
            stall_s=self.stall_s + settling_s,
            round_s=now_s - self.started_s,
            late_rounds=self.late_rounds,
            statistics=statistics,
        )
