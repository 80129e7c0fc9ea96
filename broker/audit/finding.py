"""What the audit finds."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """An invariant that does not hold: its number in the blueprint, the row, and the figures."""

    invariant: int
    subject: str
    detail: str

    def __str__(self) -> str:
        """Return the finding as one line."""
        return f"invariant {self.invariant}: {self.subject}: {self.detail}"

    def as_json(self) -> dict[str, object]:
        """Return the fields as plain JSON values."""
        return asdict(self)
