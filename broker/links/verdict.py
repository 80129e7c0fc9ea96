"""What both ends of a probe say, made into one figure for each direction; pure.

Neither end is believed alone. Each figure is held to what its own bytes and seconds allow, the lower rate of the two counts
and the longer delay, and where they differ by more than clocks and buffers explain, the difference is named. So a site that
overstates its link is bounded by what the other end saw. One that understates it harms its own business with that one site
alone, which it may refuse anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sites.links.messages import Flow, ProbeReport

# Two honest ends differ by what lies in buffers when the first third is cut off.
RATES_APART_MAX: Final = 1.5
# Two honest ends of one round trip differ by scheduling: as a share of it, and in seconds.
TRIPS_APART_MAX: Final = 2.0
TRIPS_APART_S: Final = 0.010
BYTES_APART_SHARE: Final = 0.01
# A rate without the first third of the time is at most this many times the mean over all of it.
STEADY_OVER_MEAN_MAX: Final = 1.5
# Fewer segments say nothing of loss.
SEGMENTS_MIN: Final = 100


@dataclass(frozen=True, slots=True)
class Verdict:
    """One direction of a link as a probe found it; `loss` is the share sent again, None where that cannot be told."""

    bandwidth_bits_per_s: float
    delay_s: float | None
    loss: float | None
    sent_bits_per_s: float
    received_bits_per_s: float
    disagreement: str


def judge(source: ProbeReport, target: ProbeReport, names: tuple[str, str]) -> Verdict | None:
    """Return what became of the direction from `source` to `target`; None unless both ends saw bytes pass."""
    sent, received = source.sent, target.received
    if sent is None or received is None:
        return None
    sent_rate, received_rate = _rate(sent), _rate(received)
    trips = [report.round_trip_s for report in (source, target) if report.round_trip_s is not None]
    return Verdict(
        bandwidth_bits_per_s=min(sent_rate, received_rate),
        delay_s=max(trips) / 2 if trips else None,
        loss=_loss(sent),
        sent_bits_per_s=sent_rate,
        received_bits_per_s=received_rate,
        disagreement="; ".join(_disagreements(sent, received, trips, names)),
    )


def _rate(flow: Flow) -> float:
    return min(flow.bits_per_s, STEADY_OVER_MEAN_MAX * flow.size_bytes * 8 / flow.seconds)


def _loss(sent: Flow) -> float | None:
    """Return the share of segments that were sent again: at least what was lost, since some are sent again in vain."""
    if sent.segments_sent is None or sent.segments_again is None or sent.segments_sent < SEGMENTS_MIN:
        return None
    return min(sent.segments_again / sent.segments_sent, 0.99)


def _disagreements(sent: Flow, received: Flow, trips: list[float], names: tuple[str, str]) -> list[str]:
    source, target = names
    found = []
    if abs(sent.size_bytes - received.size_bytes) > BYTES_APART_SHARE * max(sent.size_bytes, received.size_bytes):
        found.append(f"{source} says it sent {sent.size_bytes} bytes, {target} that {received.size_bytes} came")
    rates = _rate(sent), _rate(received)
    if max(rates) > RATES_APART_MAX * min(rates):
        found.append(f"{source} says {rates[0] / 1e6:.3g} Mbit/s went, {target} that {rates[1] / 1e6:.3g} came")
    if len(trips) > 1 and max(trips) > TRIPS_APART_MAX * min(trips) + TRIPS_APART_S:
        found.append(f"{source} and {target} differ on the way there and back: " + _milliseconds(trips))
    return found


def _milliseconds(trips: list[float]) -> str:
    return " and ".join(f"{trip * 1000:.3g} ms" for trip in trips)
