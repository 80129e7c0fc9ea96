"""A lease is proposed, confirmed by its whole gang, active, and ended; its GPUs are taken until they are known to be free."""

from __future__ import annotations

import datetime as dt

import pytest
from cryptography import x509
from sqlalchemy import select

from broker.cancel import request_cancel
from broker.database.refusals import BarredConfiguration
from broker.database.tables import Event
from broker.heartbeat import OvertakenError
from sites.protocol import ExitCause, LeasePhase
from tests.broker.speaking import LIVENESS_S, MARGIN_S, PROPOSAL_S, Scene
from tests.simulation.founding import TENANT_ID


def test_a_lease_is_active_once_every_site_of_its_gang_has_confirmed(scene: Scene) -> None:
    job_id = scene.submit(4, sites_max=2)
    scene.round()
    first, second = (scene.sites[lease.site_id] for lease in scene.leases(job_id))
    assert scene.job(job_id).state == "proposed"
    first.confirm()
    assert [lease.state for lease in scene.leases(job_id)] == ["confirmed", "proposed"]
    assert first.orders[scene.lease(job_id, first.site_id).lease_id].phase is LeasePhase.PROPOSED
    scene.bells.sites.clear()
    answer = second.confirm()
    assert [lease.state for lease in scene.leases(job_id)] == ["active", "active"]
    assert scene.bells.sites == [first.site_id]
    (order,) = answer.leases
    assert order.phase is LeasePhase.ACTIVE
    assert order.attempt is not None
    assert order.liveness_s == LIVENESS_S
    assert scene.job(job_id).state == "running"
    assert scene.placement(job_id).term_ends_ms == scene.clock.now_ms() + scene.placement(job_id).term_s * 1000


def test_a_proposal_names_what_the_owner_must_judge(scene: Scene) -> None:
    job_id = scene.submit(2)
    scene.round()
    (lease,) = scene.leases(job_id)
    (order,) = scene.sites[lease.site_id].proposed()
    assert order.spec is not None
    assert order.spec.run == "python train.py"
    assert order.gpu_ids == ("slot-0", "slot-1")
    assert order.attempt is None


def test_a_veto_voids_the_gang_and_bars_its_configuration_for_some_rounds(scene: Scene) -> None:
    job_id = scene.submit(4, sites_max=2)
    scene.round()
    barred = scene.placement(job_id).configuration_key
    first, second = (scene.sites[lease.site_id] for lease in scene.leases(job_id))
    first.confirm()
    second.veto("full of other work")
    job = scene.job(job_id)
    assert (job.state, job.reason_code) == ("queued", "vetoed")
    assert "full of other work" in job.reason
    assert [lease.state for lease in scene.leases(job_id)] == ["ended", "ended"]
    assert scene.taken_gpus(first.site_id) == scene.taken_gpus(second.site_id) == 0
    scene.round()
    assert scene.placement(job_id).epoch == 2
    assert scene.placement(job_id).configuration_key != barred


def test_a_bar_lifts_by_itself_in_a_market_where_nothing_else_happens(scene: Scene) -> None:
    job_id = scene.submit(2, sites_allowed=["ada"])
    scene.round()
    scene.sites["ada"].veto()
    scene.round()
    assert scene.job(job_id).reason_code == "barred"
    first = scene.rounds()
    for _ in range(6):
        if scene.job(job_id).state == "queued":
            scene.pass_s(2, "ada", "bob", "cid")
            scene.reconcile()
            scene.round()
    assert scene.placement(job_id).epoch == 2
    assert scene.rounds() == first + 3  # barred for three rounds after the veto, the first of them held above


