"""How long a lease ran, and how long ago it ended, whatever an administrator does to UTC.

Both instants are kept as UTC for people and as readings of the monotonic clock for measuring. Readings of different
eras (`training.clock`) do not compare: there UTC has to do. `broker.leases` stamps, `broker.metering`,
`broker.reservations` and `broker.settle` measure.
"""

from __future__ import annotations

from broker.database.tables import Lease
from broker.transitions import LeaseState
from training.clock import Clock


def stamp_active(lease: Lease, clock: Clock) -> None:
    """Write down that the lease is active from now on."""
    lease.active_ms = clock.now_ms()
    lease.active_monotonic_ms, lease.active_era = _reading_ms(clock), clock.era()


def stamp_ended(lease: Lease, clock: Clock, *, earliest_ms: int = 0) -> None:
    """Write down that the lease ends now; its UTC is `earliest_ms` at least, wherever that was stepped to."""
    lease.ended_ms = max(clock.now_ms(), earliest_ms)
    lease.ended_monotonic_ms, lease.ended_era = _reading_ms(clock), clock.era()


def ran_ms(lease: Lease, clock: Clock) -> int:
    """Return for how long the lease has been active, in milliseconds; nought before it was."""
    if lease.active_ms is None:
        return 0
    if lease.state == LeaseState.ENDED:
        assert lease.ended_ms is not None, "an ended lease has its time"
        end_ms, reading_ms, era = lease.ended_ms, lease.ended_monotonic_ms, lease.ended_era
    else:
        end_ms, reading_ms, era = clock.now_ms(), _reading_ms(clock), clock.era()
    if lease.active_monotonic_ms is not None and reading_ms is not None and lease.active_era == era:
        return reading_ms - lease.active_monotonic_ms
    return max(0, end_ms - lease.active_ms)


def ended_since_ms(lease: Lease, clock: Clock) -> int:
    """Return how long ago an ended lease ended, in milliseconds."""
    assert lease.ended_ms is not None, "an ended lease has its time"
    if lease.ended_monotonic_ms is not None and lease.ended_era == clock.era():
        return _reading_ms(clock) - lease.ended_monotonic_ms
    return max(0, clock.now_ms() - lease.ended_ms)


def _reading_ms(clock: Clock) -> int:
    return round(clock.monotonic_s() * 1000)
