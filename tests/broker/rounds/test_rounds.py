"""A round sees the market as it is, commits only what still holds, and can be held again to the bit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session
from structlog.testing import capture_logs

from broker.allocation import solve
from broker.allocation.clearing import Clearing
from broker.allocation.snapshot import Snapshot
from broker.cancel import request_cancel
from broker.database.tables import Hold, Job, LeasedGpu, Round, Site
from broker.errors import IllegalTransitionError, NotFoundError
from broker.freeze import set_frozen
from broker.leases import end_placement, live_placement, requeue
from broker.rounds import clear as clear_module
from broker.rounds.replay import replay
from broker.rounds.snapshot import TakenSnapshot, renewal_starts_ms, take
from broker.transitions import EndCause, change_state, note_change
from sites.protocol import ExitCause
from tests.broker.speaking import ASK, LIVENESS_S, MARGIN_S, TERM_S, Scene, spec
from tests.simulation.founding import TENANT_ID
from training.sync_choice import choose_sync
from training.throughput import Link, SitePart

ALL = ("ada", "bob", "cid")


# --- What a round sees ----------------------------------------------------------------------------


def test_capacity_is_what_is_free_and_what_incumbents_hold(scene: Scene) -> None:
    scene.start(scene.submit(1, sites_allowed=["ada"]))
    assert _capacity(scene) == {"ada": 2, "bob": 2, "cid": 2}


def test_gpus_of_a_lease_that_ended_are_no_capacity_until_they_are_free(scene: Scene) -> None:
    job_id = scene.submit(1, sites_allowed=["ada"])
    scene.start(job_id)
    order = scene.sites["ada"].order()
    request_cancel(scene.market, TENANT_ID, job_id)
    assert _capacity(scene)["ada"] == 1
    scene.sites["ada"].exit_of(order, ExitCause.ORDERED)
    assert _capacity(scene)["ada"] == 2


def test_a_silent_site_offers_nothing_new_and_keeps_what_runs(scene: Scene) -> None:
    scene.start(scene.submit(1, sites_allowed=["ada"]))
    scene.start(scene.submit(1, sites_allowed=["bob"]))
    scene.write(lambda session: _silence(session, "ada"))
    assert _capacity(scene) == {"ada": 1, "bob": 2, "cid": 2}


def test_a_draining_site_keeps_its_running_terms_and_renews_none(scene: Scene) -> None:
    job_id = scene.submit(1, sites_allowed=["ada"])
    (ada,) = scene.start(job_id)
    ada.offer = ada.offer.model_copy(update={"draining": True})
    ada.beat()
    assert _capacity(scene) == {"ada": 1, "bob": 2, "cid": 2}
    _until_renewal(scene, job_id)
    assert _capacity(scene)["ada"] == 0
    scene.reconcile()
    scene.round()
    assert not scene.events("renewed")


def test_gpus_that_are_offered_no_more_leave_those_that_are(scene: Scene) -> None:
    scene.start(scene.submit(1, sites_allowed=["ada"]))
    ada = scene.sites["ada"]
    pool = ada.offer.pools[0].model_copy(update={"gpu_ids": ("slot-1", "slot-7")})
    ada.offer = ada.offer.model_copy(update={"pools": (pool,)})
    ada.beat()
    assert _capacity(scene)["ada"] == 3  # slot-0 is held, slot-1 and slot-7 are free


def test_nothing_changed_no_round(scene: Scene) -> None:
    assert scene.round() is not None
    assert scene.round() is None
    for site in scene.sites.values():
        site.beat()
    scene.reconcile()
    assert scene.round() is None
    scene.submit()
    assert scene.round() is not None


def test_a_frozen_market_holds_no_round_and_catches_up_when_thawed(scene: Scene) -> None:
    job_id = scene.submit()
    set_frozen(scene.market, frozen=True)
    assert scene.round() is None
    assert scene.job(job_id).state == "queued"
    set_frozen(scene.market, frozen=False)
    assert scene.round() is not None
    assert scene.job(job_id).state == "proposed"


# --- What a round commits -------------------------------------------------------------------------


def _cancel(scene: Scene, job_id: str) -> None:
    request_cancel(scene.market, TENANT_ID, job_id)


def _raise_asks(scene: Scene, _job_id: str) -> None:
    for site in scene.sites.values():
        pool = site.offer.pools[0].model_copy(update={"ask_micros_per_gpu_hour": ASK + 1})
        site.offer = site.offer.model_copy(update={"pools": (pool,)})
        site.beat()


def _take_gpus(scene: Scene, job_id: str) -> None:
    # Rows that the snapshot did not know of, under a lease of another job.
    (other,) = scene.leases("job_000001")

    def take_all(session: Session) -> None:
        for site_id in ALL:
            for number in range(2):
                if session.get(LeasedGpu, (other.lease_id, site_id, f"slot-{number}")) is None:
                    session.add(LeasedGpu(lease_id=other.lease_id, site_id=site_id, gpu_id=f"slot-{number}", live=True))

    scene.write(take_all)


def _spend_hold(scene: Scene, job_id: str) -> None:
    def shrink(session: Session) -> None:
        hold = session.get_one(Hold, job_id)
        hold.voided_micros = hold.amount_micros - 10

    scene.write(shrink)


def _restore(scene: Scene, job_id: str) -> None:
    """Undo what `_take_gpus` and `_spend_hold` did behind the services' backs, so that the audit can be asked."""

    def restore(session: Session) -> None:
        session.get_one(Hold, job_id).voided_micros = 0
        for row in session.scalars(select(LeasedGpu).where(LeasedGpu.site_id != "ada")):
            session.delete(row)
        note_change(session)

    scene.write(restore)


