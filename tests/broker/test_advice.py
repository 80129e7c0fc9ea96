"""What a job should ask for by its goal, from the candidates of its quote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.advice import NoDeadlineError, advise, newest_noise, variants
from broker.streams import StreamStore
from tests.broker.speaking import Scene, spec
from tests.simulation.founding import TENANT_ID
from training.goals import Goal
from training.spec import GpuRequest, JobSpec, ProfileTerms, Resources


@pytest.fixture
def market(market_url: str, tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(market_url, tmp_path / "advised", {"ada": 2, "bob": 2}, term_s=3600)
    yield scene
    scene.close()


def wanted(**terms: object) -> JobSpec:
    """Return a job for one to four slots that leaves its plan open."""
    asked = spec(4, sites_max=2, **terms)
    request = GpuRequest(gpu_type="cpu-slot", count_min=1, count_max=4)
    return asked.model_copy(update={"resources": Resources(accelerators=(request,))})


def test_a_goal_chooses_count_and_sites_and_says_why(market: Scene) -> None:
    job = wanted()
    cheap = advise(market.market, job, TENANT_ID, Goal.VALUE)
    fast = advise(market.market, job, TENANT_ID, Goal.BUDGET)
    assert cheap is not None
    assert fast is not None
    assert fast.row.samples_per_s_expected >= cheap.row.samples_per_s_expected
    assert fast.candidates > 12
    assert "cpu-slot at" in fast.why
    everything = job.model_copy(
        update={"market": job.market.model_copy(update={"deadline_ms": market.clock.now_ms() + 10**10})}
    )
    timely = advise(market.market, everything, TENANT_ID, Goal.DEADLINE)
    assert timely is not None
    assert timely.reached
    assert timely.row.total_micros <= min(cheap.row.total_micros, fast.row.total_micros)


def test_a_deadline_that_needs_both_sites_takes_both(market: Scene) -> None:
    job = wanted()
    one_site = advise(
        market.market,
        job.model_copy(update={"market": job.market.model_copy(update={"sites_max": 1})}),
        TENANT_ID,
        Goal.BUDGET,
    )
    assert one_site is not None
    seconds = job.market.workload.samples / one_site.row.samples_per_s_expected / 1.5
    deadline_ms = market.clock.now_ms() + round(seconds * 1000)
    asked = job.model_copy(update={"market": job.market.model_copy(update={"deadline_ms": deadline_ms})})
    found = advise(market.market, asked, TENANT_ID, Goal.DEADLINE)
    assert found is not None
    assert found.row.configuration.site_ids == ("ada", "bob")
    assert found.counts < 1  # sites that train apart lose a little
    assert found.sync.period_steps > job.market.sync.period_steps


def test_a_goal_without_its_deadline_is_refused(market: Scene) -> None:
    with pytest.raises(NoDeadlineError, match=r"market\.deadline"):
        advise(market.market, wanted(), TENANT_ID, Goal.DEADLINE)


def test_batches_of_a_profile_are_tried_beside_the_jobs_own() -> None:
    job = spec(1)
    rows = tuple(ProfileTerms(gpu_type="T4", batch_per_gpu=size, steps=9, step_s=0.1) for size in (2, 4, 8))
    profiled = job.model_copy(update={"market": job.market.model_copy(update={"profile": rows})})
    tried = [each.market.workload.batch_per_gpu for each in variants(profiled)]
    assert tried == [job.market.workload.batch_per_gpu, 2, 4]


def test_the_newest_noise_scale_is_read_from_whatever_a_site_wrote(tmp_path: Path) -> None:
    streams = StreamStore(tmp_path, 1_000_000)
    rows = [json.dumps({"noise_scale_samples": value}) for value in (30.0, 70.5, 10**400, True, "70", float("inf"))]
    rows += ["[]", "{nonsense"]
    streams.append("lease_1", "metrics", 0, "\n".join(rows).encode())
    assert newest_noise(streams, "lease_1") == 70.5
    assert newest_noise(streams, "lease_2") is None
