"""One fragment of a site's outer state at the rank that owns it, and what a sealed round brings for it."""

from __future__ import annotations

from dataclasses import dataclass, field

from training.codecs import Values
from training.fragments import Fragment


@dataclass(slots=True)
class OwnedFragment:
    """The outer state of one fragment. Arrays are flat float32; `extra` holds those of single strategies."""

    fragment: Fragment
    theta: Values
    velocity: Values
    carry: Values
    extra: dict[str, Values] = field(default_factory=dict)
    posted: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Received:
    """One site's decoded part of a sealed round, in the order of the merge. The weight is at least 1."""

    site_id: str
    weight: int
    values: Values
