"""What owners ask beyond a price, and tenants beyond a bid, decides the round: curves, quotas, times, places of data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from broker.allocation.clearing import Placement as Award
from broker.database.tables import Placement
from broker.enrol import remove_site
from broker.submit import NeverPossibleError
from sites.protocol import AskStepOffer, Offer, ReservedOffer
from tests.broker.speaking import ASK, Scene


@pytest.fixture
def scene(market_url: str, tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(market_url, tmp_path / "home", {"ada": 4, "bob": 4, "cid": 4})
    yield scene
    scene.close()


def reoffer(scene: Scene, site_id: str, *, pool: dict[str, Any] | None = None, **changes: Any) -> None:
    site = scene.sites[site_id]
    pools = tuple(each.model_copy(update=pool or {}) for each in site.offer.pools)
    site.offer = Offer.model_validate(site.offer.model_copy(update={"pools": pools, **changes}).model_dump())
    site.say()


def payout_micros_per_gpu_hour(scene: Scene, job_id: str) -> int:
    (award,) = scene.read(select(Placement.award).where(Placement.job_id == job_id))
    (pool,) = Award.model_validate_json(award).pools
    return pool.payout_micros_per_gpu_hour


def where(scene: Scene, job_id: str) -> set[str]:
    return {lease.site_id for lease in scene.leases(job_id)}


def test_the_last_gpus_of_a_curve_are_sold_at_their_own_ask(scene: Scene) -> None:
    reoffer(scene, "ada", pool={"ask_steps": (AskStepOffer(gpus=2, ask_micros_per_gpu_hour=3 * ASK),)})
    first = scene.submit(2, sites_allowed=["ada"])
    scene.round()
    assert where(scene, first) == {"ada"}
    assert ASK <= payout_micros_per_gpu_hour(scene, first) <= 3 * ASK
    scene.sites["ada"].confirm()
    second = scene.submit(2, sites_allowed=["ada"])
    scene.round()
    assert where(scene, second) == {"ada"}
    assert payout_micros_per_gpu_hour(scene, second) >= 3 * ASK


def test_no_job_takes_more_than_the_owners_quota(scene: Scene) -> None:
    reoffer(scene, "ada", pool={"job_gpus_max": 1})
    with pytest.raises(NeverPossibleError, match="no federation could ever hold"):
        scene.submit(2, sites_allowed=["ada"])
    job_id = scene.submit(2, sites_allowed=["ada", "bob"], sites_max=1)
    scene.round()
    assert where(scene, job_id) == {"bob"}


def test_reserved_gpus_are_sold_once_their_time_is_over(scene: Scene) -> None:
    now_ms = scene.clock.now_ms()
    kept = ReservedOffer(from_ms=now_ms, to_ms=now_ms + 20_000, gpus=3)
    reoffer(scene, "ada", pool={"reserved": (kept,)})
    job_id = scene.submit(2, sites_allowed=["ada"])
    scene.round()
    assert not where(scene, job_id)
    scene.pass_s(21, "ada", "bob", "cid")
    scene.reconcile()  # nobody said anything: the time alone makes a round due
    scene.round()
    assert where(scene, job_id) == {"ada"}


def test_nothing_is_sold_where_a_drain_is_near(scene: Scene) -> None:
    reoffer(scene, "ada", drains_at_ms=scene.clock.now_ms() + 1000)
    job_id = scene.submit(2, sites_allowed=["ada", "bob"], sites_max=1)
    scene.round()
    assert where(scene, job_id) == {"bob"}


def test_data_stays_where_its_tenant_says(scene: Scene) -> None:
    for site_id, region in (("ada", "north"), ("bob", "north"), ("cid", "south")):
        reoffer(scene, site_id, region=region)
    filler = scene.submit(4, sites_allowed=["ada"])
    scene.round()
    assert where(scene, filler) == {"ada"}
    scene.sites["ada"].confirm()
    at_home = scene.submit(2, data={"home_site": "ada", "residency": "site"})
    in_region = scene.submit(2, data={"home_site": "ada", "residency": "region"})
    scene.round()
    assert not where(scene, at_home)
    assert where(scene, in_region) == {"bob"}


def test_data_that_lies_nowhere_is_refused_with_the_sites_that_there_are(scene: Scene) -> None:
    with pytest.raises(NeverPossibleError, match="no site of this market; the sites are: ada, bob, cid"):
        scene.submit(2, data={"home_site": "dora"})


def test_a_job_whose_datas_home_was_removed_waits_and_the_round_goes_on(scene: Scene) -> None:
    job_id = scene.submit(2, data={"home_site": "cid", "residency": "site"})
    remove_site(scene.market, "cid")
    other = scene.submit(2)
    scene.round()
    assert not where(scene, job_id)
    assert where(scene, other) < {"ada", "bob"}
