"""The instant lane: a small job starts at the last round's prices at once, or is refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker import instant as module
from broker import submit
from broker.database.terms import Term
from broker.errors import BrokerError
from broker.freeze import FrozenError, set_frozen
from broker.instant import InstantOffer, InstantOvertakenError, InstantRefusedError
from broker.invoices import invoice
from broker.payment_rules import set_payment_rule
from broker.submit import submit_job
from pricing.payments import PaymentRule
from sites.protocol import ExitCause
from tests.broker.speaking import ASK, CREDIT, Scene, spec
from tests.simulation.founding import TENANT_ID


@pytest.fixture
def priced(scene: Scene) -> Scene:
    """A market that has held a round, so that there are prices."""
    scene.round()
    return scene


def _now(scene: Scene, gpus: int = 1, **terms: object) -> str:
    return scene.submit(gpus, start="now", **terms)


def test_a_small_job_is_proposed_at_once_at_the_last_prices_and_runs_like_any_other(priced: Scene) -> None:
    job_id = _now(priced, 2, sites_allowed=["bob"])
    assert priced.rounds() == 1
    placement = priced.placement(job_id)
    assert (placement.state, placement.lane, placement.round_number) == ("proposed", "instant", 1)
    assert placement.charge_micros_per_hour == 2 * ASK
    assert [event.round_number for event in priced.events("instant")] == [1]
    (lease,) = priced.leases(job_id)
    assert (lease.site_id, lease.price_micros_per_gpu_hour) == ("bob", ASK)
    bob = priced.sites["bob"]
    bob.confirm()
    bob.beat()
    bob.run()
    assert priced.job(job_id).state == "running"
    # The next round finds it as an incumbent and keeps it.
    priced.submit(2, sites_allowed=["bob"])
    priced.round()
    assert priced.placement(job_id).state == "active"
    assert priced.taken_gpus("bob") == 2
    priced.pass_s(10, "bob")
    bob.meter(bob.order(), 2 * 10_000)
    bob.exit(ExitCause.DONE)
    (line,) = priced.market.database.read(lambda session: invoice(session, job_id)).lines
    assert line.charge_micros == 2 * 10_000 * ASK // 3_600_000


def test_its_term_names_the_round_whose_prices_it_has(priced: Scene) -> None:
    job_id = _now(priced)
    placement = priced.placement(job_id)
    term = priced.market.database.read(lambda session: session.get_one(Term, (placement.placement_id, 1)))
    assert term.round_number == 1


def test_an_ask_that_rose_since_is_paid_in_full(priced: Scene) -> None:
    for site in priced.sites.values():
        pool = site.offer.pools[0].model_copy(update={"ask_micros_per_gpu_hour": ASK + 7})
        site.offer = site.offer.model_copy(update={"pools": (pool,)})
        site.beat()
    (lease,) = priced.leases(_now(priced))
    assert lease.price_micros_per_gpu_hour == ASK + 7


def test_a_market_that_charges_as_bid_does_so_here_too(priced: Scene) -> None:
    set_payment_rule(priced.market, PaymentRule.PAY_AS_BID)
    placement = priced.placement(_now(priced))
    assert placement.charge_micros_per_hour == placement.value_micros_per_hour > ASK


def _fill(scene: Scene) -> None:
    for site_id in scene.site_ids:
        scene.start(scene.submit(2, sites_allowed=[site_id]))


def _drain(scene: Scene) -> None:
    for site in scene.sites.values():
        site.offer = site.offer.model_copy(update={"draining": True})
        site.beat()


@pytest.mark.parametrize(
    ("before", "terms", "words"),
    [
        (_fill, {}, "no GPU that has a price is free"),
        (_drain, {}, "no GPU that has a price is free"),
        (None, {"gpus": 2, "sites_allowed": ["ada"], "budget": 100}, "its budget is the limit"),
        (None, {"bid": 1}, "the bid is worth"),
        (None, {"deadline_ms": 1}, "deadline"),
        (None, {"gpus": 4, "sites_max": 2}, "has enough GPUs"),
    ],
)
def test_what_cannot_start_now_is_refused_with_the_reason_and_leaves_nothing(
    priced: Scene, before: object, terms: dict[str, object], words: str
) -> None:
    if callable(before):
        before(priced)
    jobs = len(priced.events("job"))
    with pytest.raises(BrokerError, match=words):
        _now(priced, **{"gpus": 1, **terms})  # type: ignore[arg-type]  # terms as a table has them
    assert len(priced.events("job")) == jobs


def test_a_bid_between_ask_and_last_price_is_told_the_price(scene: Scene) -> None:
    # Two jobs want ada's two slots; the one that loses sets the price.
    for bid in (CREDIT, CREDIT // 2):
        scene.submit(2, sites_allowed=["ada"], bid=bid)
    scene.start(scene.submit(1, sites_allowed=["bob"]))
    (order,) = (lease for lease in scene.leases("job_000001"))
    assert order.price_micros_per_gpu_hour > 10 * ASK
    scene.sites["ada"].veto()
    with pytest.raises(InstantRefusedError, match=r"at the last prices ada/cpu-slot:1 costs .* the bid is worth"):
        _now(scene, sites_allowed=["ada"], bid=CREDIT // 20)


def test_without_a_round_there_are_no_prices(scene: Scene) -> None:
    with pytest.raises(InstantRefusedError, match="no round has been held yet"):
        _now(scene)


@pytest.mark.parametrize(
    ("most", "words"),
    [(1, "up to 1 GPUs can start at the last prices, and this one wants 2"), (0, "this market has no instant lane")],
)
def test_large_jobs_wait_for_rounds_and_a_market_may_have_no_such_lane(
    market_url: str, tmp_path: Path, most: int, words: str
) -> None:
    scene = Scene(market_url, tmp_path / "laneless", instant_gpus_max=most)
    scene.round()
    with pytest.raises(InstantRefusedError, match=words):
        _now(scene, 2)
    scene.close()


def test_a_frozen_market_places_nothing_at_once(priced: Scene) -> None:
    set_frozen(priced.market, frozen=True)
    with pytest.raises(FrozenError):
        _now(priced)


def test_a_veto_sends_it_to_the_queue_of_the_next_round(priced: Scene) -> None:
    job_id = _now(priced, sites_allowed=["ada", "bob"])
    (lease,) = priced.leases(job_id)
    priced.sites[lease.site_id].veto()
    assert priced.job(job_id).state == "queued"
    priced.round()
    assert priced.placement(job_id).lane == "round"


def test_an_offer_that_a_round_overtakes_is_made_anew_and_given_up_after_some_tries(
    priced: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[InstantOffer] = []

    def overtaken(*arguments: object) -> InstantOffer:
        offer = module.make_offer(*arguments)  # type: ignore[arg-type]  # as it is called
        made.append(offer)
        if len(made) <= most:
            priced.submit(1)
            assert priced.round() is not None
        return offer

    monkeypatch.setattr(submit, "make_offer", overtaken)
    most = 1
    job_id = _now(priced)
    assert [offer.round_number for offer in made] == [1, 2]
    assert priced.placement(job_id).round_number == 2
    made.clear()
    most = 99
    jobs = len(priced.events("job"))
    with pytest.raises(InstantOvertakenError, match="others were faster"):
        _now(priced)
    assert len(made) == module.TRIES_MAX
    monkeypatch.undo()
    # What stands came from the jobs that overtook it.
    assert all(event.job_id is not None for event in priced.events("job")[jobs:])


def test_two_jobs_for_the_last_gpu_get_it_once(priced: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    _now(priced, sites_allowed=["ada"])

    def slow(*arguments: object) -> InstantOffer:
        offer = module.make_offer(*arguments)  # type: ignore[arg-type]  # as it is called
        monkeypatch.undo()
        submit_job(priced.market, TENANT_ID, spec(1, start="now", sites_allowed=["ada"]))
        return offer

    monkeypatch.setattr(submit, "make_offer", slow)
    with pytest.raises(InstantRefusedError, match=r"cannot start now|no GPU"):
        _now(priced, sites_allowed=["ada"])
    assert priced.taken_gpus("ada") == 2
