"""Waiting inside one process until something changed: a version that rises and wakes who waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


class Doorbell:
    """Wakes every waiting task when it rings. One event loop only."""

    def __init__(self) -> None:
        """Start at version 1: whoever has seen nothing says 0."""
        self.version = 1
        self._event = asyncio.Event()

    def ring(self) -> None:
        """Say that something changed."""
        self.version += 1
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, timeout_s: float | None) -> None:
        """Wait for the next ring, at most `timeout_s` seconds."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._event.wait()
        except TimeoutError:
            pass

    async def until(self, find: Callable[[], Found | None], timeout_s: float) -> Found | None:
        """Return what `find` returns once it is not None, or None after `timeout_s` seconds."""
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        while (found := find()) is None:
            remaining_s = deadline_s - asyncio.get_running_loop().time()
            if remaining_s <= 0:
                return None
            await self.wait(remaining_s)
        return found