@pytest.mark.parametrize(
    ("meanwhile", "reason"),
    [
        (_cancel, "the job has changed"),
        (_raise_asks, "the offer of"),
        (_take_gpus, "GPUs are no longer free"),
        (_spend_hold, "the hold no longer covers"),
    ],
)
def test_what_changed_during_the_solve_is_dropped_with_its_reason_and_a_new_round_is_due(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[Scene, str], None], reason: str
) -> None:
    scene.start(scene.submit(2, sites_allowed=["ada"]))
    job_id = scene.submit(2)
    _during_the_solve(monkeypatch, lambda: meanwhile(scene, job_id))
    row = scene.round()
    assert row is not None
    (drop,) = json.loads(row.dropped)
    assert drop["job_id"] == job_id
    assert reason in drop["reason"]
    assert [event.detail for event in scene.events("dropped")] == [drop["reason"]]
    assert row.placements_made == scene.placements(job_id) == 0
    # Whoever took GPUs will give them back, which is a change: no round is held again until then.
    assert scene.is_due() is (meanwhile is not _take_gpus)
    if meanwhile in {_take_gpus, _spend_hold}:
        _restore(scene, job_id)
    monkeypatch.undo()
    scene.round()
    assert scene.placements(job_id) == (0 if meanwhile is _cancel else 1)