def test_what_nobody_confirms_falls_through_and_its_gpus_are_free_at_once(scene: Scene) -> None:
    job_id = scene.submit(4, sites_max=2)
    scene.round()
    first, second = (scene.sites[lease.site_id] for lease in scene.leases(job_id))
    first.confirm()
    scene.pass_s(PROPOSAL_S - 1, first.site_id)
    scene.reconcile()
    assert scene.job(job_id).state == "proposed"
    scene.pass_s(1, first.site_id)
    scene.reconcile()
    job = scene.job(job_id)
    assert (job.state, job.reason_code) == ("queued", "unconfirmed")
    assert second.site_id in job.reason
    assert scene.taken_gpus(first.site_id) == 0
    assert not scene.read(select(BarredConfiguration))
    assert first.confirm().leases == ()  # it has nothing of the kind any more


def test_a_proposal_to_a_site_that_fell_silent_runs_out_and_the_job_goes_elsewhere(scene: Scene) -> None:
    job_id = scene.submit(2)
    scene.round()
    gone = scene.leases(job_id)[0].site_id
    others = [site_id for site_id in scene.sites if site_id != gone]
    scene.pass_s(LIVENESS_S + MARGIN_S + 1, *others)
    scene.reconcile()
    scene.round()
    (lease,) = scene.leases(job_id)
    assert lease.state == "proposed"
    assert lease.site_id != gone


def test_gpus_of_an_ended_lease_stay_taken_until_the_site_says_that_they_are_free(scene: Scene) -> None:
    job_id = scene.submit(2)
    (site,) = scene.start(job_id)
    order = site.order()
    request_cancel(scene.market, TENANT_ID, job_id)
    assert scene.lease(job_id, site.site_id).state == "ended"
    assert scene.taken_gpus(site.site_id) == 2
    assert site.beat().leases[0].phase is LeasePhase.ENDED
    assert scene.taken_gpus(site.site_id) == 2
    site.exit_of(order, ExitCause.ORDERED)
    assert scene.taken_gpus(site.site_id) == 0
    assert site.beat().leases == ()


def test_gpus_of_a_silent_site_stay_taken_until_its_liveness_is_over_on_the_brokers_own_clock(scene: Scene) -> None:
    job_id = scene.submit(2)
    (site,) = scene.start(job_id)
    scene.clock.advance_s(LIVENESS_S + MARGIN_S - 0.1)
    scene.clock.step_utc_s(3600)  # a stepped clock is no reason to give a GPU away
    scene.reconcile()
    assert scene.lease(job_id, site.site_id).end_cause != "expired"
    assert scene.taken_gpus(site.site_id) == 2
    scene.clock.advance_s(0.2)
    scene.reconcile()
    assert scene.lease(job_id, site.site_id).state == "ended"
    assert scene.taken_gpus(site.site_id) == 0
    assert scene.job(job_id).state == "queued"


def test_a_reboot_of_the_broker_delays_the_end_of_a_liveness_and_never_hastens_it(scene: Scene) -> None:
    job_id = scene.submit(2)
    (site,) = scene.start(job_id)
    scene.clock.advance_s(LIVENESS_S)
    scene.clock.reboot()
    scene.reconcile()
    scene.clock.advance_s(LIVENESS_S + MARGIN_S - 0.1)
    scene.reconcile()
    assert scene.lease(job_id, site.site_id).state == "active"
    scene.clock.advance_s(0.2)
    scene.reconcile()
    assert scene.lease(job_id, site.site_id).state == "ended"


def test_an_item_of_an_old_epoch_is_refused_and_the_rest_of_the_heartbeat_is_taken(scene: Scene) -> None:
    old, new = scene.submit(2, sites_allowed=["ada"]), scene.submit(2, sites_allowed=["bob"])
    scene.start(old)
    ada = scene.sites["ada"]
    stale = ada.order().model_copy(update={"epoch": 7})
    ada.meter(ada.order(), 100)
    ada.meter(stale, 100, 2)
    scene.pass_s(1)
    answer = ada.beat()
    assert [refusal.code for refusal in answer.refusals] == ["lease.stale_epoch"]
    assert answer.usage_acknowledged == {stale.lease_id: 1}
    assert scene.lease(old, "ada").delivered_gpu_milliseconds == 100
    assert [event.kind for event in scene.read(select(Event).where(Event.kind == "stale"))] == ["stale"]
    assert scene.job(new).state == "proposed"


