"""A round in which little has changed lets the last prices stand, says how far that is from best, and replays to the bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from broker.allocation.clearing import Clearing, LinkPrice
from broker.allocation.following import GAP_MAX
from broker.allocation.snapshot import Snapshot
from broker.allocation.solve import clear
from broker.allocation.verify import verify
from broker.cancel import request_cancel
from broker.database.tables import Round
from broker.rounds.last_round import LastRound, may_follow, write_links
from broker.rounds.replay import replay
from broker.settings import Settings
from broker.transitions import note_change
from tests.broker.speaking import ASK, CREDIT, Scene
from tests.simulation.founding import TENANT_ID

JOBS = 9
SETTINGS = Settings(follow_jobs_min=100, follow_changed_share_max=0.02, follow_rounds_max=3)
CALM = LastRound(prices={}, link_prices={}, statuses=("optimal",), jobs_changed=2)


@pytest.fixture
def busy(market_url: str, tmp_path: Path) -> Iterator[Scene]:
    """A market after its first round: more jobs want ada than it holds, elsewhere GPUs are left over; some jobs span sites."""
    scene = Scene(
        market_url,
        tmp_path / "home",
        {"ada": 2, "bob": 8, "cid": 10},
        follow_jobs_min=JOBS,
        follow_changed_share_max=1.5 / JOBS,
        follow_rounds_max=2,
    )
    for number in range(JOBS):
        where = {"sites_allowed": ["ada"]} if number % 3 == 0 else {"sites_max": 2}
        scene.submit(1 + number % 3, bid=CREDIT + number * 1000, **where)
    assert held(scene).status != "followed"
    yield scene
    scene.close()


def held(scene: Scene) -> Round:
    """Hold a round that is due, and let the sites confirm what it proposes."""
    row = scene.round()
    assert row is not None
    for site in scene.sites.values():
        site.confirm()
        site.beat()
    return row


def documents(scene: Scene, row: Round) -> tuple[Snapshot, Clearing]:
    read = scene.market.artifacts.get_bytes
    return Snapshot.from_json(read(row.snapshot_digest)), Clearing.from_json(read(row.clearing_digest))


def test_a_round_after_a_small_change_follows_and_is_as_close_as_it_says(busy: Scene) -> None:
    newcomer = busy.submit(2, bid=3 * CREDIT, sites_max=2)
    row = held(busy)
    assert row.status == "followed"
    snapshot, clearing = documents(busy, row)
    assert verify(snapshot, clearing) == []
    found = replay(busy.market, row.round_number)
    assert (found.identical, found.findings) == (True, ())
    assert busy.job(newcomer).state == "running" or busy.leases(newcomer)
    cold = clear(snapshot.model_copy(update={"follow_last_prices": False}))
    assert cold.status != "followed"
    proof, best = clearing.certificate, cold.certificate
    assert proof.bound_micros_per_hour >= best.welfare_micros_per_hour
    assert proof.welfare_micros_per_hour >= (1 - GAP_MAX) * proof.bound_micros_per_hour


def test_every_nth_round_is_solved_from_nothing_and_so_is_one_after_many_changes(busy: Scene) -> None:
    statuses = []
    for _ in range(5):
        busy.write(note_change)
        statuses.append(held(busy).status)
    assert [status == "followed" for status in statuses] == [True, True, False, True, True]
    for _ in range(2):
        request_cancel(busy.market, TENANT_ID, busy.submit(1))
    row = held(busy)
    assert row.status != "followed"
    assert not documents(busy, row)[0].follow_last_prices


def test_prices_of_pools_and_links_are_the_last_rounds(busy: Scene) -> None:
    _, first = documents(busy, busy.read(_round(1))[0])
    rows = (
        LinkPrice(from_site="ada", to_site="bob", price_micros_per_share_hour=17),
        LinkPrice(from_site="cid", to_site="ada", price_micros_per_share_hour=5),
    )

    def price(session: Session) -> None:
        session.get_one(Round, 1).link_prices = write_links(first.model_copy(update={"link_prices": rows}))

    busy.write(price)
    busy.write(note_change)
    snapshot, _ = documents(busy, held(busy))
    assert max(first.prices.values()) > ASK
    assert snapshot.last_prices == first.prices
    carried = {(row.from_site, row.to_site): row.last_price_micros_per_share_hour for row in snapshot.links}
    assert len(carried) == 6
    assert {pair: price for pair, price in carried.items() if price} == {("ada", "bob"): 17, ("cid", "ada"): 5}


def test_a_round_from_before_link_prices_were_kept_is_not_followed_and_still_replays(busy: Scene) -> None:
    def forget(session: Session) -> None:
        session.get_one(Round, 1).link_prices = None

    busy.write(forget)
    busy.write(note_change)
    assert held(busy).status != "followed"
    assert replay(busy.market, 1).identical


@pytest.mark.parametrize(
    ("last", "jobs", "settings"),
    [
        pytest.param(CALM, 99, {}, id="few jobs"),
        pytest.param(dataclasses.replace(CALM, jobs_changed=3), 100, {}, id="much has changed"),
        pytest.param(dataclasses.replace(CALM, statuses=("followed",) * 3), 100, {}, id="it is time for a cold one"),
        pytest.param(dataclasses.replace(CALM, statuses=("stopped",)), 100, {}, id="the last was cut short"),
        pytest.param(dataclasses.replace(CALM, link_prices=None), 100, {}, id="link prices unknown"),
        pytest.param(LastRound(), 100, {}, id="there was none"),
        pytest.param(CALM, 100, {"follow_rounds_max": 0}, id="switched off"),
    ],
)
def test_what_keeps_a_round_from_following(last: LastRound, jobs: int, settings: dict[str, int]) -> None:
    assert may_follow(CALM, jobs=100, settings=SETTINGS)
    assert may_follow(dataclasses.replace(CALM, statuses=("followed", "followed")), jobs=100, settings=SETTINGS)
    assert not may_follow(last, jobs=jobs, settings=SETTINGS.model_copy(update=settings))


def _round(number: int) -> Select[tuple[Round]]:
    return select(Round).where(Round.round_number == number)
