"""A job's hold closes once every site has said its last word about it, or may say no more; then nothing is posted."""

from __future__ import annotations

from broker import ledger
from broker.cancel import request_cancel
from broker.settle import settle
from sites.protocol import ExitCause
from tests.broker.speaking import ASK, CREDIT, SETTLE_S, Scene
from tests.simulation.founding import TENANT_ID

HOUR_MS = 3_600_000


def test_a_job_that_never_ran_gets_its_whole_budget_back(scene: Scene) -> None:
    before = scene.market.database.read(ledger.balances)
    job_id = scene.submit(budget=7 * CREDIT)
    assert settle(scene.market) == 0
    request_cancel(scene.market, TENANT_ID, job_id)
    assert settle(scene.market) == 1
    assert settle(scene.market) == 0
    assert scene.hold(job_id).voided_micros == 7 * CREDIT
    after = scene.market.database.read(ledger.balances)
    assert after[f"tenant/{TENANT_ID}"] == before[f"tenant/{TENANT_ID}"]


def test_the_last_usage_of_a_cancelled_job_is_charged_and_only_then_its_hold_closes(scene: Scene) -> None:
    job_id = scene.submit(2)
    (site,) = scene.start(job_id)
    order = site.order()
    scene.pass_s(10, site.site_id)
    request_cancel(scene.market, TENANT_ID, job_id)
    assert settle(scene.market) == 0
    scene.pass_s(1)
    site.meter(order, 2 * 11_000)
    site.exit_of(order, ExitCause.ORDERED)
    charged = 2 * 11_000 * ASK // HOUR_MS
    assert scene.placement(job_id).charged_micros == charged > 0
    assert settle(scene.market) == 1
    hold = scene.hold(job_id)
    assert (hold.posted_micros, hold.voided_micros) == (charged, hold.amount_micros - charged)
    site.meter(order, 10, 2)
    assert [refusal.code for refusal in site.beat().refusals] == ["usage.refused"]
    assert scene.hold(job_id).posted_micros == charged


def test_a_hold_waits_for_every_site_and_not_for_ever(scene: Scene) -> None:
    job_id = scene.submit(4, sites_max=2)
    first, second = scene.start(job_id)
    order = first.order()
    request_cancel(scene.market, TENANT_ID, job_id)
    first.exit_of(order, ExitCause.ORDERED)
    scene.pass_s(SETTLE_S - 1, first.site_id)
    scene.reconcile()
    assert settle(scene.market) == 0
    scene.pass_s(1, first.site_id)
    assert settle(scene.market) == 1
    second.meter(next(iter(second.orders.values())), 10)
    assert [refusal.code for refusal in second.beat().refusals] == ["usage.refused"]


def test_a_finished_job_settles_with_what_it_used(scene: Scene) -> None:
    job_id = scene.submit(2)
    (site,) = scene.start(job_id)
    scene.pass_s(5, site.site_id)
    site.meter(site.order(), 10_000)
    site.exit(ExitCause.DONE)
    assert scene.job(job_id).state == "finished"
    assert settle(scene.market) == 1
    assert scene.hold(job_id).posted_micros == 10_000 * ASK // HOUR_MS
    assert scene.events("settled")[0].job_id == job_id


def test_usage_that_comes_after_the_report_of_the_end_is_charged_while_the_job_goes_on(scene: Scene) -> None:
    job_id = scene.submit(2)
    (site,) = scene.start(job_id)
    order = site.order()
    scene.pass_s(30, site.site_id)
    site.exit(ExitCause.SITE)
    assert scene.placement(job_id).charged_micros == 0
    site.meter(order, 2 * 30_000)
    site.beat()
    assert scene.placement(job_id).charged_micros == 2 * 30_000 * ASK // HOUR_MS


def test_utc_stepped_forward_closes_no_hold_before_the_last_honest_report(scene: Scene) -> None:
    job_id = scene.submit(2)
    (site,) = scene.start(job_id)
    order = site.order()
    scene.pass_s(10, site.site_id)
    request_cancel(scene.market, TENANT_ID, job_id)
    scene.clock.step_utc_s(10 * SETTLE_S)
    assert settle(scene.market) == 0
    site.meter(order, 2 * 10_000)
    assert site.exit_of(order, ExitCause.ORDERED).refusals == ()
    assert settle(scene.market) == 1
    assert scene.hold(job_id).posted_micros == 2 * 10_000 * ASK // HOUR_MS
