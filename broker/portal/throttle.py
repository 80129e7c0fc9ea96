"""How often a sign-in may fail before the next try has to wait.

Failures are counted for each address and each name over a sliding quarter of an hour, in the memory
of this process: with N processes a guesser gets N times as many tries, and a restart forgets. That
is enough against guessing passwords of twelve characters and more, and costs no row per try. The
number of passwords that are hashed at once is bounded too, since each takes 64 MiB.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from broker.portal.errors import SignInThrottledError
from training.clock import Clock

WINDOW_S: Final = 15 * 60
FAILURES_MAX: Final = 10
KEYS_MAX: Final = 10_000
HASHES_AT_ONCE_MAX: Final = 2


class SignInThrottle:
    """Counts failed sign-ins by key; the oldest keys are forgotten beyond `KEYS_MAX`."""

    def __init__(self) -> None:
        """Start with no failure on record."""
        self._failures: OrderedDict[str, deque[float]] = OrderedDict()
        self._lock = threading.Lock()
        self._hashing = threading.BoundedSemaphore(HASHES_AT_ONCE_MAX)

    @contextmanager
    def attempt(self, clock: Clock, *keys: str) -> Iterator[None]:
        """Run one sign-in; one that raises counts as a failure of every key.

        Raises SignInThrottledError, without running it, where a key has failed too often lately.
        """
        now_s = clock.monotonic_s()
        with self._lock:
            for key in keys:
                self._refuse_if_full(key, now_s)
        try:
            with self._hashing:
                yield
        except Exception:
            with self._lock:
                for key in keys:
                    self._failures.setdefault(key, deque(maxlen=FAILURES_MAX)).append(now_s)
                    self._failures.move_to_end(key)
                while len(self._failures) > KEYS_MAX:
                    self._failures.popitem(last=False)
            raise

    def _refuse_if_full(self, key: str, now_s: float) -> None:
        failures = self._failures.get(key)
        if failures is None:
            return
        while failures and failures[0] <= now_s - WINDOW_S:
            failures.popleft()
        if not failures:
            del self._failures[key]
        elif len(failures) >= FAILURES_MAX:
            wait_s = max(1, round(failures[0] + WINDOW_S - now_s))
            raise SignInThrottledError(
                f"too many sign-ins have failed; wait {-(-wait_s // 60)} minute(s), then try again", wait_s
            )
