"""A link as people write it: `100mbit,50ms,0.1%` is bandwidth, one-way delay and loss. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from training.errors import TrainingError

DELAY_S_MAX: Final = 5.0
LOSS_MAX: Final = 0.5
BANDWIDTH_BITS_PER_S_MIN: Final = 8_000.0
BANDWIDTH_BITS_PER_S_MAX: Final = 100e9
_BANDWIDTH: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([kmg]?)bit(?:/s)?")
_DELAY: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s)")
_LOSS: Final = re.compile(r"(\d+(?:\.\d+)?)\s*%")
_FACTORS: Final = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}


class LinkSpecError(TrainingError):
    """A link that cannot be read or emulated; the message shows one that can."""

    code = "lab.link"


@dataclass(frozen=True, slots=True)
class LinkSpec:
    """One direction between two sites: bits a second, seconds one way, share of packets lost at random."""

    bandwidth_bits_per_s: float
    delay_s: float = 0.0
    loss: float = 0.0

    @classmethod
    def parse(cls, text: str) -> LinkSpec:
        """Return the link written as `BANDWIDTH[,DELAY[,LOSS]]`. Raises LinkSpecError."""
        parts = [part.strip().lower() for part in text.split(",")]
        patterns = (_BANDWIDTH, _DELAY, _LOSS)
        found = [pattern.fullmatch(part) for pattern, part in zip(patterns, parts, strict=False)]
        if len(parts) > len(patterns) or not all(found):
            raise LinkSpecError(
                f"{text!r} is no link; write bandwidth, one-way delay and loss, as in 100mbit,50ms,0.1%"
            )
        bandwidth, delay, loss = (*found, None, None)[: len(patterns)]
        assert bandwidth is not None, "all parts were found"
        link = cls(
            float(bandwidth[1]) * _FACTORS[bandwidth[2]],
            0.0 if delay is None else float(delay[1]) * (0.001 if delay[2] == "ms" else 1.0),
            0.0 if loss is None else float(loss[1]) / 100,
        )
        limits = (
            BANDWIDTH_BITS_PER_S_MIN <= link.bandwidth_bits_per_s <= BANDWIDTH_BITS_PER_S_MAX,
            link.delay_s <= DELAY_S_MAX,
            link.loss <= LOSS_MAX,
        )
        if not all(limits):
            raise LinkSpecError(
                f"{text!r} is beyond what can be emulated: 8 kbit/s to 100 Gbit/s, at most {DELAY_S_MAX:g} s "
                f"one way and {LOSS_MAX:.0%} loss"
            )
        return link

    def __str__(self) -> str:
        """Return the link as `parse` reads it."""
        rate = self.bandwidth_bits_per_s
        scale = next((name for name in ("g", "m", "k") if rate >= _FACTORS[name]), "")
        return f"{rate / _FACTORS[scale]:g}{scale}bit,{self.delay_s * 1000:g}ms,{self.loss * 100:g}%"
