"""A running job comes to more, fewer or other GPUs with what it has learned; it pays once, and for good reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select

from broker.allocation.clearing import Placement as Award
from broker.cancel import request_cancel
from broker.database.moves import Move
from broker.database.tables import UsageReport
from broker.database.terms import Term
from broker.rounds.snapshot import free_by_pool, renewal_starts_ms, take
from sites.protocol import ExitCause, LeasePhase, Skill
from tests.broker.speaking import ASK, CREDIT, PROPOSAL_S, TERM_S, Scene, SpeakingSite, checkpoint
from tests.simulation.founding import TENANT_ID

CHAIN, LATER = "11" * 32, "22" * 32
FINAL = "ab" * 31 + "01"


@pytest.fixture
def scene(market_url: str, tmp_path: Path) -> Iterator[Scene]:
    """Four sites of two slots whose agents know how to leave."""
    scene = Scene(market_url, tmp_path / "home", {"ada": 2, "bob": 2, "cid": 2, "dan": 2})
    for site in scene.sites.values():
        site.skills = tuple(Skill)
        site.beat()
    yield scene
    scene.close()


def _until_renewal(scene: Scene, job_id: str) -> None:
    left_s = (renewal_starts_ms(scene.placement(job_id)) - scene.clock.now_ms()) / 1000
    scene.pass_s(left_s + 0.1, *scene.sites)
    scene.reconcile()


def _ask(scene: Scene, site_id: str, micros: int) -> None:
    site = scene.sites[site_id]
    pool = site.offer.pools[0].model_copy(update={"ask_micros_per_gpu_hour": micros})
    site.offer = site.offer.model_copy(update={"pools": (pool,)})
    site.beat()


def _moves(scene: Scene) -> list[Move]:
    return scene.read(select(Move).order_by(Move.opened_ms))


def _leave(scene: Scene, site: SpeakingSite, sealed: int, digest: str = FINAL, chain_hash: str = CHAIN) -> None:
    """Let a site stop as it was asked to, its checkpoint stored."""
    scene.store(digest, site.site_id)
    site.exit(ExitCause.LEFT, checkpoint=checkpoint(digest, sealed=sealed, chain_hash=chain_hash))


def _asked(site: SpeakingSite) -> str | None:
    site.beat()
    attempt = site.order().attempt
    assert attempt is not None
    return attempt.leaving


# --- Grow, shrink, move ---------------------------------------------------------------------------


def test_a_job_grows_when_its_competitor_ends_and_resumes_where_it_stopped(scene: Scene) -> None:
    rival = scene.submit(1, sites_allowed=["ada"])
    (ada,) = scene.start(rival)
    rival_order = ada.order()
    job_id = scene.submit(1, most=2, sites_allowed=["ada"])
    scene.round()
    ada.confirm()
    assert scene.lease(job_id, "ada").gpus == 1
    request_cancel(scene.market, TENANT_ID, rival)
    ada.exit_of(rival_order, ExitCause.ORDERED)
    ada.beat()
    ada.run(sealed=7, chain_hash=CHAIN)
    _until_renewal(scene, job_id)
    scene.round()
    (move,) = _moves(scene)
    assert (move.state, move.before_key, move.after_key) == ("leaving", "ada/cpu-slot:1", "ada/cpu-slot:2")
    assert move.restart_micros > 0
    assert _asked(ada) == "gang"
    assert scene.job(job_id).state == "running"
    # The second slot is promised: nobody gets it between two placements.
    assert scene.market.database.read(free_by_pool)["ada/cpu-slot"] == 0
    other = scene.submit(1, sites_allowed=["ada"], bid=50 * CREDIT)
    scene.round()
    assert scene.job(other).state == "queued"
    _leave(scene, ada, sealed=8)
    lease = scene.lease(job_id, "ada")
    assert (lease.gpus, lease.epoch, lease.state, lease.checkpoint_digest) == (2, 2, "proposed", FINAL)
    placement = scene.placement(job_id)
    assert (placement.base_round, placement.base_hash, placement.base_samples) == (8, CHAIN, 8000)
    ada.confirm()
    assert scene.job(job_id).state == "running"
    words = scene.events("move")[-1].detail
    assert "ada left after round 8" in words
    assert scene.job(job_id).failures == 0


def test_a_job_that_moves_takes_its_carry_along(scene: Scene) -> None:
    for site_id in ("bob", "cid", "dan"):
        _ask(scene, site_id, 2 * ASK)
    job_id = scene.submit(2)
    (ada,) = scene.start(job_id)
    assert ada.site_id == "ada"
    _ask(scene, "ada", 10**9)
    _until_renewal(scene, job_id)
    scene.round()
    order = ada.order()
    assert _asked(ada) == "gang"
    _leave(scene, ada, sealed=3)
    (lease,) = scene.leases(job_id)
    assert lease.site_id != "ada"
    assert (lease.heir_of, lease.checkpoint_digest) == ("ada", FINAL)
    new = scene.sites[lease.site_id]
    new.confirm()
    new.beat()
    attempt = new.order().attempt
    assert attempt is not None
    assert attempt.checkpoint is not None
    assert attempt.checkpoint.heir_of == "ada"
    assert scene.taken_gpus("ada") == 0
    assert order.epoch < new.order().epoch


@pytest.mark.soak
def test_a_site_that_does_not_come_to_a_rounds_end_in_time_is_stopped(scene: Scene) -> None:
    job_id = scene.submit(2)
    (site,) = scene.start(job_id)
    _ask(scene, site.site_id, 10**9)
    _until_renewal(scene, job_id)
    scene.round()
    assert _moves(scene)[0].state == "leaving"
    scene.pass_s(TERM_S / 3 + 1, *scene.sites)
    scene.reconcile()
    assert _moves(scene)[0].state == "done"
    assert "was stopped where it stood" in scene.events("move")[-1].detail
    assert scene.job(job_id).state == "proposed"


def test_a_term_that_nobody_renews_ends_with_a_checkpoint(scene: Scene) -> None:
    job_id = scene.submit(2, sites_allowed=["ada"])
    (ada,) = scene.start(job_id)
    ada.offer = ada.offer.model_copy(update={"draining": True})
    _until_renewal(scene, job_id)
    scene.round()
    assert _asked(ada) is None
    scene.pass_s(TERM_S / 6 + 0.1, *scene.sites)
    scene.reconcile()
    assert _asked(ada) == "gang"
    scene.round()
    assert scene.job(job_id).state == "running"
    _leave(scene, ada, sealed=9)
    job = scene.job(job_id)
    assert (job.state, job.samples_done) == ("queued", 9000)
    assert scene.placement(job_id).end_cause == "term_ended"
    assert scene.taken_gpus("ada") == 0


# --- One site of several --------------------------------------------------------------------------


@pytest.fixture
def pair(scene: Scene) -> tuple[str, SpeakingSite, SpeakingSite]:
    """A job at ada and bob, both at round 5, which cid could have been part of."""
    _ask(scene, "cid", 2 * ASK)
    _ask(scene, "dan", 3 * ASK)
    job_id = scene.submit(4, sites_max=2)
    ada, bob = scene.start(job_id)
    assert (ada.site_id, bob.site_id) == ("ada", "bob")
    for site in (ada, bob):
        site.run(sealed=5, chain_hash=CHAIN)
    return job_id, ada, bob


def _replace_bob(scene: Scene, job_id: str) -> None:
    _ask(scene, "bob", 10**8)
    _until_renewal(scene, job_id)
    scene.round()


def test_one_site_of_a_running_job_is_replaced_while_the_other_goes_on(
    scene: Scene, pair: tuple[str, SpeakingSite, SpeakingSite]
) -> None:
    job_id, ada, bob = pair
    placement = scene.placement(job_id)
    _replace_bob(scene, job_id)
    (move,) = _moves(scene)
    assert move.in_place
    assert (_asked(ada), _asked(bob)) == (None, "site")
    order = bob.order()
    bob.meter(order, 2 * 1000 * 30)
    _leave(scene, bob, sealed=6, chain_hash=LATER)
    # Its gateway is needed until ada knows the round that bob stopped at.
    assert scene.lease(job_id, "bob").state == "active"
    ada.run(sealed=6, chain_hash=LATER)
    assert scene.lease(job_id, "bob").state == "ended"
    assert scene.taken_gpus("bob") == 0
    cid = scene.sites["cid"]
    cid.confirm()
    cid.beat()
    lease, kept = scene.lease(job_id, "cid"), scene.lease(job_id, "ada")
    assert (lease.epoch, lease.state, lease.heir_of, lease.checkpoint_digest) == (2, "active", "bob", FINAL)
    assert (kept.epoch, kept.state) == (1, "active")
    assert scene.placement(job_id).placement_id == placement.placement_id
    assert scene.job(job_id).state == "running"
    attempt = cid.order().attempt
    assert attempt is not None
    assert attempt.view is None
    # The view without bob stands first, then the one with cid.
    ada.beat()
    ada.promise(2, sealed=6, chain_hash=LATER)
    ada.run(sealed=6, chain_hash=LATER, view=2)
    cid.run(view=0)
    scene.reconcile()
    cid.beat()
    ada.beat()
    assert (ada.promise_wanted(), cid.promise_wanted()) == (3, 3)
    ada.promise(3, sealed=6, chain_hash=LATER)
    cid.promise(3)
    cid.beat()
    view = cid.view()
    assert [(member.site_id, member.epoch) for member in view.members] == [("ada", 1), ("cid", 2)]
    assert (view.base_round, view.base_reporter, view.joining) == (6, "ada", ("cid",))
    assert scene.job(job_id).failures == 0


def test_a_replaced_sites_last_usage_is_charged_by_the_old_term_and_its_heirs_by_the_new(
    scene: Scene, pair: tuple[str, SpeakingSite, SpeakingSite]
) -> None:
    job_id, ada, bob = pair
    _replace_bob(scene, job_id)
    order = bob.order()
    _leave(scene, bob, sealed=6, chain_hash=LATER)
    ada.run(sealed=6, chain_hash=LATER)
    bob.meter(order, 2 * 1000 * 30)
    bob.reports.clear()
    bob.beat()
    cid = scene.sites["cid"]
    cid.confirm()
    scene.pass_s(10, *scene.sites)
    cid.meter(cid.order(), 2 * 1000 * 10)
    ada.meter(ada.order(), 2 * 1000 * 40)
    cid.beat()
    ada.beat()
    rows = scene.read(select(UsageReport).order_by(UsageReport.lease_id, UsageReport.term))
    by_site = {lease.lease_id: lease.site_id for lease in scene.leases(job_id)}
    charged = [(by_site[row.lease_id], row.term, row.gpu_milliseconds) for row in rows]
    assert ("bob", 1, 60_000) in charged
    assert ("cid", 2, 20_000) in charged
    assert sorted(term for site, term, _ in charged if site == "ada") == [1, 2]
    terms = scene.read(select(Term).where(Term.placement_id == scene.placement(job_id).placement_id))
    assert [term.number for term in terms] == [1, 2]
    assert terms[0].ends_ms == terms[1].starts_ms
    # What the cut term reserved beyond its end is given back, though bob will never report again.
    scene.reconcile()
    (first, _) = scene.read(select(Term).where(Term.placement_id == scene.placement(job_id).placement_id))
    assert first.reserved_micros == first.charged_micros


@pytest.mark.soak
def test_a_site_that_declines_to_join_leaves_a_smaller_gang_that_goes_on(
    scene: Scene, pair: tuple[str, SpeakingSite, SpeakingSite]
) -> None:
    job_id, ada, bob = pair
    _replace_bob(scene, job_id)
    _leave(scene, bob, sealed=6, chain_hash=LATER)
    ada.run(sealed=6, chain_hash=LATER)
    scene.sites["cid"].veto()
    assert scene.job(job_id).state == "running"
    assert [(lease.site_id, lease.state) for lease in scene.leases(job_id)] == [
        ("ada", "active"),
        ("bob", "ended"),
        ("cid", "ended"),
    ]
    assert scene.taken_gpus("cid") == 0
    assert scene.is_due()


@pytest.mark.soak
def test_a_site_that_does_not_confirm_in_time_does_not_join(
    scene: Scene, pair: tuple[str, SpeakingSite, SpeakingSite]
) -> None:
    job_id, ada, bob = pair
    _replace_bob(scene, job_id)
    _leave(scene, bob, sealed=6, chain_hash=LATER)
    ada.run(sealed=6, chain_hash=LATER)
    scene.pass_s(PROPOSAL_S + 1, "ada", "bob", "dan")
    scene.reconcile()
    assert scene.lease(job_id, "cid").end_cause == "unconfirmed"
    assert scene.lease(job_id, "ada").state == "active"


def test_a_lost_site_is_replaced_without_a_restart(scene: Scene, pair: tuple[str, SpeakingSite, SpeakingSite]) -> None:
    job_id, _, bob = pair
    bob.exit(ExitCause.SITE)
    _ask(scene, "bob", 10**8)
    scene.round()
    placement = scene.placement(job_id)
    (move,) = _moves(scene)
    assert (move.in_place, move.state, move.leaving) == (True, "done", "[]")
    joined = [lease for lease in scene.leases(job_id) if lease.state == "proposed"]
    assert [lease.epoch for lease in joined] == [2]
    assert joined[0].heir_of is None
    assert scene.lease(job_id, "ada").state == "active"
    assert placement.epoch == 1


@pytest.mark.soak
def test_a_job_that_is_cancelled_while_its_sites_leave_ends_once(
    scene: Scene, pair: tuple[str, SpeakingSite, SpeakingSite]
) -> None:
    job_id, ada, bob = pair
    _replace_bob(scene, job_id)
    request_cancel(scene.market, TENANT_ID, job_id)
    assert [move.state for move in _moves(scene)] == ["abandoned"]
    for site in (ada, bob):
        site.beat()
        for order in [each for each in site.orders.values() if each.phase is LeasePhase.ENDED]:
            site.exit_of(order, ExitCause.ORDERED)
    assert scene.job(job_id).state == "cancelled"
    assert scene.taken_gpus("ada") == scene.taken_gpus("bob") == 0


# --- No flapping ----------------------------------------------------------------------------------


STEP_S = 7.0
ROUNDS = round(2.5 * TERM_S / STEP_S)
"""Rounds for two and a half terms."""


def _swing(scene: Scene, job_id: str, swing_micros: int, rounds: int) -> int:
    """Let the cheaper of two sites be another in each round; return how many moves were made."""
    for number in range(rounds):
        dear, cheap = ("ada", "bob") if number % 2 == 0 else ("bob", "ada")
        _ask(scene, dear, ASK + swing_micros)
        _ask(scene, cheap, ASK)
        scene.clock.advance_s(STEP_S)
        scene.reconcile()
        scene.round()
        for site in (scene.sites["ada"], scene.sites["bob"]):
            orders = [order for order in site.orders.values() if order.phase is LeasePhase.ACTIVE]
            if orders and orders[0].attempt is not None and orders[0].attempt.leaving:
                _leave(scene, site, sealed=number + 1, digest=f"{number:064x}", chain_hash=f"{number:064x}")
        for site in (scene.sites["ada"], scene.sites["bob"]):
            site.confirm()
    assert scene.job(job_id).state == "running"
    return len(_moves(scene))


@pytest.mark.soak
def test_a_price_that_swings_by_less_than_a_restart_costs_moves_nobody(scene: Scene) -> None:
    job_id = scene.submit(1, sites_allowed=["ada", "bob"])
    scene.start(job_id)
    award = Award.model_validate_json(scene.placement(job_id).award)
    restart = award.value_micros_per_hour * scene.market.settings.restart_s / 3600
    assert _swing(scene, job_id, round(restart * 3600 / TERM_S * 0.9), rounds=ROUNDS) == 0


def test_however_far_a_price_swings_a_move_earns_its_restart_before_the_next(scene: Scene) -> None:
    job_id = scene.submit(1, sites_allowed=["ada", "bob"])
    scene.start(job_id)
    award = Award.model_validate_json(scene.placement(job_id).award)
    restart = award.value_micros_per_hour * scene.market.settings.restart_s / 3600
    began_ms = scene.clock.now_ms()
    swing = round(restart * 3600 / TERM_S * 5)
    moves = _swing(scene, job_id, swing, rounds=ROUNDS)
    terms = (scene.clock.now_ms() - began_ms) / 1000 / (TERM_S * 2 / 3)
    assert 1 <= moves <= terms + 1
    for earlier, later in zip(_moves(scene), _moves(scene)[1:], strict=False):
        stayed_h = (later.opened_ms - earlier.opened_ms) / 3_600_000
        assert swing * stayed_h >= earlier.restart_micros


@pytest.mark.soak
def test_a_job_that_is_being_moved_is_not_asked_about_again(scene: Scene) -> None:
    job_id = scene.submit(2)
    (site,) = scene.start(job_id)
    _ask(scene, site.site_id, 10**9)
    _until_renewal(scene, job_id)
    scene.round()
    snapshot = scene.market.database.read(lambda session: take(session, scene.market)).snapshot
    (job,) = snapshot.jobs
    assert job.incumbent is not None
    assert job.incumbent.configuration.key == _moves(scene)[0].after_key
    for number in range(3):
        _ask(scene, "dan", ASK - number - 1)
        scene.round()
    assert len(_moves(scene)) == 1
