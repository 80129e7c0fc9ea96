"""What measurements of a link come to: robust to one odd probe, less sure with age, never above what is declared."""

from __future__ import annotations

import pytest

from broker.links.estimate import CONFIDENCE_COUNTED, Estimate, Figures, Measurement, counted, estimate

DAY_S = 86_400
DECLARED = Figures(bandwidth_bits_per_s=1e9, delay_s=0.01, loss=0.0)


def measured(age_s: float, megabits: float, delay_s: float | None = 0.02, loss: float | None = 0.001) -> Measurement:
    return Measurement(-round(age_s * 1000), megabits * 1e6, delay_s, loss)


def estimated(*measurements: Measurement, now_ms: int = 0) -> Estimate:
    found = estimate(measurements, now_ms, DAY_S)
    assert found is not None
    return found


def test_nothing_measured_is_nothing_known() -> None:
    assert estimate([], 0, DAY_S) is None


def test_one_odd_probe_among_several_does_not_count() -> None:
    found = estimated(measured(0, 100), measured(0, 3), measured(0, 110, 0.9), measured(0, 105))
    assert found.bandwidth_bits_per_s == 100e6
    assert found.delay_s == 0.02


def test_new_probes_outweigh_old_ones() -> None:
    found = estimated(measured(3 * DAY_S, 900), measured(3 * DAY_S, 900), measured(0, 100))
    assert found.bandwidth_bits_per_s == 100e6


def test_confidence_falls_with_age_and_with_spread_and_grows_with_number() -> None:
    one = estimated(measured(0, 100)).confidence
    assert one == pytest.approx(2 / 3)
    assert estimated(measured(DAY_S, 100)).confidence == pytest.approx(1 / 2)
    assert estimated(measured(0, 100), measured(0, 100)).confidence == pytest.approx(4 / 5)
    assert estimated(measured(0, 100), measured(0, 1000)).confidence < one


def test_what_could_not_be_told_does_not_count() -> None:
    found = estimated(measured(0, 100, None, None), measured(0, 100, 0.03, 0.02))
    assert (found.delay_s, found.loss) == (0.03, 0.02)


def test_the_market_counts_with_the_lower_of_declared_and_measured() -> None:
    assert counted(DECLARED, estimated(measured(0, 100))) == Figures(100e6, 0.02, 0.001)
    assert counted(DECLARED, estimated(measured(0, 5000))).bandwidth_bits_per_s == 1e9
    assert counted(DECLARED, None) == DECLARED


def test_an_old_measurement_gives_way_to_what_is_declared() -> None:
    old = estimated(measured(3 * DAY_S, 100))
    assert old.confidence < CONFIDENCE_COUNTED
    assert counted(DECLARED, old) == DECLARED


def test_a_site_that_keeps_probes_from_its_link_does_not_get_its_declared_figure_back() -> None:
    old = estimated(measured(3 * DAY_S, 100))
    assert counted(DECLARED, old, withheld=True).bandwidth_bits_per_s == 100e6