def test_a_site_may_not_speak_of_another_sites_lease(scene: Scene) -> None:
    job_id = scene.submit(2, sites_allowed=["ada"])
    scene.round()
    (order,) = scene.sites["ada"].proposed()
    bob = scene.sites["bob"]
    answer = bob.say(confirmations=(bob.confirmation(order),))
    assert [refusal.code for refusal in answer.refusals] == ["request.not_found"]
    assert scene.lease(job_id, "ada").state == "proposed"


def test_a_confirmation_said_twice_is_harmless(scene: Scene) -> None:
    job_id = scene.submit(2, sites_allowed=["ada"])
    scene.round()
    ada = scene.sites["ada"]
    (order,) = ada.proposed()
    heartbeat = ada.heartbeat(confirmations=(ada.confirmation(order),) * 2)
    ada.sequence += 1
    first = ada.send(heartbeat, ada.sequence)
    events = len(scene.events("lease"))
    again = ada.send(heartbeat, ada.sequence)
    assert first.refusals == again.refusals == ()
    assert len(scene.events("lease")) == events
    assert scene.lease(job_id, "ada").state == "active"
    assert len(scene.views(job_id)) == 1


def test_a_request_for_another_key_is_refused_and_the_proposal_stands(scene: Scene) -> None:
    job_id = scene.submit(2, sites_allowed=["ada"])
    scene.round()
    ada = scene.sites["ada"]
    (order,) = ada.proposed()
    forged = ada.confirmation(order).model_copy(update={"attempt_key": "00" * 32})
    answer = ada.say(confirmations=(forged,))
    assert [refusal.code for refusal in answer.refusals] == ["certificate.request_invalid"]
    assert scene.lease(job_id, "ada").state == "proposed"
    assert scene.lease(job_id, "ada").attempt_key is None


def test_a_heartbeat_that_was_overtaken_on_the_way_is_refused_whole(scene: Scene) -> None:
    job_id = scene.submit(2, sites_allowed=["ada"])
    scene.start(job_id)
    ada = scene.sites["ada"]
    late = ada.heartbeat(attempts=tuple(ada.reports.values()))
    ada.exit(ExitCause.SITE)
    with pytest.raises(OvertakenError, match="nothing in it was taken"):
        ada.send(late, ada.sequence - 1)
    assert scene.lease(job_id, "ada").phase == "exited"


def test_an_attempt_that_has_exited_cannot_run_again(scene: Scene) -> None:
    job_id = scene.submit(2, sites_allowed=["ada"])
    scene.start(job_id)
    ada = scene.sites["ada"]
    running = tuple(ada.reports.values())
    ada.exit(ExitCause.SITE)
    answer = ada.say(attempts=running)
    assert [refusal.code for refusal in answer.refusals] == ["attempt.over"]
    assert scene.lease(job_id, "ada").phase == "exited"


def test_a_gateways_certificate_is_renewed_before_its_life_is_over(scene: Scene) -> None:
    job_id = scene.submit(2, sites_allowed=["ada"])
    (ada,) = scene.start(job_id)
    first = _certificate(ada.order().attempt)
    key_life_s = scene.market.settings.attempt_certificate_s
    scene.write(lambda _session: scene.clock.step_utc_s(key_life_s * 0.6))
    ada.beat()
    assert _certificate(ada.order().attempt) == first
    scene.clock.step_utc_s(key_life_s * 0.1)
    ada.beat()
    second = _certificate(ada.order().attempt)
    assert second.not_valid_after_utc - first.not_valid_after_utc > dt.timedelta(seconds=key_life_s * 0.6)
    assert second.public_key() == first.public_key()
    names = x509.SubjectAlternativeName
    assert (
        second.extensions.get_extension_for_class(names).value == first.extensions.get_extension_for_class(names).value
    )


def _certificate(attempt: object) -> x509.Certificate:
    return x509.load_pem_x509_certificate(getattr(attempt, "certificate_pem", "").encode())
