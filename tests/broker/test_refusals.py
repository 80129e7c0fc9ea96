"""An owner's veto: the job goes elsewhere, and is not proposed there again until the time or the policy is another."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import func, select

from broker.allocation.clearing import Clearing
from broker.database.refusals import SiteRefusal
from broker.database.tables import Event, Lease
from broker.rounds import clear as clear_module
from sites.protocol import RefusalScope, Veto
from tests.broker.speaking import TERM_S, Scene, SpeakingSite

TENANT_REFUSED = {"code": "policy.tenant", "reason": "the owner does not serve this tenant"}


def refuse(site: SpeakingSite, scope: RefusalScope = RefusalScope.SITE, **words: Any) -> None:
    site.say(
        vetoes=tuple(
            Veto(lease_id=order.lease_id, epoch=order.epoch, scope=scope, **{**TENANT_REFUSED, **words})
            for order in site.proposed()
        )
    )


def test_a_job_that_an_owner_refuses_goes_elsewhere_and_is_not_proposed_there_again(scene: Scene) -> None:
    job_id = scene.submit(2)
    asked = []
    for _ in range(3):
        scene.round()
        if scene.job(job_id).state != "proposed":
            break
        (lease,) = scene.leases(job_id)
        asked.append(lease.site_id)
        refuse(scene.sites[lease.site_id])
    assert sorted(asked) == ["ada", "bob", "cid"]
    for _ in range(5):
        scene.round()
    job = scene.job(job_id)
    assert (job.state, job.epoch) == ("queued", 3)
    assert "ada declined it (policy.tenant: the owner does not serve this tenant)" in job.reason
    assert len(scene.read(select(SiteRefusal))) == 3


def test_a_refusal_of_one_size_still_leaves_the_others(scene: Scene) -> None:
    scene.submit(2, sites_allowed=["ada"])
    scene.round()
    refuse(scene.sites["ada"], RefusalScope.CONFIGURATION)
    assert not scene.read(select(SiteRefusal))


def test_a_changed_policy_is_asked_anew(scene: Scene) -> None:
    job_id = scene.submit(2, sites_allowed=["ada"])
    scene.round()
    refuse(scene.sites["ada"])
    scene.round()
    assert scene.job(job_id).state == "queued"
    ada = scene.sites["ada"]
    ada.offer = ada.offer.model_copy(update={"policy_digest": "1" * 64})
    ada.beat()
    scene.round()
    assert scene.job(job_id).state == "proposed"


def test_the_site_is_asked_again_when_its_refusal_says_so(scene: Scene) -> None:
    job_id = scene.submit(2, sites_allowed=["ada"])
    scene.round()
    refuse(scene.sites["ada"], until_ms=scene.clock.now_ms() + 10_000)
    scene.pass_s(8, "ada", "bob", "cid")
    scene.reconcile()
    scene.round()
    assert scene.job(job_id).state == "queued"
    rounds = scene.rounds()
    scene.pass_s(3, "ada", "bob", "cid")
    assert scene.reconcile(), "a refusal that is over is due a round, in a market where nothing else happens"
    scene.round()
    assert scene.job(job_id).state == "proposed"
    assert scene.rounds() == rounds + 1
    assert not scene.read(select(SiteRefusal))


def test_a_job_whose_data_stays_is_not_spread_over_sites(scene: Scene) -> None:
    job_id = scene.submit(4, sites_max=2)
    scene.round()
    assert len(scene.leases(job_id)) == 2
    refuse(scene.sites[scene.leases(job_id)[0].site_id], RefusalScope.GANGS, code="policy.data")
    scene.round()
    assert scene.job(job_id).state == "queued"
    assert "policy.data" in scene.job(job_id).reason


def test_a_running_lease_that_is_not_renewed_runs_to_the_end_of_its_term_and_the_job_goes_on_elsewhere(
    scene: Scene,
) -> None:
    job_id = scene.submit(2, samples=10_000_000)
    (site,) = scene.start(job_id)
    order = site.order()
    said = Veto(
        lease_id=order.lease_id, epoch=order.epoch, code="policy.lease_hours", reason="enough", scope=RefusalScope.SITE
    )
    for _ in range(3):
        site.say(vetoes=(said,), attempts=tuple(site.reports.values()))
    assert scene.read(select(func.count()).select_from(Event).where(Event.kind == "refusal")) == [1]
    scene.round()
    assert scene.job(job_id).state == "running"
    scene.pass_s(TERM_S - 10, "ada", "bob", "cid")
    scene.reconcile()
    scene.round()
    scene.pass_s(12, "ada", "bob", "cid")
    scene.reconcile()
    scene.round()
    (next_lease,) = scene.leases(job_id)
    assert next_lease.site_id != site.site_id
    (former,) = scene.read(select(Lease).where(Lease.job_id == job_id, Lease.site_id == site.site_id))
    assert former.state == "ended"
    assert former.ended_ms is not None
    assert former.active_ms is not None
    assert former.ended_ms - former.active_ms >= (TERM_S - 12) * 1000


def test_a_refusal_that_comes_while_a_round_is_solved_stops_the_renewal(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = scene.submit(2, samples=10_000_000)
    (site,) = scene.start(job_id)
    order = site.order()
    said = Veto(lease_id=order.lease_id, epoch=order.epoch, scope=RefusalScope.SITE, **TENANT_REFUSED)
    scene.round()
    scene.pass_s(TERM_S * 0.75, "ada", "bob", "cid")
    scene.reconcile()
    solved = clear_module.clear

    def then_refused(*given: Any, **named: Any) -> Clearing:
        site.say(vetoes=(said,), attempts=tuple(site.reports.values()))
        return solved(*given, **named)

    monkeypatch.setattr(clear_module, "clear", then_refused)
    scene.round()
    assert "declined it (policy.tenant" in scene.events("dropped")[-1].detail
    assert not scene.events("renewed")


@pytest.mark.parametrize("skills", [(), ("gang",)])
def test_an_agent_is_told_of_its_gang_only_if_it_understands(scene: Scene, skills: tuple[str, ...]) -> None:
    job_id = scene.submit(4, sites_max=2)
    scene.round()
    first, second = scene.leases(job_id)
    (order,) = scene.sites[first.site_id].say(skills=skills).leases
    assert (order.peers, order.term_s) == (((second.site_id,), TERM_S) if skills else (None, None))
