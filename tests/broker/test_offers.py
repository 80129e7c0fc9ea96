"""What a site says that it sells is what the market sells, no more and no longer."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import select

from broker.database.tables import Gpu, Link, Pool, Site
from broker.enrol import remove_site
from broker.errors import CredentialError
from broker.offers import OfferError
from sites.protocol import LinkOffer, PoolOffer
from tests.broker.speaking import Scene


def test_an_offer_is_written_and_the_same_one_again_changes_nothing(scene: Scene) -> None:
    assert sorted(pool.pool_id for pool in scene.read(select(Pool))) == ["ada/cpu-slot", "bob/cpu-slot", "cid/cpu-slot"]
    assert len(scene.read(select(Link))) == 6
    scene.round()
    version = _site(scene, "ada").version
    scene.sites["ada"].beat()
    assert _site(scene, "ada").version == version
    assert not scene.is_due()


def test_a_changed_ask_raises_the_offers_version_and_asks_for_a_round(scene: Scene) -> None:
    scene.round()
    version = _site(scene, "ada").version
    _reoffer(scene, "ada", pools=(_pool(ask=5),))
    assert _site(scene, "ada").version == version + 1
    assert scene.is_due()
    assert scene.read(select(Pool.ask_micros_per_gpu_hour).where(Pool.site_id == "ada")) == [5]


def test_a_gpu_that_is_offered_no_more_is_not_sold_and_comes_back_when_it_is(scene: Scene) -> None:
    _reoffer(scene, "ada", pools=(_pool("slot-1", "slot-9"),))
    assert _present(scene, "ada") == ["slot-1", "slot-9"]
    _reoffer(scene, "ada", pools=(_pool("slot-0", "slot-1"),))
    assert _present(scene, "ada") == ["slot-0", "slot-1"]
    _reoffer(scene, "ada", pools=())
    assert _present(scene, "ada") == []


def test_links_follow_the_offer(scene: Scene) -> None:
    _reoffer(scene, "ada", links=(LinkOffer(target="bob", bandwidth_bits_per_s=5e6, delay_s=0.1),))
    links = {(link.source, link.target): link.bandwidth_bits_per_s for link in scene.read(select(Link))}
    assert links[("ada", "bob")] == 5e6
    assert ("ada", "cid") not in links
    assert ("bob", "ada") in links


@pytest.mark.parametrize(
    ("pools", "says"),
    [
        ((PoolOffer(gpu_type="GTX", gpu_ids=("a",), ask_micros_per_gpu_hour=1),), "unknown GPU type GTX"),
        (
            (
                PoolOffer(gpu_type="H100", gpu_ids=("a",), ask_micros_per_gpu_hour=1),
                PoolOffer(gpu_type="H100", gpu_ids=("b",), ask_micros_per_gpu_hour=1),
            ),
            "join the pools",
        ),
        ((PoolOffer(gpu_type="H100", gpu_ids=("a", "a"), ask_micros_per_gpu_hour=1),), "listed twice"),
        (
            (
                PoolOffer(gpu_type="H100", gpu_ids=("a",), ask_micros_per_gpu_hour=1),
                PoolOffer(gpu_type="A100", gpu_ids=("a",), ask_micros_per_gpu_hour=1),
            ),
            "listed twice",
        ),
    ],
)
def test_an_offer_that_makes_no_sense_is_refused_and_the_former_stands(
    scene: Scene, pools: tuple[PoolOffer, ...], says: str
) -> None:
    with pytest.raises(OfferError, match=says):
        _reoffer(scene, "ada", pools=pools)
    assert _present(scene, "ada") == ["slot-0", "slot-1"]
    assert [pool.gpu_type for pool in scene.read(select(Pool).where(Pool.site_id == "ada"))] == ["cpu-slot"]


def test_a_removed_site_speaks_no_more_and_what_ran_there_goes_on_elsewhere(scene: Scene) -> None:
    job_id = scene.submit(2, sites_allowed=["ada", "bob"])
    (site,) = scene.start(job_id)
    other = "bob" if site.site_id == "ada" else "ada"
    remove_site(scene.market, site.site_id)
    with pytest.raises(CredentialError, match="new invitation"):
        site.beat()
    scene.round()  # a round must bear an incumbent whose pool is gone
    scene.pass_s(10, other, "cid")
    scene.reconcile()
    assert scene.job(job_id).state == "queued"
    assert scene.taken_gpus(site.site_id) == 0
    scene.round()
    assert [lease.site_id for lease in scene.leases(job_id)] == [other]
    scene.sites[other].confirm()
    assert scene.job(job_id).state == "running"


def _site(scene: Scene, site_id: str) -> Site:
    return scene.read(select(Site).where(Site.site_id == site_id))[0]


def _present(scene: Scene, site_id: str) -> list[str]:
    return sorted(scene.read(select(Gpu.gpu_id).where(Gpu.site_id == site_id, Gpu.present)))


def _pool(*gpu_ids: str, ask: int = 100_000) -> PoolOffer:
    return PoolOffer(gpu_type="cpu-slot", gpu_ids=gpu_ids or ("slot-0", "slot-1"), ask_micros_per_gpu_hour=ask)


def _reoffer(scene: Scene, site_id: str, **changes: Any) -> None:
    site = scene.sites[site_id]
    site.offer = site.offer.model_copy(update=changes)
    site.say()
