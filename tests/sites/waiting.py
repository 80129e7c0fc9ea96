"""Waiting for other processes in tests: on a condition, never for a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
WAIT_S = 40.0


def wait_until(probe: Callable[[], T], limit_s: float = WAIT_S) -> T:
    """Return the first true answer of `probe`; fails after `limit_s`."""
    deadline_s = time.monotonic() + limit_s
    while not (answer := probe()):
        assert time.monotonic() < deadline_s, f"not reached within {limit_s} s"
        threading.Event().wait(0.02)
    return answer


def lives(pid: int) -> bool:
    """Return whether process `pid` lives; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False
