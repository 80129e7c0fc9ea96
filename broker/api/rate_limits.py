"""How many requests one credential may send: a token bucket for each, in the memory of this process.

A bucket holds ten seconds' worth of requests and refills steadily; a request that finds it empty
gets 429 and is told when to come again. Buckets are named by what was verified (a token, a site, a
person) and for callers without a credential by their address. Each worker process counts for itself:
with N of them a caller gets up to N times as much. What is protected is the market from a script
that runs wild; floods of strangers are the proxy's to stop.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, cast

from flask import current_app

from broker.api.errors import TooManyRequestsError
from broker.settings import Settings
from training.clock import Clock

EXTENSION: Final = "hansa.rate_limits"
BURST_S: Final = 10.0
KEYS_MAX: Final = (
    20_000  # of about 200 bytes each; the one that was longest quiet is forgotten, and then has a full bucket
)


@dataclass(slots=True)
class _Bucket:
    left: float
    at_s: float


class RateLimit:
    """A bucket for each key, all of one size."""

    def __init__(self, requests_per_s: float, clock: Clock) -> None:
        """Let each key send `requests_per_s` in the long run, and ten seconds' worth at once."""
        self._rate = requests_per_s
        self._burst = max(1.0, requests_per_s * BURST_S)
        self._clock = clock
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, key: str) -> float:
        """Take one request out of the bucket of `key`; return 0, or how many seconds until there is one."""
        now_s = self._clock.monotonic_s()
        with self._lock:
            bucket = self._buckets.setdefault(key, _Bucket(self._burst, now_s))
            self._buckets.move_to_end(key)
            if len(self._buckets) > KEYS_MAX:
                self._buckets.popitem(last=False)
            bucket.left = min(self._burst, bucket.left + max(0.0, now_s - bucket.at_s) * self._rate)
            bucket.at_s = now_s
            if bucket.left < 1:
                return (1 - bucket.left) / self._rate
            bucket.left -= 1
            return 0.0


class RateLimits:
    """The limits of one application: one for people and programs, a wider one for sites."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        """Take the rates from the settings."""
        self._callers = RateLimit(settings.requests_per_s, clock)
        self._sites = RateLimit(settings.site_requests_per_s, clock)

    def charge(self, kind: str, name: str) -> None:
        """Count a request of a token, person or address. Raises TooManyRequestsError."""
        self._refuse_if(self._callers.take(f"{kind}/{name}"))

    def charge_site(self, site_id: str) -> None:
        """Count a request of a site: heartbeats, and its checkpoints in chunks. Raises TooManyRequestsError."""
        self._refuse_if(self._sites.take(site_id))

    @staticmethod
    def _refuse_if(wait_s: float) -> None:
        if wait_s > 0:
            retry_s = max(1, math.ceil(wait_s))
            raise TooManyRequestsError(
                f"this credential sends more requests than the market takes; wait {retry_s} second(s) and go on slower",
                retry_s,
            )


def the_rate_limits() -> RateLimits:
    """Return the limits of this app."""
    return cast("RateLimits", current_app.extensions[EXTENSION])
