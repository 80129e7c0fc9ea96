"""Time, injected: nothing in Hansa reads the system's clock except through a `Clock`.

Two readings with different uses: `now_ms` is UTC and may be stepped by an administrator, so it
is for records and for people; `monotonic_s` only rises, so every interval, timeout and liveness
is measured with it. Three spans that people are told as times of day are the exceptions and follow UTC, so a step moves
their ends: a proposal's, a term's and a job's deadline. Tests and the fault simulator use `ManualClock`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final, Protocol

# Linux names each boot; the machine's monotonic clock starts anew with it.
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class Clock(Protocol):
    """What a component may ask of time."""

    def now_ms(self) -> int:
        """Return UTC milliseconds since 1970-01-01."""
        ...

    def monotonic_s(self) -> float:
        """Return seconds on a clock that never goes back; only differences mean anything."""
        ...

    def era(self) -> str:
        """Return the name of the span of time in which readings of `monotonic_s` compare.

        A reading that was stored in another era (before a reboot, on another host) says nothing
        today: whoever finds one starts the interval again.
        """
        ...


class SystemClock:
    """The machine's own clocks."""

    def now_ms(self) -> int:
        """Return UTC milliseconds since 1970-01-01."""
        return time.time_ns() // 1_000_000

    def monotonic_s(self) -> float:
        """Return the machine's monotonic clock, the same for all its processes until a reboot."""
        return time.clock_gettime(time.CLOCK_MONOTONIC)

    def era(self) -> str:
        """Return the boot id of this machine."""
        return _BOOT_ID.read_text().strip()


class ManualClock:
    """A clock that moves when told to."""

    def __init__(self, now_ms: int = 1_800_000_000_000) -> None:
        """Start at `now_ms`; the default is an arbitrary instant in January 2027."""
        self._now_ms = now_ms
        self._monotonic_s = 1_000.0
        self._boots = 1

    def now_ms(self) -> int:
        """Return the instant last set."""
        return self._now_ms

    def monotonic_s(self) -> float:
        """Return the seconds advanced so far, from an arbitrary start."""
        return self._monotonic_s

    def era(self) -> str:
        """Return the name of the current boot."""
        return f"boot-{self._boots}"

    def reboot(self) -> None:
        """Begin another era: the monotonic clock starts again from nought."""
        self._boots += 1
        self._monotonic_s = 0.0

    def advance_s(self, seconds: float) -> None:
        """Let `seconds` pass on both clocks."""
        assert seconds >= 0, "time does not go back"
        self._monotonic_s += seconds
        self._now_ms += round(seconds * 1000)

    def step_utc_s(self, seconds: float) -> None:
        """Set the UTC clock forward or back, as an administrator or NTP would."""
        self._now_ms += round(seconds * 1000)
