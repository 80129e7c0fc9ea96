"""Runs across sites tell what the next one's step will be over links that none of them had."""

from __future__ import annotations

import math

import numpy as np
import pytest

from training.steptimes.intersite import Schedule, WideLink
from training.steptimes.spans import SpanModel, SpanRun, fit_spans

TRUE = SpanModel(0.02, 0.04, 0.9)
SCHEDULES = (Schedule(80_640, 1), Schedule(20_313, 12), Schedule(2_601, 3, overlap_steps=1))
BANDWIDTHS = (1e6, 4e6, 1.6e7)


def link(bandwidth: float) -> tuple[WideLink, ...]:
    return (WideLink(bandwidth, 0.04),)


def runs(scatter: float = 0.0, seed: int = 0, bandwidths: tuple[float, ...] = BANDWIDTHS) -> list[SpanRun]:
    draw = np.random.default_rng(seed)
    return [
        SpanRun(schedule, link(rate), TRUE.step_s(schedule, link(rate)) * math.exp(scatter * draw.standard_normal()))
        for rate in bandwidths
        for schedule in SCHEDULES
    ]


def test_three_figures_are_found_from_clean_runs() -> None:
    found = fit_spans(runs())
    assert found.alone_s == pytest.approx(TRUE.alone_s, rel=0.02)
    assert found.round_s == pytest.approx(TRUE.round_s, rel=0.05)
    assert found.link_share == pytest.approx(TRUE.link_share, rel=0.05)
    assert found.half_width_log(SCHEDULES[0], link(2e6)) < 0.15


def test_links_that_no_run_had_are_predicted() -> None:
    found = fit_spans(runs(bandwidths=BANDWIDTHS[1:]))
    for schedule in SCHEDULES:
        assert found.step_s(schedule, link(1e6)) == pytest.approx(TRUE.step_s(schedule, link(1e6)), rel=0.08)


def test_noisy_runs_get_an_interval_that_holds_nine_of_ten() -> None:
    inside = trials = 0
    for seed in range(8):
        found = fit_spans(runs(scatter=0.1, seed=seed, bandwidths=BANDWIDTHS[:2]))
        for fresh in runs(scatter=0.1, seed=100 + seed, bandwidths=BANDWIDTHS[2:]):
            off = abs(math.log(fresh.step_s / found.step_s(fresh.schedule, fresh.links)))
            inside += off <= found.half_width_log(fresh.schedule, fresh.links)
            trials += 1
    assert 0.85 <= inside / trials <= 0.99


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="too little"):
        fit_spans(runs()[:2])
