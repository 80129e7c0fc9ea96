"""What a session measured: bytes on each link, time lost to waiting, and how far the sites drift apart.

`Session.metrics` for the script's author; each settled round adds a row to the site's metrics, and the whole stands
in the summary. The noise scale is what the broker may read to judge whether more GPUs would help.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from training.flight import RoundFigures

_FP32_BYTES: Final = 4
# The noise scale of one round is a ratio of two noisy differences; the mean over some twenty rounds is not.
_MEMORY: Final = 0.95


@dataclass(slots=True)
class Metrics:
    """Totals since the session began and the newest round's figures. All zero or None alone."""

    site_id: str = ""
    rounds: int = 0
    rounds_missed: int = 0
    late_rounds: int = 0
    bytes_by_link: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    fp32_bytes: int = 0
    stall_s: float = 0.0
    round_s: float = 0.0
    divergence: float | None = None
    merged_norm: float | None = None
    cosine: float | None = None
    noise_scale_samples: float | None = None

    @property
    def bytes_posted(self) -> int:
        """The payload bytes that this site has posted."""
        return self.bytes_by_link.get((self.site_id, "hub"), 0)

    @property
    def ratio(self) -> float | None:
        """How many times smaller the contributions were than fp32; None before the first."""
        return self.fp32_bytes / self.bytes_posted if self.bytes_posted else None

    def add(self, figures: RoundFigures) -> None:
        """Take in a settled round."""
        self.rounds += 1
        self.rounds_missed += not figures.counted
        self.late_rounds += figures.late_rounds
        self.bytes_by_link[self.site_id, "hub"] += figures.bytes_posted
        for site, size in figures.fetched.items():
            self.bytes_by_link[site, self.site_id] += size
        self.fp32_bytes += _FP32_BYTES * figures.elements
        self.stall_s += figures.stall_s
        self.round_s = figures.round_s
        found = figures.statistics
        if found is None:
            return
        own = [norm for site, norm in zip(found.sites, found.norms, strict=True) if site == self.site_id]
        self.divergence = own[0] if own else None
        self.merged_norm, self.cosine = found.mean_norm, found.cosine
        if found.noise_scale_samples is not None:
            before = self.noise_scale_samples
            fresh = found.noise_scale_samples
            self.noise_scale_samples = fresh if before is None else _MEMORY * before + (1 - _MEMORY) * fresh

    def row(self) -> dict[str, float]:
        """Return what one round adds to the site's metrics; what is unknown is left out."""
        values = {
            "ratio": self.ratio,
            "stall_s": self.stall_s,
            "round_s": self.round_s,
            "divergence": self.divergence,
            "merged_norm": self.merged_norm,
            "cosine": self.cosine,
            "noise_scale_samples": self.noise_scale_samples,
        }
        return {name: float(value) for name, value in values.items() if value is not None}

    def summary(self) -> dict[str, Any]:
        """Return everything as JSON takes it; links are named from->to."""
        links = {f"{start}->{end}": size for (start, end), size in sorted(self.bytes_by_link.items())}
        counts = {"rounds": self.rounds, "rounds_missed": self.rounds_missed, "late_rounds": self.late_rounds}
        return {**counts, "bytes_by_link": links, **self.row()}
