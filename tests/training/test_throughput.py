"""The throughput model: its terms by hand, its monotonicity, and what `auto` stands for."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.spec import SyncPlan, Workload
from training.throughput import CODEC_RATIOS, Link, SitePart, predict, resolve_sync

WORKLOAD = Workload(samples=10**6, batch_per_gpu=10, parameters=1_000_000, flops_per_sample=1e11)
ADA = SitePart("ada", "A100", 4, flops_per_s=1e12, intra_site_bits_per_s=1e10)
BOB = SitePart("bob", "A100", 2, flops_per_s=1e12, intra_site_bits_per_s=1e10)
CYD = SitePart("cyd", "A100", 2, flops_per_s=5e11, intra_site_bits_per_s=1e10)
BOTH = frozenset({"ada", "bob"})


def mesh(bandwidth_bits_per_s: float = 9e7, delay_s: float = 0.05) -> dict[tuple[str, str], Link]:
    sites = ["ada", "bob", "cyd"]
    link = Link(bandwidth_bits_per_s, delay_s, egress_price_micros_per_gb=1_000_000)
    return {(a, b): link for a in sites for b in sites if a != b}


def diloco(codec: str = "fp32", period_steps: int = 10) -> SyncPlan:
    return SyncPlan.model_validate({"strategy": "diloco", "codec": codec, "period_steps": period_steps})


def test_one_gpu_only_computes() -> None:
    alone = predict(WORKLOAD, SyncPlan(strategy="local", codec="fp32"), [SitePart("ada", "A100", 1, 1e12)], {})
    assert alone.step_s == alone.compute_s == 1.0
    assert alone.samples_per_s == 10.0
    assert alone.traffic == ()


def test_an_unmeasured_gpu_reaches_the_catalogues_share_of_its_peak() -> None:
    alone = predict(WORKLOAD, SyncPlan(strategy="local", codec="fp32"), [SitePart("ada", "A100", 1)], {})
    assert alone.compute_s == pytest.approx(10 * 1e11 / (312e12 * 0.35))


def test_a_ring_moves_twice_all_but_one_share() -> None:
    four = predict(WORKLOAD, SyncPlan(strategy="local", codec="fp32"), [ADA], {})
    # 2 x 3/4 x 4 MB over 10 Gbit/s, and six waits of 20 microseconds.
    assert four.intra_site_s == pytest.approx(1.5 * 4e6 * 8 / 1e10 + 6 * 20e-6)
    assert four.samples_per_s == pytest.approx(40 / (1 + four.intra_site_s))


def test_a_sync_round_goes_up_and_down_through_the_hub_once_in_h_steps() -> None:
    two = predict(WORKLOAD, diloco(), [ADA, BOB], mesh(), "ada")
    # 4 MB each way at 90 % of 90 Mbit/s, and two round trips of 100 ms, over ten steps.
    sync_s = 2 * 32e6 / 8.1e7 + 2 * 0.1
    assert two.inter_site_s == pytest.approx(sync_s / 10)
    assert two.step_s == pytest.approx(two.compute_s + two.intra_site_s + two.inter_site_s)
    sent = {(row.from_site, row.to_site): row for row in two.traffic}
    assert sent["bob", "ada"].bytes_per_s == pytest.approx(4e6 / (10 * two.step_s))
    assert sent["ada", "bob"].egress_micros_per_hour == pytest.approx(sent["ada", "bob"].bytes_per_s * 3600 / 1e9 * 1e6)
    assert two.bytes_per_s_between_sites == pytest.approx(8e6 / (10 * two.step_s))


def test_three_sites_fetch_two_contributions_each() -> None:
    three = predict(WORKLOAD, diloco(), [ADA, BOB, CYD], mesh(), "ada")
    sent = {(row.from_site, row.to_site): row.bytes_per_s for row in three.traffic}
    assert set(sent) == {("ada", "bob"), ("ada", "cyd"), ("bob", "ada"), ("cyd", "ada")}
    assert sent["ada", "bob"] == pytest.approx(2 * sent["bob", "ada"])


def test_the_slowest_site_sets_the_pace() -> None:
    assert predict(WORKLOAD, diloco(), [ADA, CYD], mesh(), "ada").compute_s == 2.0


def test_a_codec_divides_the_traffic_by_its_ratio() -> None:
    plain = predict(WORKLOAD, diloco("fp32", 10_000), [ADA, BOB], mesh(), "ada")
    for codec, ratio in CODEC_RATIOS.items():
        packed = predict(WORKLOAD, diloco(codec, 10_000), [ADA, BOB], mesh(), "ada")
        per_step = packed.bytes_per_s_between_sites * packed.step_s
        assert per_step == pytest.approx(plain.bytes_per_s_between_sites * plain.step_s / ratio)


def test_a_missing_hub_or_link_is_refused() -> None:
    with pytest.raises(ValueError, match="resolve_sync"):
        predict(WORKLOAD, diloco(), [ADA, BOB], mesh())
    with pytest.raises(ValueError, match="no link both ways"):
        predict(WORKLOAD, diloco(), [ADA, BOB], {}, "ada")
    with pytest.raises(ValueError, match="resolve_sync"):
        predict(WORKLOAD, SyncPlan(), [ADA, BOB], mesh(), "ada")


@given(
    bandwidth=st.floats(1e6, 1e11),
    faster=st.floats(1.0, 100.0),
    delay_s=st.floats(0, 1),
    parameters=st.integers(1, 10**10),
    codec=st.sampled_from(sorted(CODEC_RATIOS)),
)
def test_a_faster_link_never_slows_a_job(
    bandwidth: float, faster: float, delay_s: float, parameters: int, codec: str
) -> None:
    workload = WORKLOAD.model_copy(update={"parameters": parameters})
    slow = predict(workload, diloco(codec), [ADA, BOB], mesh(bandwidth, delay_s), "ada")
    fast = predict(workload, diloco(codec), [ADA, BOB], mesh(bandwidth * faster, delay_s / faster), "ada")
    assert fast.samples_per_s >= slow.samples_per_s * (1 - 1e-12)


def test_auto_is_local_on_one_site_and_diloco_on_several() -> None:
    one = resolve_sync(WORKLOAD, SyncPlan(), [ADA], {}, frozenset())
    assert one is not None
    assert (one.plan.strategy, one.plan.codec, one.hub_site) == ("local", "fp32", None)
    two = resolve_sync(WORKLOAD, SyncPlan(), [ADA, BOB], mesh(1e10), BOTH)
    assert two is not None
    assert (two.plan.strategy, two.plan.codec, two.hub_site) == ("diloco", "int8", "ada")
    assert "least lossy" in two.reason


def test_auto_takes_the_compressed_codec_on_a_slow_link() -> None:
    slow = resolve_sync(WORKLOAD, SyncPlan(), [ADA, BOB], mesh(5e6), BOTH)
    assert slow is not None
    assert slow.plan.codec == "topk2"
    hopeless = resolve_sync(WORKLOAD, SyncPlan(), [ADA, BOB], mesh(1e3), BOTH)
    assert hopeless is not None
    assert hopeless.plan.codec == "topk2"
    assert "longer period" in hopeless.reason


def test_what_the_plan_states_is_kept() -> None:
    stated = resolve_sync(WORKLOAD, diloco("fp32"), [ADA, BOB], mesh(1e3), BOTH)
    assert stated is not None
    assert stated.plan == diloco("fp32")
    assert resolve_sync(WORKLOAD, SyncPlan(strategy="local"), [ADA, BOB], mesh(), BOTH) is None


def test_a_strategy_says_what_it_needs_and_keeps_its_name_on_several_sites() -> None:
    needs = {"sparse": ("topk2", 20), "streaming": ("int4", 20), "every_step": ("fp32", 1), "quorum": ("int8", 20)}
    for strategy, expected in needs.items():
        plan = SyncPlan.model_validate({"strategy": strategy})
        resolved = resolve_sync(WORKLOAD, plan, [ADA, BOB], mesh(1e10), BOTH)
        assert resolved is not None
        assert resolved.plan.strategy == strategy
        assert (resolved.plan.codec, resolved.plan.period_steps) == expected
    kept = SyncPlan.model_validate({"strategy": "sparse", "codec": "sign"})
    assert kept.codec == "sign"


def test_only_a_listening_site_with_links_both_ways_is_a_hub() -> None:
    assert resolve_sync(WORKLOAD, SyncPlan(), [ADA, BOB], mesh(), frozenset()) is None
    one_way = {pair: link for pair, link in mesh().items() if pair != ("bob", "ada")}
    assert resolve_sync(WORKLOAD, SyncPlan(), [ADA, BOB], one_way, BOTH) is None
    listening = resolve_sync(WORKLOAD, SyncPlan(), [ADA, BOB], mesh(), frozenset({"bob"}))
    assert listening is not None
    assert listening.hub_site == "bob"


def test_the_best_connected_listener_is_the_hub() -> None:
    links = mesh(1e7)
    links |= {pair: Link(1e9, 0.01) for pair in links if "bob" in pair}
    three = resolve_sync(WORKLOAD, SyncPlan(), [ADA, BOB, CYD], links, BOTH)
    assert three is not None
    assert three.hub_site == "bob"


def test_predicting_never_loads_torch() -> None:
    program = "import sys, training.throughput; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0
