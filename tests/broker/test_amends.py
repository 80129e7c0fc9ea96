"""What a tenant gets back: leftovers of terms, refunds of lost work, compensation for a move; each line names its round."""

from __future__ import annotations

import pytest
from sqlalchemy.orm import Session

from broker import ledger
from broker.cancel import request_cancel
from broker.database.terms import Term
from broker.invoices import invoice, statement
from broker.rounds.snapshot import renewal_starts_ms
from broker.settle import settle
from sites.protocol import ExitCause, Usage
from tests.broker.speaking import ASK, CREDIT, LIVENESS_S, MARGIN_S, SETTLE_S, TERM_S, Scene, SpeakingSite, checkpoint
from tests.simulation.founding import TENANT_ID

ALL = ("ada", "bob", "cid")
HOUR_MS = 3_600_000


def _balance(scene: Scene, account: str) -> int:
    return scene.market.database.read(lambda session: ledger.balance_micros(session, account))


def _deliver(scene: Scene, site: SpeakingSite, seconds: float, *, samples: int = 0, sequence: int = 1) -> None:
    """Let time pass in which all of a lease's GPUs run, and report it."""
    order = site.order()
    scene.pass_s(seconds, *ALL)
    usage = Usage(
        lease_id=order.lease_id,
        epoch=order.epoch,
        sequence=sequence,
        gpu_milliseconds=round(seconds * 1000) * len(order.gpu_ids),
        samples=samples,
    )
    site.usage.setdefault(order.lease_id, []).append(usage)
    site.beat()


def _renew(scene: Scene, job_id: str) -> None:
    placement = scene.placement(job_id)
    scene.pass_s((renewal_starts_ms(placement) - scene.clock.now_ms()) / 1000 + 0.1, *ALL)
    scene.reconcile()
    scene.round()
    assert scene.events("renewed")


def test_lines_name_the_term_and_the_round_whose_prices_it_has(scene: Scene) -> None:
    job_id = scene.submit(2, sites_allowed=["ada"])
    (ada,) = scene.start(job_id)
    _deliver(scene, ada, 30)
    _renew(scene, job_id)
    renewed_in = scene.rounds()
    scene.pass_s(TERM_S - 20, *ALL)
    _deliver(scene, ada, 20, sequence=2)
    lines = scene.market.database.read(lambda session: invoice(session, job_id)).lines
    assert [(line.term, line.round_number, line.lane) for line in lines] == [(1, 1, "round"), (2, renewed_in, "round")]
    (line,) = scene.market.database.read(lambda session: statement(session, "ada")).lines
    assert line.rounds == (1, renewed_in)


def test_what_a_finished_term_left_over_is_free_for_the_next_and_stays_reserved_until_it_is_known(scene: Scene) -> None:
    job_id = scene.submit(2, sites_allowed=["ada"])
    (ada,) = scene.start(job_id)
    term_micros = scene.placement(job_id).reserved_micros
    _deliver(scene, ada, 30)
    _renew(scene, job_id)
    assert scene.placement(job_id).reserved_micros == 2 * term_micros
    scene.pass_s(TERM_S, *ALL)
    scene.reconcile()
    # The site has not yet said what it delivered up to the end of the first term.
    assert scene.placement(job_id).reserved_micros == 2 * term_micros
    _deliver(scene, ada, 5, sequence=2)
    scene.reconcile()
    placement = scene.placement(job_id)
    first = scene.market.database.read(lambda session: session.get_one(Term, (placement.placement_id, 1)))
    assert first.reserved_micros == first.charged_micros == 2 * 30_000 * ASK // HOUR_MS
    assert placement.reserved_micros == first.charged_micros + term_micros
    assert scene.is_due()


