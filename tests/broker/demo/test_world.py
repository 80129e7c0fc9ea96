"""The demo's cast: what makes its one round show a market, and the files it writes for real commands."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from broker.cli.job_document import read_job
from broker.demo import processes, world
from broker.demo.journey import write_job
from broker.demo.processes import Places
from sites.settings import load_settings
from training.spec import JobSpec


def places(tmp_path: Path) -> Places:
    return Places(tmp_path, 1, 2)


def test_one_job_is_too_large_for_any_site_and_together_they_want_more_than_there_is() -> None:
    largest = max(site.slots for site in world.SITES)
    assert any(job.slots > largest and job.sites_max > 1 for job in world.JOBS)
    assert sum(job.slots for job in world.JOBS) > sum(site.slots for site in world.SITES)


def test_bids_and_asks_all_differ() -> None:
    assert len({job.bid_micros_per_million_samples for job in world.JOBS}) == len(world.JOBS)
    assert len({site.ask_micros_per_slot_hour for site in world.SITES}) == len(world.SITES)


def test_two_sites_listen() -> None:
    assert sum(site.listens for site in world.SITES) == 2


def test_every_job_file_is_one_that_the_market_takes(tmp_path: Path) -> None:
    for plan in world.JOBS:
        spec = JobSpec.model_validate(read_job(write_job(places(tmp_path), plan)).spec)
        assert spec.name == plan.name
        assert spec.market.workload.samples == plan.samples
        assert spec.bid_micros_per_million_samples == plan.bid_micros_per_million_samples
        assert spec.resources.accelerators[0].count_min == plan.slots


def test_every_site_file_is_one_that_an_agent_takes_and_shares_of_cores_sum_to_the_machine(tmp_path: Path) -> None:
    ranges = processes.port_ranges(len(world.SITES))
    settings = [
        load_settings(processes.write_site_settings(places(tmp_path), site, ports))
        for site, ports in zip(world.SITES, ranges, strict=True)
    ]
    for site, found in zip(world.SITES, settings, strict=True):
        assert found.pools[0].ask == site.ask_micros_per_slot_hour
        assert len(found.pools[0].gpu_ids) == site.slots
        assert (found.listen is not None) == site.listens
        assert {link.target for link in found.links} == {other.site_id for other in world.SITES} - {site.site_id}
    assert abs(sum(found.cores or 0 for found in settings) - len(os.sched_getaffinity(0))) < 0.01


def test_port_ranges_do_not_overlap() -> None:
    taken = [port for first, last in processes.port_ranges(3) for port in range(first, last + 1)]
    assert len(set(taken)) == 3 * processes.PORTS_PER_SITE


def test_the_callers_market_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANSA_URL", "https://market.example")
    monkeypatch.setenv("HANSA_HOME", "/somewhere")
    processes.clear_environment()
    environment = processes.broker_environment(Places(Path("demo"), 1, 2), "unix:///x")
    assert environment["HANSA_HOME"] == "demo/broker"
    assert not [name for name in os.environ if name.startswith("HANSA_")]
