"""Reconcile looks at everything by level: it may run late, twice, or at once with itself, and only the delay changes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select

from broker.database.tables import Event, Site
from broker.settle import settle
from sites.protocol import ExitCause
from tests.broker.speaking import LIVENESS_S, MARGIN_S, TERM_S, Scene


def test_a_sound_market_is_left_as_it_is(scene: Scene) -> None:
    scene.start(scene.submit(4, sites_max=2))
    before = len(scene.read(select(Event)))
    for _ in range(3):
        scene.reconcile()
    assert len(scene.read(select(Event))) == before


def test_a_site_that_is_not_heard_is_silent_and_live_again_when_it_is(scene: Scene) -> None:
    scene.pass_s(LIVENESS_S + MARGIN_S + 1, "bob")
    scene.round()
    assert scene.reconcile()
    assert _states(scene) == {"ada": "silent", "bob": "live", "cid": "silent"}
    scene.round()
    scene.sites["ada"].beat()
    assert _states(scene)["ada"] == "live"
    assert scene.is_due()


def test_a_site_is_not_called_silent_for_the_brokers_own_reboot(scene: Scene) -> None:
    scene.clock.advance_s(LIVENESS_S + MARGIN_S - 1)
    scene.clock.reboot()
    scene.clock.advance_s(5)
    scene.reconcile()
    assert set(_states(scene).values()) == {"live"}
    scene.clock.advance_s(LIVENESS_S + MARGIN_S + 1)
    scene.reconcile()
    assert set(_states(scene).values()) == {"silent"}


def test_two_at_once_do_what_one_does(scene: Scene) -> None:
    job_id = scene.submit(6, sites_max=3)
    scene.start(job_id)
    scene.pass_s(LIVENESS_S + MARGIN_S + 1, "ada")
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda _number: scene.reconcile(), range(3)))
    assert [view.state for view in scene.views(job_id)].count("promising") == 1
    assert [lease.state for lease in scene.leases(job_id)] == ["active", "ended", "ended"]
    assert len([event for event in scene.events("site") if event.after == "silent"]) == 2


def test_a_term_up_for_renewal_asks_for_one_round_and_not_for_one_with_every_pass(scene: Scene) -> None:
    job_id = scene.submit(2, sites_allowed=["ada"], budget=2 * 100_000 * TERM_S // 3600 + 10)
    scene.start(job_id)
    scene.round()
    scene.pass_s(TERM_S * 0.75, "ada", "bob", "cid")
    held = 0
    for _ in range(5):
        scene.pass_s(0.5, "ada", "bob", "cid")
        scene.reconcile()
        held += scene.round() is not None
    assert held == 1


def test_a_job_that_waits_beyond_its_deadline_fails_and_gets_its_budget_back(scene: Scene) -> None:
    ends_ms = scene.clock.now_ms() + 10_000
    overdue = scene.submit(2, bid=1, deadline_ms=ends_ms)
    patient = scene.submit(2, bid=1)
    scene.round()
    scene.reconcile()
    assert scene.job(overdue).state == "queued"
    scene.pass_s(11, "ada", "bob", "cid")
    scene.reconcile()
    job = scene.job(overdue)
    assert (job.state, job.reason_code) == ("failed", "deadline_passed")
    assert scene.job(patient).state == "queued"
    assert settle(scene.market) == 1
    assert scene.hold(overdue).closed_ms is not None


def test_a_round_is_rung_for_only_where_one_is_due(scene: Scene) -> None:
    scene.round()
    rung = scene.bells.rounds
    assert not scene.reconcile()
    assert scene.bells.rounds == rung
    scene.submit()
    assert scene.reconcile()
    assert scene.bells.rounds == rung + 2  # the submit's own ring may be lost


def test_survivors_that_cannot_be_hub_wait_for_their_patience_and_go_on_elsewhere(scene: Scene) -> None:
    for site_id in ("bob", "cid"):
        site = scene.sites[site_id]
        site.listens = False
        site.offer = site.offer.model_copy(update={"listens": False})
        site.beat()
    job_id = scene.submit(6, sites_max=3)
    first, *others = scene.start(job_id)
    assert first.view().hub == "ada"
    first.exit(ExitCause.SITE)
    scene.reconcile()
    assert len(scene.views(job_id)) == 1  # nobody is left who listens
    for site in others:
        site.beat()
        site.exit(ExitCause.EXCHANGE)
    assert scene.job(job_id).state == "queued"


@pytest.mark.parametrize("seconds", [0.0, 3600.0, -3600.0])
def test_a_stepped_utc_clock_ends_no_liveness(scene: Scene, seconds: float) -> None:
    job_id = scene.submit(2)
    (site,) = scene.start(job_id)
    scene.clock.step_utc_s(seconds)
    scene.reconcile()
    assert scene.taken_gpus(site.site_id) == 2
    assert scene.job(job_id).state == ("queued" if seconds > 0 else "running")  # a term is counted in UTC


def _states(scene: Scene) -> dict[str, str]:
    return {site.site_id: site.state for site in scene.read(select(Site))}
