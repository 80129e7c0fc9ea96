"""Where a job's datasets are decides where it may run, what waiting for it costs, and what a quote says."""

from __future__ import annotations

from typing import Any

import pytest

from broker.allocation.snapshot import DataState
from broker.errors import NeverPossibleError
from broker.quote import quote_job
from broker.rounds.snapshot import take
from broker.staging import UnknownDataSiteError
from sites.protocol import SiteData, Skill
from tests.broker.speaking import Scene, spec

CORPUS = "c" * 64
SOURCE = "https://data.example.org/corpus"
GB = 1_000_000_000


def corpus(**changes: Any) -> list[dict[str, Any]]:
    return [{"name": "corpus", "sha256": CORPUS, "size_gb": 1.0, "source": SOURCE, **changes}]


def let_take_part(scene: Scene, site_id: str, *, holds: bool = False, bits_per_s: float = 1e9, **changes: Any) -> None:
    site = scene.sites[site_id]
    site.skills = (Skill.DATA,)
    site.data = SiteData(
        **{
            "held": {CORPUS: GB} if holds else {},
            "cache_bytes": 10 * GB,
            "fetch_bits_per_s": bits_per_s,
            "sources": ("https://data.example.org/",),
            **changes,
        }
    )
    site.beat()


def placed(scene: Scene, job_id: str) -> list[str]:
    scene.round()
    return [lease.site_id for lease in scene.leases(job_id) if lease.state == "proposed"]


def test_data_that_may_not_leave_keeps_the_job_where_it_lies(scene: Scene) -> None:
    with pytest.raises(NeverPossibleError, match="no place for datasets at ada, bob, cid"):
        scene.submit(2, datasets=corpus(egress_ok=False))
    for site_id in ("ada", "bob", "cid"):
        let_take_part(scene, site_id, holds=site_id == "cid")
    first = scene.submit(2, datasets=corpus(egress_ok=False))
    second = scene.submit(2, datasets=corpus(egress_ok=False))
    assert placed(scene, first) + placed(scene, second) == ["cid"]
    waiting = next(job for job in map(scene.job, (first, second)) if job.state == "queued")
    assert "the dataset corpus, which may not leave where it lies, is not at ada, bob" in waiting.reason


@pytest.mark.parametrize(
    ("changes", "site", "reason"),
    [
        ({"sites": ["bob", "cid"]}, {}, "the dataset corpus may not be at ada"),
        (
            {},
            {"sources": ("https://other.org/",)},
            "the owner's policy does not cover the source of the dataset corpus",
        ),
        ({"size_gb": 11.0}, {}, "not enough is kept for the dataset corpus"),
        ({"source": None}, {}, "the dataset corpus, for which the job names no source, is not"),
    ],
)
def test_a_site_that_cannot_have_the_data_is_no_place(
    scene: Scene, changes: dict[str, Any], site: dict[str, Any], reason: str
) -> None:
    let_take_part(scene, "ada", **site)
    with pytest.raises(NeverPossibleError, match=reason):
        scene.submit(2, datasets=corpus(**changes))


def test_an_unknown_site_is_named_at_submit(scene: Scene) -> None:
    with pytest.raises(UnknownDataSiteError, match="names zoo, no site"):
        scene.submit(2, datasets=corpus(sites=["ada", "zoo"]))


def test_a_job_waits_for_a_site_with_its_data_as_long_as_bringing_it_takes(scene: Scene) -> None:
    let_take_part(scene, "ada", holds=True)
    let_take_part(scene, "bob", bits_per_s=8e8)  # 10 s for the corpus
    first = scene.submit(2, sites_allowed=["ada"])
    assert placed(scene, first) == ["ada"]
    second = scene.submit(2, datasets=corpus())
    assert placed(scene, second) == []
    assert "its data would have to be brought to bob first, so it waits up to 10 s" in scene.job(second).reason
    scene.sites["ada"].confirm()
    scene.pass_s(8, "ada", "bob", "cid")
    assert not scene.reconcile()
    scene.pass_s(3, "ada", "bob", "cid")
    assert scene.reconcile(), "the wait is over: a round is due though nothing else has changed"
    assert placed(scene, second) == ["bob"]


def test_a_quote_says_what_must_be_brought_first_and_a_round_weighs_its_egress(scene: Scene) -> None:
    let_take_part(scene, "bob", bits_per_s=8e8)
    ada = scene.sites["ada"]
    ada.offer = ada.offer.model_copy(update={"data_egress_beyond": 50_000})
    let_take_part(scene, "ada", holds=True)
    wanted = spec(2, datasets=corpus(), samples=10**6)
    rows = {row.configuration.site_ids[0]: row for row in quote_job(scene.market, wanted)}
    brought = {site: (row.staging_s, row.staging_bytes, row.staging_egress_micros) for site, row in rows.items()}
    assert brought == {"ada": (0.0, 0, 0), "bob": (10.0, GB, 50_000)}
    scene.submit(2, datasets=corpus(), samples=10**6)
    (job,) = scene.market.database.read(lambda session: take(session, scene.market)).snapshot.jobs
    assert job.data == DataState(home_site="ada", residency="world", bytes_per_sample=1000.0)
    # Read sample by sample that is what the whole dataset costs: 1000 bytes x 10^6 samples at 50,000 a GB.
    assert rows["bob"].total_micros - rows["ada"].total_micros == pytest.approx(50_000, rel=0.05)
