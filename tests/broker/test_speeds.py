"""What sites report while jobs train becomes the speed that the market and the next quote count with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from broker import speeds as speeds_module
from broker.allocation.clearing import Placement as Award
from broker.api.documents import placement_document
from broker.database.tables import Job, Placement
from broker.quote import quote_job
from broker.rounds.snapshot import take
from broker.speeds import Speeds, read_speeds
from sites.protocol import ExitCause, Usage
from tests.broker.speaking import Scene, SpeakingSite, spec
from tests.simulation.founding import TENANT_ID
from training.spec import GpuRequest, ProfileTerms, Resources
from training.speeds import MeasuredRun, SpeedEstimate, cold, estimate

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


def report(site: SpeakingSite, sequence: int, seconds: int, samples: int) -> None:
    """Let a site report what its two slots did in the last seconds."""
    order = site.order()
    usage = Usage(
        lease_id=order.lease_id,
        epoch=order.epoch,
        sequence=sequence,
        gpu_milliseconds=2 * seconds * 1000,
        samples=samples,
    )
    site.usage.setdefault(order.lease_id, []).append(usage)
    site.beat()


def test_a_short_run_counts_without_its_start_while_it_still_runs(market: Scene) -> None:
    job_id = market.submit(2, sites_max=1)
    (site,) = market.start(job_id)
    before = market.read(select(Placement))[0].samples_per_s_predicted
    # Forty seconds of starting, then half the prediction for ten: the lease as a whole ran at a tenth.
    for sequence, (seconds, samples) in enumerate([(40, 0)] + [(2, round(before))] * 6, start=1):
        market.pass_s(seconds, *market.sites)
        report(site, sequence, seconds, samples)
    document = market.market.database.read(
        lambda session: placement_document(session, session.get_one(Job, job_id), newest(session), 0)
    )
    assert document.samples_per_s_predicted == before
    assert document.samples_per_s_expected == pytest.approx(before / 2, rel=0.02)
    assert document.samples_per_s_low < before / 2 < document.samples_per_s_high
    # Who comes next is placed on what was measured, not on the catalogue.
    market.submit(1, sites_max=1)
    next_one = market.market.database.read(lambda session: take(session, market.market)).snapshot.jobs[-1]
    assert next_one.speeds[0].flops_per_s < cold("cpu-slot").flops_per_s


def newest(session: Session) -> Placement:
    return session.scalars(select(Placement)).one()


def test_a_span_tells_of_its_gpus_what_its_links_leave(market_url: str, tmp_path: Path) -> None:
    scene = Scene(market_url, tmp_path / "span", {"ada": 2, "bob": 2}, term_s=3600)
    job_id = scene.submit(4, sites_max=2)
    sites = scene.start(job_id)
    assert len(sites) == 2
    sold = Award.model_validate_json(scene.read(select(Placement))[0].award).configuration
    assert sold.inter_site_s > 0
    # Every site's step is as long again as predicted, all of it in its GPUs.
    step_s = 2 * sold.step_s - sold.inter_site_s
    rate = 2 * spec(4).market.workload.batch_per_gpu / step_s
    for sequence in range(1, 9):
        scene.pass_s(10, *scene.sites)
        for site in sites:
            report(site, sequence, 10, round(10 * rate))
    known = scene.market.database.read(
        lambda session: read_speeds(session).expected(TENANT_ID, spec(4, sites_max=2), sold)
    )
    assert known is not None
    assert known.samples_per_s == pytest.approx(2 * rate, rel=0.05)
    scene.close()


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


def test_a_profile_in_the_job_file_stands_in_until_its_family_has_run(market: Scene) -> None:
    cold_row = quote_job(market.market, spec(2, sites_max=1), TENANT_ID)[0]
    wanted = spec(2, sites_max=1)
    batch = wanted.market.workload.batch_per_gpu
    step_s = 3 * batch * wanted.market.workload.flops_per_sample / cold("cpu-slot").flops_per_s
    rows = tuple(
        ProfileTerms(gpu_type="cpu-slot", batch_per_gpu=each, steps=400_000, step_s=step_s * each / batch)
        for each in (batch // 2, batch)
    )
    profiled = wanted.model_copy(update={"market": wanted.market.model_copy(update={"profile": rows})})
    row = quote_job(market.market, profiled, TENANT_ID)[0]
    assert row.samples_per_s_expected < 0.7 * cold_row.samples_per_s_expected
    assert row.samples_per_s_high / row.samples_per_s_low < cold_row.samples_per_s_high / cold_row.samples_per_s_low
    promised = trained(market, 0.5)
    after = quote_job(market.market, profiled, TENANT_ID)[0]
    assert after.samples_per_s_expected == pytest.approx(0.5 * promised, rel=0.12)


def test_a_profile_costs_a_round_no_look_at_every_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round asks for the speeds of each of its jobs, and a market has many families."""
    looked = 0

    def counted(*given: Any, **named: Any) -> SpeedEstimate:
        nonlocal looked
        looked += 1
        return estimate(*given, **named)

    monkeypatch.setattr(speeds_module, "estimate", counted)
    run = MeasuredRun(1, 3000.0, 300.0, 5.0, 8)
    faster = MeasuredRun(1, 9000.0, 300.0, 5.0, 8)
    families = {(f"tenant-{n}", 100_000, 1e7): {"T4": [run], "A100": [faster]} for n in range(30)}
    speeds = Speeds(families)
    rows = (ProfileTerms(gpu_type="T4", batch_per_gpu=8, steps=100, step_s=0.8),)
    both = Resources(accelerators=tuple(GpuRequest(gpu_type=name, count_min=1, count_max=1) for name in ("T4", "A100")))
    job = spec(1, profile=rows).model_copy(update={"resources": both})
    found = speeds.of("newcomer", job)
    # What other families say of the two types carries the profile from one to the other.
    alone = Speeds({}).of("newcomer", job)
    of_catalogue = cold("A100").flops_per_s / cold("T4").flops_per_s
    ratio = speeds.ratios("T4", "A100")[0] / of_catalogue
    assert found["A100"].flops_per_s == pytest.approx(ratio * alone["A100"].flops_per_s)
    once = looked
    for number in range(10):
        speeds.of(f"newcomer-{number}", job)
    assert looked - once == 10
