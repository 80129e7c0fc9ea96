"""What sites report while jobs train becomes the speed that the market and the next quote count with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.quote import quote_job
from broker.rounds.snapshot import take
from broker.speeds import read_speeds
from sites.protocol import ExitCause, Usage
from tests.broker.speaking import Scene, spec
from tests.simulation.founding import TENANT_ID
from training.speeds import cold

TRAINED_S = 240


@pytest.fixture
def market(market_url: str, tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(market_url, tmp_path / "measured", {"ada": 2}, term_s=3600)
    yield scene
    scene.close()


def trained(scene: Scene, share: float) -> float:
    """Run a job on two slots at `share` of the speed that the catalogue promises; return that speed in samples/s."""
    wanted = spec(2, sites_max=1)
    promised = quote_job(scene.market, wanted, TENANT_ID)[0].samples_per_s
    job_id = scene.submit(2, sites_max=1)
    (site,) = scene.start(job_id)
    order = site.order()
    scene.pass_s(TRAINED_S, site.site_id)
    site.usage.setdefault(order.lease_id, []).append(
        Usage(
            lease_id=order.lease_id,
            epoch=order.epoch,
            sequence=1,
            gpu_milliseconds=2 * TRAINED_S * 1000,
            samples=round(promised * share * TRAINED_S),
        )
    )
    site.beat()
    site.exit(ExitCause.SCRIPT)
    scene.pass_s(30, site.site_id)
    return promised


def test_a_measured_family_is_quoted_as_it_ran_with_a_narrower_interval(market: Scene) -> None:
    before = quote_job(market.market, spec(2, sites_max=1), TENANT_ID)[0]
    assert not before.measured
    promised = trained(market, 0.5)
    after = quote_job(market.market, spec(2, sites_max=1), TENANT_ID)[0]
    assert after.measured
    assert after.samples_per_s_expected == pytest.approx(0.5 * promised, rel=0.12)
    assert after.samples_per_s_low < after.samples_per_s < after.samples_per_s_expected < after.samples_per_s_high
    assert after.samples_per_s_high / after.samples_per_s_low < before.samples_per_s_high / before.samples_per_s_low


def test_a_round_values_the_job_at_the_lower_quartile_of_what_was_measured(market: Scene) -> None:
    trained(market, 0.5)
    market.submit(2, sites_max=1)
    job = market.market.database.read(lambda session: take(session, market.market)).snapshot.jobs[-1]
    (speed,) = job.speeds
    known = market.market.database.read(read_speeds).of(TENANT_ID, spec(2, sites_max=1))[speed.gpu_type]
    assert speed.flops_per_s == pytest.approx(known.at_quantile(0.25).flops_per_s)
    assert speed.flops_per_s < known.flops_per_s < cold(speed.gpu_type).flops_per_s


def test_another_tenant_and_another_workload_see_nothing_of_it(market: Scene) -> None:
    trained(market, 0.5)
    speeds = market.market.database.read(read_speeds)
    wanted = spec(2, sites_max=1)
    assert speeds.of("stranger", wanted) == {}
    other = wanted.market.workload.model_copy(update={"parameters": 7})
    changed = wanted.model_copy(update={"market": wanted.market.model_copy(update={"workload": other})})
    assert speeds.of(TENANT_ID, changed) == {}


def test_a_deadline_is_met_with_a_stated_chance_and_a_bid_is_recommended(market: Scene) -> None:
    now_ms = market.clock.now_ms()
    open_row = quote_job(market.market, spec(2, sites_max=1), TENANT_ID)[0]
    assert open_row.deadline_probability is None
    hours = open_row.hours_to_finish
    chances = [
        quote_job(
            market.market, spec(2, sites_max=1, deadline_ms=now_ms + round(factor * hours * 3_600_000)), TENANT_ID
        )[0].deadline_probability
        for factor in (1.001, 2.0, 10.0)
    ]
    assert chances[0] == pytest.approx(0.5, abs=0.01)
    assert chances[0] < chances[1] < chances[2]
    hourly = open_row.recommended_bid_micros_per_million_samples * open_row.samples_per_s * 3600 / 1e6
    assert 1.09 * open_row.price_micros_per_hour <= hourly <= 1.12 * open_row.price_micros_per_hour
