"""The tier between sites has bandwidth, delay, loss, streams, period, overlap and quorum as inputs."""

from __future__ import annotations

import pytest

from training.steptimes.intersite import Schedule, WideLink, across_sites, sync_s
from training.steptimes.model import StepPrediction

SITE = StepPrediction(1.0, 0.9, 1.2, 64.0, 53.3, 71.1)


def test_a_hundred_steps_int4_two_sites_and_200_megabits_are_one_number() -> None:
    # A hundred million parameters at half a byte: 50 MB up and 50 MB down at 180 Mbit/s, and two round trips.
    schedule = Schedule(contribution_bytes=50e6, period_steps=100)
    link = WideLink(200e6, round_trip_s=0.03)
    expected_s = 2 * 50e6 * 8 / 180e6 + 0.06
    assert sync_s(schedule, [link]) == pytest.approx(expected_s)
    both = across_sites([SITE, SITE], schedule, [link])
    assert both.step_s == pytest.approx(1.0 + expected_s / 100)
    assert both.samples_per_s == pytest.approx(128 / both.step_s)
    assert both.low_s < both.step_s < both.high_s


def test_overlap_hides_a_round_that_fits_into_it() -> None:
    link = WideLink(200e6, round_trip_s=0.03)
    hidden = across_sites([SITE, SITE], Schedule(50e6, 100, overlap_steps=5), [link])
    assert hidden.step_s == 1.0
    part = across_sites([SITE, SITE], Schedule(50e6, 100, overlap_steps=2), [link])
    assert part.step_s == pytest.approx(1.0 + (sync_s(Schedule(50e6, 100), [link]) - 2) / 100)


def test_a_quorum_does_not_wait_for_the_slowest() -> None:
    links = [WideLink(1e9), WideLink(1e8), WideLink(1e6)]
    every, three, alone = (sync_s(Schedule(1e6, 10, quorum=quorum), links) for quorum in (None, 3, 1))
    assert every > 10 * three
    assert alone == 0.0


def test_streams_help_on_a_long_link_with_loss_and_only_there() -> None:
    lossy = [WideLink(1e9, 0.1, 0.001, streams) for streams in (1, 8, 1000)]
    one, eight, many = (link.rate_bits_per_s() for link in lossy)
    assert eight == pytest.approx(8 * one)
    assert many == pytest.approx(0.9e9 * 0.999)
    assert WideLink(1e9, 0.1, 0.0, 1).rate_bits_per_s() == WideLink(1e9, 0.1, 0.0, 8).rate_bits_per_s()


def test_the_slowest_site_paces_all() -> None:
    slow = StepPrediction(2.0, 1.8, 2.4, 32.0, 26.7, 35.6)
    both = across_sites([SITE, slow], Schedule(1.0, 1000), [WideLink(1e9)])
    assert both.step_s == pytest.approx(2.0, rel=1e-3)
    with pytest.raises(ValueError, match="2 sites meet over 1 links"):
        across_sites([SITE, slow], Schedule(1.0, 1000), [])
