"""Identifiers, injected: records are named by an `Ids`, so tests and the simulator can repeat a run exactly.

An identifier is `<prefix>_<tail>`, such as `job_k3v7…`; the prefix says what it names, and none carries meaning
beyond that. Nothing here is a secret: tokens are made in the API's own module.
"""

from __future__ import annotations

import base64
import os
import re
from collections import Counter
from typing import Final, Protocol

PREFIX: Final = re.compile(r"[a-z]{1,12}")
TAIL_LENGTH: Final = 20  # base32 characters, so 100 random bits: no two alike before 10^15 are drawn


class Ids(Protocol):
    """Where new identifiers come from."""

    def new(self, prefix: str) -> str:
        """Return an identifier never returned before, starting with `prefix` and an underscore."""
        ...


class RandomIds:
    """Identifiers from the system's random source: for every process that serves."""

    def new(self, prefix: str) -> str:
        """Return `prefix`, an underscore and 20 lower-case base32 characters."""
        _require_prefix(prefix)
        tail = base64.b32encode(os.urandom(15)).decode("ascii").lower()
        return f"{prefix}_{tail[:TAIL_LENGTH]}"


class SequentialIds:
    """Identifiers that count up for each prefix: the same calls give the same names in every run."""

    def __init__(self) -> None:
        """Start every prefix at one."""
        self._counts: Counter[str] = Counter()

    def new(self, prefix: str) -> str:
        """Return `prefix`, an underscore and the next number in six digits, so names sort as they were made."""
        _require_prefix(prefix)
        self._counts[prefix] += 1
        return f"{prefix}_{self._counts[prefix]:06d}"


def _require_prefix(prefix: str) -> None:
    assert PREFIX.fullmatch(prefix), f"an id's prefix is 1 to 12 lower-case letters, not {prefix!r}"