def test_a_market_that_is_frozen_during_the_solve_places_nothing(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = scene.submit()
    _during_the_solve(monkeypatch, lambda: set_frozen(scene.market, frozen=True))
    assert scene.round() is None
    assert scene.job(job_id).state == "queued"
    assert scene.rounds() == 0


def test_of_two_workers_that_solve_the_same_round_one_commits(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = scene.submit()
    both_solved = Barrier(2)
    _during_the_solve(monkeypatch, lambda: both_solved.wait(60))
    with ThreadPoolExecutor(2) as threads:
        rows = list(threads.map(lambda _number: scene.round(), range(2)))
    assert [row.round_number for row in rows if row is not None] == [1]
    assert scene.rounds() == scene.placements(job_id) == 1


def test_a_committed_round_replays_to_the_bit_and_verifies(scene: Scene) -> None:
    scene.start(scene.submit(4, sites_max=2))
    scene.submit(2)
    scene.submit(2, bid=1)
    scene.round()
    for number in range(1, scene.rounds() + 1):
        again = replay(scene.market, number)
        assert again.identical
        assert again.findings == ()
        assert again.solver_now == again.solver_recorded
    with pytest.raises(NotFoundError):
        replay(scene.market, 99)


def test_a_round_replays_by_the_engine_that_solved_it(scene: Scene) -> None:
    scene.submit(2)
    scene.round()
    settings = scene.market.settings.model_copy(update={"lp_engine": "clp"})
    again = replay(dataclasses.replace(scene.market, settings=settings), 1)
    assert again.identical
    assert again.solver_now == again.solver_recorded


def test_a_replay_tells_a_round_that_was_tampered_with(scene: Scene) -> None:
    scene.submit(2)
    scene.round()
    row = scene.read(select(Round))[0]
    clearing = Clearing.from_json(scene.market.artifacts.get_bytes(row.clearing_digest))
    (won,) = clearing.placements
    cheaper = won.model_copy(update={"value_micros_per_hour": won.value_micros_per_hour * 2})
    forged = clear_module.keep_document(scene.market, clearing.model_copy(update={"placements": (cheaper,)}))
    scene.write(lambda session: setattr(session.get_one(Round, 1), "clearing_digest", forged))
    again = replay(scene.market, 1)
    assert not again.identical
    assert again.findings != ()


def test_a_job_left_out_is_told_why(scene: Scene) -> None:
    job_id = scene.submit(2, bid=1)
    scene.round()
    job = scene.job(job_id)
    assert (job.state, job.reason_code) == ("queued", "bid_below_ask")
    assert "the sites ask" in job.reason


# --- Terms ----------------------------------------------------------------------------------------


def test_a_renewal_lengthens_the_term_and_its_reservation_at_the_new_price(scene: Scene) -> None:
    job_id = scene.submit(2, sites_allowed=["ada"])
    (ada,) = scene.start(job_id)
    before = scene.placement(job_id)
    assert before.term_ends_ms is not None
    pool = ada.offer.pools[0].model_copy(update={"ask_micros_per_gpu_hour": 3 * ASK})
    ada.offer = ada.offer.model_copy(update={"pools": (pool,)})
    ada.beat()
    scene.round()
    assert ada.order().price_micros_per_gpu_hour == ASK  # locked inside the term
    _until_renewal(scene, job_id)
    scene.reconcile()
    scene.round()
    after = scene.placement(job_id)
    assert after.placement_id == before.placement_id
    assert after.term_ends_ms == before.term_ends_ms + after.term_s * 1000
    assert after.reserved_micros == before.reserved_micros + 2 * 3 * ASK * after.term_s // 3600
    assert after.charge_micros_per_hour == 6 * ASK
    ada.beat()
    assert ada.order().price_micros_per_gpu_hour == 3 * ASK
    assert ada.order().term_ends_ms == after.term_ends_ms
    assert len(scene.events("renewed")) == 1
    assert scene.job(job_id).state == "running"


def test_a_term_that_is_not_renewed_ends_and_its_job_waits_again(scene: Scene) -> None:
    job_id = scene.submit(2, sites_allowed=["ada"])
    (ada,) = scene.start(job_id)
    order = ada.order()
    pool = ada.offer.pools[0].model_copy(update={"ask_micros_per_gpu_hour": 10**12})
    ada.offer = ada.offer.model_copy(update={"pools": (pool,)})
    _until_renewal(scene, job_id)
    held = scene.rounds()
    for _ in range(4):
        scene.reconcile()
        scene.round()
    assert scene.rounds() <= held + 2  # one look at the term that is over, not one with every reconcile
    assert scene.job(job_id).state == "running"
    scene.pass_s(TERM_S, *ALL)
    scene.reconcile()
    job = scene.job(job_id)
    assert (job.state, job.reason_code) == ("queued", "term_ended")
    assert scene.taken_gpus("ada") == 2
    ada.exit_of(order, ExitCause.ORDERED)
    assert scene.taken_gpus("ada") == 0


def test_an_agent_that_cannot_leave_is_stopped_when_its_time_is_up_and_its_job_moves(scene: Scene) -> None:
    job_id = scene.submit(2)
    (old,) = scene.start(job_id)
    order = old.order()
    others = [site for site in scene.sites.values() if site is not old]
    pool = old.offer.pools[0].model_copy(update={"ask_micros_per_gpu_hour": 10**9})
    old.offer = old.offer.model_copy(update={"pools": (pool,)})
    _until_renewal(scene, job_id)
    scene.reconcile()
    scene.round()
    job = scene.job(job_id)
    assert (job.state, job.reason_code) == ("running", "moving")
    assert scene.taken_gpus(old.site_id) == 2
    scene.pass_s(TERM_S, *ALL)
    scene.reconcile()
    assert scene.job(job_id).state == "proposed"
    assert scene.taken_gpus(old.site_id) == 2
    (lease,) = scene.leases(job_id)
    assert lease.site_id in {site.site_id for site in others}
    assert lease.epoch == 2
    old.meter(order, 2 * 40_000)
    old.exit_of(order, ExitCause.ORDERED)
    assert scene.hold(job_id).posted_micros == 2 * 40_000 * ASK // 3_600_000


def test_a_running_term_is_reserved_inside_its_hold_and_what_cannot_be_is_not_renewed(scene: Scene) -> None:
    term_micros = 2 * ASK * TERM_S // 3600
    job_id = scene.submit(2, sites_allowed=["ada"], budget=term_micros * 3 // 2)
    scene.start(job_id)
    placement, hold = scene.placement(job_id), scene.hold(job_id)
    assert placement.reserved_micros - placement.charged_micros <= hold.amount_micros - hold.posted_micros
    _until_renewal(scene, job_id)
    scene.reconcile()
    scene.round()
    renewed, hold = scene.placement(job_id), scene.hold(job_id)
    assert renewed.reserved_micros - renewed.charged_micros <= hold.amount_micros - hold.posted_micros


def test_what_an_ended_place_may_still_charge_is_promised_to_no_other(scene: Scene) -> None:
    job_id = scene.submit(2)
    (site,) = scene.start(job_id)
    order = site.order()
    scene.pass_s(20, *ALL)
    hold = scene.hold(job_id)
    request = _job_in_snapshot(scene, job_id)
    assert request.hold_left_micros == hold.amount_micros
    site_lost = site.site_id
    scene.write(lambda session: _end(scene, session, job_id))
    most = 2 * ASK * (20 + round(LIVENESS_S)) // 3600
    left = _job_in_snapshot(scene, job_id).hold_left_micros
    assert hold.amount_micros - most - 1000 <= left <= hold.amount_micros - most + 1000
    scene.sites[site_lost].exit_of(order, ExitCause.ORDERED)
    assert _job_in_snapshot(scene, job_id).hold_left_micros == hold.amount_micros


def test_usage_of_a_site_that_was_lost_before_its_gang_was_renewed_is_still_paid(scene: Scene) -> None:
    job_id = scene.submit(4, sites_max=2, sites_allowed=["ada", "bob"])
    ada, bob = scene.start(job_id)
    order = ada.order()
    _until_renewal(scene, job_id)
    ada.offer = ada.offer.model_copy(update={"pools": ()})
    ada.exit(ExitCause.SITE)
    bob.beat()
    scene.reconcile()
    scene.round()
    assert len(scene.events("renewed")) == 1
    assert [row["site_id"] for row in json.loads(scene.placement(job_id).award)["pools"]] == ["bob"]
    ada.meter(order, 2 * 5_000)
    answer = ada.beat()
    assert answer.refusals == ()
    assert scene.hold(job_id).posted_micros == 2 * 5_000 * ASK // 3_600_000


def test_a_renewal_of_a_gang_that_was_reduced_meanwhile_is_dropped(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = scene.submit(4, sites_max=2, sites_allowed=["ada", "bob"])
    ada, _ = scene.start(job_id)
    before = scene.placement(job_id)
    _until_renewal(scene, job_id)
    scene.reconcile()
    _during_the_solve(monkeypatch, lambda: ada.exit(ExitCause.SITE))
    held = scene.round()
    assert held is not None
    assert json.loads(held.dropped) == [{"job_id": job_id, "reason": "the gang has changed since the snapshot"}]
    assert scene.events("renewed") == []
    assert scene.placement(job_id).reserved_micros == before.reserved_micros
    assert scene.is_due()


def test_a_round_that_was_overtaken_says_so_and_any_other_conflict_is_no_quiet_end(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.submit(1)
    with monkeypatch.context() as patch:
        _during_the_solve(patch, lambda: set_frozen(scene.market, frozen=True))
        with capture_logs() as logs:
            assert scene.round() is None
    assert [(entry["event"], entry["log_level"]) for entry in logs] == [("round.overtaken", "warning")]
    set_frozen(scene.market, frozen=False)

    def break_down(*_: object, **__: object) -> None:
        raise IllegalTransitionError("a lease cannot go from ended to active")

    with monkeypatch.context() as patch:
        patch.setattr(clear_module, "commit", break_down)
        with pytest.raises(IllegalTransitionError):
            scene.round()


def test_a_plan_left_open_is_chosen_for_the_links_it_gets_and_the_tenant_is_told_why(scene: Scene) -> None:
    asked = spec(4).market
    link = Link(bandwidth_bits_per_s=1e8, delay_s=0.02)
    parts = [SitePart(site_id, "cpu-slot", 2) for site_id in ("ada", "bob")]
    links = {("ada", "bob"): link, ("bob", "ada"): link}
    chosen = choose_sync(asked.workload, asked.sync, parts, links, frozenset({"ada"}))
    assert chosen is not None
    job_id = scene.submit(4, sites_max=2, sites_allowed=["ada", "bob"])
    ada, _ = scene.start(job_id)
    attempt = ada.order().attempt
    assert attempt is not None
    assert attempt.sync == asked.sync.placed(chosen.plan)
    assert chosen.reasons[-1] in scene.placement(job_id).why
    assert len(chosen.reasons) > 1
    found = replay(scene.market, 1)
    assert (found.identical, found.findings) == (True, ())


def test_a_plan_that_is_stated_is_left_as_it_is(scene: Scene) -> None:
    stated = {"strategy": "diloco", "codec": "int8", "period_steps": 33, "target_utilisation": 0.6}
    job_id = scene.submit(4, sites_max=2, sites_allowed=["ada", "bob"], sync=stated)
    ada, _ = scene.start(job_id)
    attempt = ada.order().attempt
    assert attempt is not None
    assert attempt.sync == spec(4, sync=stated).market.sync
    assert "Between its sites" not in scene.placement(job_id).why
    assert replay(scene.market, 1).findings == ()


def test_one_round_after_another_never_sells_a_gpu_twice(scene: Scene) -> None:
    jobs = [scene.submit(1) for _ in range(9)]
    for _ in range(3):
        scene.round()
        for site in scene.sites.values():
            site.confirm()
            site.beat()
    assert sorted(scene.job(job_id).state for job_id in jobs) == ["queued"] * 3 + ["running"] * 6
    assert {site_id: scene.taken_gpus(site_id) for site_id in ALL} == {"ada": 2, "bob": 2, "cid": 2}
    scene.pass_s(LIVENESS_S + MARGIN_S + 1)
    scene.reconcile()
    assert scene.live_placements() == 0


def _capacity(scene: Scene) -> dict[str, int]:
    return {pool.site_id: pool.capacity_gpus for pool in _snapshot(scene).snapshot.pools}


def _job_in_snapshot(scene: Scene, job_id: str) -> Any:
    (job,) = [job for job in _snapshot(scene).snapshot.jobs if job.job_id == job_id]
    return job


def _snapshot(scene: Scene) -> TakenSnapshot:
    return scene.market.database.read(lambda session: take(session, scene.market))


def _until_renewal(scene: Scene, job_id: str) -> None:
    starts_ms = renewal_starts_ms(scene.placement(job_id))
    scene.pass_s((starts_ms - scene.clock.now_ms()) / 1000 + 0.1, *ALL)


def _during_the_solve(monkeypatch: pytest.MonkeyPatch, happen: Callable[[], object]) -> None:
    def clear(snapshot: Snapshot, **options: Any) -> Clearing:
        clearing = solve.clear(snapshot, **options)
        happen()
        return clearing

    monkeypatch.setattr(clear_module, "clear", clear)


def _silence(session: Session, site_id: str) -> None:
    change_state(session, session.get_one(Site, site_id), "silent", now_ms=1)


def _end(scene: Scene, session: Session, job_id: str) -> None:
    placement = live_placement(session, job_id)
    assert placement is not None
    end_placement(session, scene.market, placement, EndCause.MOVED)
    requeue(session, scene.market, session.get_one(Job, job_id), "moving", "moves")