def _checkpointed(scene: Scene, site: SpeakingSite, samples: int) -> None:
    digest = "cd" * 32
    scene.store(digest)
    kept = checkpoint(digest, sealed=samples // 1000, chain_hash="ef" * 32)
    order = site.order()
    site.reports[order.lease_id] = site.reports[order.lease_id].model_copy(update={"checkpoint": kept})
    site.beat()


def test_a_site_that_broke_gives_back_the_share_of_the_work_that_was_lost(scene: Scene) -> None:
    job_id = scene.submit(2, sites_allowed=["ada"])
    (ada,) = scene.start(job_id)
    _checkpointed(scene, ada, 3000)
    _deliver(scene, ada, 30, samples=4000)
    ada.exit(ExitCause.SITE)
    earned = 2 * 30_000 * ASK // HOUR_MS
    tenant, site = _balance(scene, f"tenant/{TENANT_ID}"), _balance(scene, "site/ada")
    assert site == earned
    request_cancel(scene.market, TENANT_ID, job_id)
    assert settle(scene.market) == 1
    lost = earned * 1000 // 4000
    assert _balance(scene, "site/ada") == earned - lost
    hold = scene.hold(job_id)
    assert _balance(scene, f"tenant/{TENANT_ID}") == tenant + hold.voided_micros + lost
    assert [event.lease_id for event in scene.events("refunded")] == [scene.leases(job_id)[0].lease_id]
    paper = scene.market.database.read(lambda session: invoice(session, job_id))
    assert [(row.kind, row.amount_micros) for row in paper.amends] == [("refund", lost)]
    assert (paper.total_micros, paper.net_micros) == (earned, earned - lost)
    paid = scene.market.database.read(lambda session: statement(session, "ada"))
    assert (paid.lines[0].refunded_micros, paid.earned_micros, paid.balance_micros) == (
        lost,
        earned - lost,
        earned - lost,
    )
    assert settle(scene.market) == 0


@pytest.mark.parametrize("cause", [ExitCause.SCRIPT, ExitCause.DONE])
def test_work_that_ends_by_the_tenants_own_doing_is_not_refunded(scene: Scene, cause: ExitCause) -> None:
    job_id = scene.submit(2, sites_allowed=["ada"])
    (ada,) = scene.start(job_id)
    _deliver(scene, ada, 30, samples=4000)
    ada.exit(cause)
    assert settle(scene.market) == 1
    assert scene.events("refunded") == []
    assert _balance(scene, "site/ada") == 2 * 30_000 * ASK // HOUR_MS


def test_of_a_gang_the_site_that_fell_silent_gives_back_and_the_others_keep_what_they_earned(scene: Scene) -> None:
    job_id = scene.submit(4, sites_max=2, sites_allowed=["ada", "bob"])
    ada, bob = scene.start(job_id)
    _deliver(scene, ada, 10, samples=1000)
    _deliver(scene, bob, 10, samples=1000)
    # Both are cut off; bob comes back and says that it gave up, ada expires.
    bob.exit(ExitCause.EXCHANGE)
    scene.pass_s(LIVENESS_S + MARGIN_S + 1, "bob", "cid")
    scene.reconcile()
    assert scene.job(job_id).state == "queued"
    request_cancel(scene.market, TENANT_ID, job_id)
    scene.pass_s(SETTLE_S + 1, "bob")
    assert settle(scene.market) == 1
    (event,) = scene.events("refunded")
    assert event.site_id == "ada"
    assert _balance(scene, "site/ada") == 0
    assert _balance(scene, "site/bob") > 0


def _crowd_out(scene: Scene, job_id: str) -> None:
    """Let a job that can only be at ada want the GPUs of one that could be anywhere."""
    scene.submit(2, sites_allowed=["ada"], bid=50 * CREDIT, budget=5000 * CREDIT)
    scene.round()


def _at_ada(scene: Scene) -> str:
    for site_id in ("bob", "cid"):
        site = scene.sites[site_id]
        pool = site.offer.pools[0].model_copy(update={"ask_micros_per_gpu_hour": 2 * ASK})
        site.offer = site.offer.model_copy(update={"pools": (pool,)})
        site.beat()
    job_id = scene.submit(2)
    (site,) = scene.start(job_id)
    assert site.site_id == "ada"
    return job_id


def test_a_job_that_is_moved_inside_its_term_is_paid_what_the_move_destroys(scene: Scene) -> None:
    job_id = _at_ada(scene)
    value = scene.placement(job_id).value_micros_per_hour
    tenant, equity = _balance(scene, f"tenant/{TENANT_ID}"), _balance(scene, ledger.EQUITY)
    _crowd_out(scene, job_id)
    assert scene.job(job_id).reason_code == "moving"
    amount = round(value * scene.market.settings.restart_s / 3600)
    assert _balance(scene, ledger.EQUITY) == equity - amount
    assert _balance(scene, f"tenant/{TENANT_ID}") == tenant + amount - 5000 * CREDIT
    (event,) = scene.events("compensated")
    assert (event.job_id, event.round_number) == (job_id, 2)
    paper = scene.market.database.read(lambda session: invoice(session, job_id))
    assert [(row.kind, row.reason) for row in paper.amends] == [("compensate", "moved inside its term by round 2")]


def test_a_market_that_cannot_compensate_moves_nobody_inside_a_term(scene: Scene) -> None:
    job_id = _at_ada(scene)

    def spend(session: Session) -> None:
        left = ledger.balance_micros(session, ledger.EQUITY)
        ledger.compensate(session, job_id, TENANT_ID, left, key="all", now_ms=scene.clock.now_ms(), memo="for the test")

    scene.write(spend)
    _crowd_out(scene, job_id)
    assert scene.job(job_id).state == "running"
    assert scene.events("compensated") == []
    assert not scene.is_due()
