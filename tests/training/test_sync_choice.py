from __future__ import annotations

from typing import Any

import pytest

from training.spec import SyncPlan, Workload
from training.sync_choice import ChosenSync, choose_sync
from training.throughput import Link, SitePart

# A billion parameters, 0.1 s a step: the setting of Streaming DiLoCo's Table 4.
WORKLOAD = Workload(samples=8_000_000, batch_per_gpu=100, parameters=1_000_000_000, flops_per_sample=1e10)
PARTS = [SitePart(site, "H100", 8, flops_per_s=1e13, intra_site_bits_per_s=1e15) for site in ("ams", "oslo")]


def chosen(bits_per_s: float, delay_s: float = 0.02, *, samples: int | None = None, **asked: Any) -> ChosenSync:
    link = Link(bandwidth_bits_per_s=bits_per_s, delay_s=delay_s)
    workload = WORKLOAD if samples is None else WORKLOAD.model_copy(update={"samples": samples})
    links = {("ams", "oslo"): link, ("oslo", "ams"): link}
    found = choose_sync(workload, SyncPlan(**asked), PARTS, links, frozenset({"oslo"}))
    assert found is not None
    assert found.hub_site == "oslo"
    return found


def test_slower_links_get_more_compressed_ways_and_each_says_why() -> None:
    by_speed = {bits: chosen(bits, 1e-4) for bits in (1e14, 1e11, 5e9, 2e9, 2e8)}
    ways = [(each.plan.strategy, each.plan.codec) for each in by_speed.values()]
    assert ways == [
        ("every_step", "fp32"),
        ("diloco", "int8"),
        ("streaming", "int4"),
        ("sparse", "topk2"),
        ("sparse", "topk2"),
    ]
    assert by_speed[2e9].plan.period_steps <= 50 < by_speed[2e8].plan.period_steps
    for number, each in enumerate(by_speed.values(), start=1):
        assert len(each.reasons) >= number
        assert f"{each.plan.strategy} with {each.plan.codec}" in each.reasons[-1]
        assert each.utilisation >= 0.95
        assert each.reasons[-1].endswith("enough")


def test_the_period_is_the_shortest_that_reaches_the_target() -> None:
    found = chosen(1e11, strategy="diloco", codec="int8")
    period = found.plan.period_steps
    assert 5 < period < 100
    assert (
        found.utilisation >= 0.95 > chosen(1e11, strategy="diloco", codec="int8", period_steps=period - 1).utilisation
    )
    assert chosen(1e11, strategy="diloco", codec="int8", target_utilisation=0.99).plan.period_steps == 100


def test_a_streaming_round_that_fits_beside_its_steps_costs_no_time() -> None:
    found = chosen(1e10, strategy="streaming", codec="int4")
    plan = found.plan
    assert found.utilisation == 1.0
    assert plan.overlap_steps < plan.period_steps // plan.fragments
    assert plan.period_steps % plan.fragments == 0


def test_a_cap_on_egress_is_kept_where_it_can_be() -> None:
    free, capped = chosen(1e11), chosen(1e11, max_egress_gb=20.0)
    assert free.egress_gb > 20 >= capped.egress_gb
    assert any("above the cap of 20 GB" in each for each in capped.reasons)
    hopeless = chosen(1e11, max_egress_gb=1e-3)
    assert "comes closest" in hopeless.reasons[-1]
    assert hopeless.egress_gb == min(chosen(1e11, strategy=way).egress_gb for way in ("diloco", "streaming", "sparse"))


def test_what_the_tenant_states_is_kept() -> None:
    assert chosen(1e14, period_steps=40, strategy="diloco").plan.period_steps == 40
    assert chosen(2e8, codec="int8").plan.codec == "int8"
    assert chosen(2e8, strategy="quorum", patience_s=7.0).plan.patience_s == 7.0
    assert chosen(2e8, merge="trimmed_mean", codec="int4").plan.merge == "trimmed_mean"


def test_a_short_job_still_has_its_ten_rounds() -> None:
    assert chosen(2e8, samples=1600 * 120).plan.period_steps == 12


def test_a_streaming_plan_of_a_short_job_is_one_that_a_site_takes() -> None:
    for samples in (1600 * 10, 1600 * 45, 1600 * 200, 1600 * 2000):
        plan = chosen(5e9, samples=samples, strategy="streaming").plan
        assert plan.period_steps % plan.fragments == 0
        assert plan.overlap_steps < plan.period_steps // plan.fragments


@pytest.mark.parametrize("parts", [PARTS[:1], PARTS])
def test_one_site_and_sites_without_a_hub_have_nothing_to_choose(parts: list[SitePart]) -> None:
    assert choose_sync(WORKLOAD, SyncPlan(), parts, {}, frozenset()) is None
