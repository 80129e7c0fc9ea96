"""Logs and measurements of attempts: capped files that grow at their end, one pair for each lease.

They are files and not rows because a job may write megabytes a minute and nobody settles by them.
A sender says at which offset its chunk begins; a chunk sent twice changes nothing, a gap is
answered with what is held.
"""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path
from typing import Final

from broker.market import Market
from sites.protocol import StreamState

STREAM_NAMES: Final = frozenset({"log", "metrics"})
READ_BYTES_MAX: Final = 1_000_000
_LEASE_ID: Final = re.compile(r"[a-z0-9_]{1,64}")


class StreamStore:
    """The streams below one folder."""

    def __init__(self, root: Path, bytes_max: int) -> None:
        """Keep at most `bytes_max` of each stream; what comes after is dropped and said so."""
        self._root = root
        self._bytes_max = bytes_max

    def append(self, lease_id: str, name: str, offset: int, chunk: bytes) -> StreamState:
        """Add `chunk`, which begins at `offset` of the sender's stream, and return what is held."""
        path = self._path(lease_id, name)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "r+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            held = stream.seek(0, os.SEEK_END)
            if offset <= held:
                fresh = chunk[held - offset :][: max(0, self._bytes_max - held)]
                stream.write(fresh)
                held += len(fresh)
        return StreamState(held_bytes=held, full=held >= self._bytes_max)

    def read(self, lease_id: str, name: str, offset: int, bytes_max: int = READ_BYTES_MAX) -> bytes:
        """Return at most `bytes_max` bytes from `offset`; nothing where the stream is shorter."""
        try:
            with self._path(lease_id, name).open("rb") as stream:
                stream.seek(offset)
                return stream.read(min(bytes_max, READ_BYTES_MAX))
        except FileNotFoundError:
            return b""

    def state(self, lease_id: str, name: str) -> StreamState:
        """Return how much of a stream is held."""
        try:
            held = self._path(lease_id, name).stat().st_size
        except FileNotFoundError:
            held = 0
        return StreamState(held_bytes=held, full=held >= self._bytes_max)

    def discard(self, lease_id: str) -> int:
        """Remove all streams of a lease and return how many there were."""
        removed = 0
        for name in STREAM_NAMES:
            path = self._path(lease_id, name)
            removed += path.exists()
            path.unlink(missing_ok=True)
        return removed

    def _path(self, lease_id: str, name: str) -> Path:
        assert _LEASE_ID.fullmatch(lease_id), "a lease id is checked at the edge"
        assert name in STREAM_NAMES, "a stream's name is checked at the edge"
        return self._root / name / lease_id


def streams_of(market: Market) -> StreamStore:
    """Return where the market keeps logs and measurements."""
    return StreamStore(market.settings.home / "streams", market.settings.stream_bytes_max)
