"""Two ends of a probe are compared: the lower rate and the longer way count, and what differs is named."""

from __future__ import annotations

from typing import Any

import pytest

from broker.links.verdict import Verdict, judge
from sites.links.messages import Flow, ProbeReport

NAMES = ("ada", "bob")


def flow(megabits: float, **changes: Any) -> Flow:
    """Return ten seconds at a rate."""
    size = round(megabits * 1e6 * 10 / 8)
    return Flow(**{"size_bytes": size, "seconds": 10.0, "bits_per_s": megabits * 1e6, **changes})


def verdict(
    sent: Flow | None, received: Flow | None, trips_s: tuple[float | None, float | None] = (0.02, 0.02)
) -> Verdict | None:
    source = ProbeReport(probe_id="p", sent=sent, round_trip_s=trips_s[0])
    target = ProbeReport(probe_id="p", received=received, round_trip_s=trips_s[1])
    return judge(source, target, NAMES)


def test_two_ends_that_agree_give_the_lower_figure_and_no_word() -> None:
    found = verdict(flow(100), flow(95, size_bytes=flow(100).size_bytes), (0.020, 0.022))
    assert found is not None
    assert (found.bandwidth_bits_per_s, found.delay_s, found.disagreement) == (95e6, 0.011, "")


@pytest.mark.parametrize(("sent", "received"), [(1000.0, 100.0), (100.0, 1000.0)])
def test_an_overstated_rate_is_bounded_by_the_other_end_and_named(sent: float, received: float) -> None:
    honest = flow(100).size_bytes
    found = verdict(flow(sent, size_bytes=honest, seconds=1.0), flow(received, size_bytes=honest, seconds=1.0))
    assert found is not None
    assert found.bandwidth_bits_per_s == 100e6
    assert "ada says" in found.disagreement
    assert "bob that" in found.disagreement


def test_a_rate_is_held_to_its_own_bytes_and_seconds() -> None:
    boast = Flow(size_bytes=1_000_000, seconds=8.0, bits_per_s=1e12)
    found = verdict(boast, boast)
    assert found is not None
    assert found.bandwidth_bits_per_s == 1.5e6


def test_a_flattering_delay_is_bounded_by_the_other_end_and_named() -> None:
    found = verdict(flow(100), flow(100), (0.001, 0.200))
    assert found is not None
    assert found.delay_s == 0.1
    assert "1 ms and 200 ms" in found.disagreement


def test_bytes_that_never_came_are_named() -> None:
    found = verdict(flow(100), flow(100, size_bytes=10**6, seconds=0.08))
    assert found is not None
    assert "bytes" in found.disagreement


def test_one_end_alone_is_no_measurement() -> None:
    assert verdict(flow(100), None) is None
    assert verdict(None, flow(100)) is None


def test_loss_is_the_senders_share_of_segments_sent_again_where_it_can_be_told() -> None:
    for counts, loss in (((1000, 20), 0.02), ((50, 20), None), ((None, None), None)):
        sent = flow(100, segments_sent=counts[0], segments_again=counts[1])
        found = verdict(sent, flow(100, segments_sent=1000, segments_again=999))
        assert found is not None
        assert found.loss == loss
