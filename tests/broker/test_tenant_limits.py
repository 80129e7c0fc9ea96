"""A tenant's hourly budget and floor, and slots ahead, reach the round: what they forbid waits and is told why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session

from broker import ledger, submit
from broker.allocation.clearing import Clearing
from broker.cancel import request_cancel
from broker.database.tables import Tenant
from broker.database.uploads import WorkdirUpload
from broker.errors import NotFoundError
from broker.instant import InstantOffer, InstantRefusedError
from broker.market import Market
from broker.rounds import clear as clear_module
from broker.rounds.replay import replay
from broker.submit import submit_job
from broker.tenant_limits import set_budget, set_floor, spending_micros_per_hour
from tests.broker.speaking import ASK, CREDIT, Scene, spec
from tests.simulation.founding import TENANT_ID, WORKDIR
from training.spec import JobSpec

RIVAL = "rival"


def limit(scene: Scene, budget_micros_per_hour: int | None, tenant_id: str = TENANT_ID) -> None:
    scene.write(lambda session: set_budget(session, scene.market, tenant_id, budget_micros_per_hour, actor="ann"))


def spending(scene: Scene) -> int:
    return scene.market.database.read(lambda session: spending_micros_per_hour(session, TENANT_ID))


@pytest.fixture
def pair(market_url: str, tmp_path: Path) -> Iterator[Scene]:
    """A market of one site with two slots."""
    scene = Scene(market_url, tmp_path / "pair", {"ada": 2}, floor_penalty_micros_per_gpu_hour=1000 * CREDIT)
    yield scene
    scene.close()


@pytest.fixture
def ahead(market_url: str, tmp_path: Path) -> Iterator[Scene]:
    """The same with two slots of time, of which the second begins after a term."""
    scene = Scene(market_url, tmp_path / "ahead", {"ada": 2}, slots=2, slot_s=3600)
    yield scene
    scene.close()


def test_a_budget_lets_start_what_it_covers_and_tells_the_others(scene: Scene) -> None:
    probe = scene.submit()
    scene.round()
    worth = scene.placement(probe).value_micros_per_hour
    limit(scene, worth * 3 // 2)  # at most its worth is charged for a job, and the budget holds even then
    others = [scene.submit() for _ in range(2)]
    scene.round()
    states = sorted(scene.job(job_id).state for job_id in (probe, *others))
    assert states == ["proposed", "proposed", "queued"]
    assert spending(scene) <= worth * 3 // 2
    (left,) = [scene.job(job_id) for job_id in others if scene.job(job_id).state == "queued"]
    assert left.reason_code == "tenant_budget"
    assert "hourly budget is the limit" in left.reason
    assert [event.detail for event in scene.events("tenant") if event.after == "budget"] == [
        event.detail for event in scene.events("tenant") if event.actor == "ann"
    ]
    again = replay(scene.market, scene.rounds())
    assert again.identical
    assert again.findings == ()
    limit(scene, None)
    scene.round()
    assert scene.job(left.job_id).state == "proposed"


def test_a_budget_below_what_runs_ends_nothing_and_starts_nothing(scene: Scene) -> None:
    running = scene.submit()
    scene.start(running)
    limit(scene, 1)
    waiting = scene.submit()
    scene.round()
    assert scene.job(running).state == "running"
    assert scene.job(waiting).state == "queued"


def test_the_instant_lane_keeps_to_the_budget(scene: Scene) -> None:
    scene.round()
    limit(scene, 3 * ASK)
    scene.submit(2, start="now")
    assert spending(scene) == 2 * ASK
    with pytest.raises(InstantRefusedError, match=r"budget of .* has 0\.10 an hour left"):
        scene.submit(2, start="now")
    limit(scene, 4 * ASK)
    scene.submit(2, start="now")
    assert spending(scene) == 4 * ASK


def test_two_instant_jobs_at_once_share_one_budget(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.round()
    limit(scene, 3 * ASK)
    offered = submit.make_offer

    def then_another(market: Market, tenant_id: str, wanted: JobSpec) -> InstantOffer:
        offer = offered(market, tenant_id, wanted)
        monkeypatch.setattr(submit, "make_offer", offered)
        scene.submit(2, start="now", sites_allowed=["bob"])
        return offer

    monkeypatch.setattr(submit, "make_offer", then_another)
    with pytest.raises(InstantRefusedError, match=r"budget of .* has 0\.10 an hour left"):
        scene.submit(2, start="now", sites_allowed=["ada"])
    assert spending(scene) == 2 * ASK


@pytest.mark.parametrize("meanwhile", ["lowered", "spent"])
def test_a_budget_that_shrinks_while_a_round_is_solved_lets_nothing_start(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    scene.round()
    limit(scene, 1000 * CREDIT)
    waiting = scene.submit(2, sites_allowed=["ada"])
    solved = clear_module.clear

    def then_shrunk(*given: Any, **named: Any) -> Clearing:
        monkeypatch.setattr(clear_module, "clear", solved)
        if meanwhile == "lowered":
            limit(scene, 1)
        else:
            scene.submit(2, sites_allowed=["bob"], start="now")
        return solved(*given, **named)

    monkeypatch.setattr(clear_module, "clear", then_shrunk)
    scene.round()
    assert scene.job(waiting).state == "queued"
    assert "hourly budget leaves less" in scene.events("dropped")[-1].detail
    limit(scene, None)
    scene.round()
    assert scene.job(waiting).state == "proposed"


def test_a_floor_gives_way_to_no_higher_bid(pair: Scene) -> None:
    def open_rival(session: Session) -> None:
        session.add(Tenant(tenant_id=RIVAL, name=RIVAL, created_ms=0))
        session.flush()
        session.add(WorkdirUpload(tenant_id=RIVAL, digest=WORKDIR, created_ms=0))
        ledger.open_tenant(session, RIVAL, 0)
        ledger.deposit(session, RIVAL, 1000 * CREDIT, "given", 0)

    pair.write(open_rival)
    pair.write(lambda session: set_floor(session, pair.market, RIVAL, 2))
    high = pair.submit(2, bid=2 * CREDIT)
    low = submit_job(pair.market, RIVAL, spec(2, bid=CREDIT)).job_id
    pair.round()
    assert pair.job(low).state == "proposed"
    assert pair.job(high).state == "queued"


def test_a_job_may_be_planned_for_a_later_slot(ahead: Scene) -> None:
    # An hour of work for the higher bid: the other is worth placing after it, and not before.
    first = ahead.submit(2, bid=4 * CREDIT)
    ahead.round()
    speed = ahead.placement(first).samples_per_s_predicted
    request_cancel(ahead.market, TENANT_ID, first)
    first = ahead.submit(2, bid=4 * CREDIT, samples=int(speed * 3000))
    second = ahead.submit(2, bid=2 * CREDIT, samples=int(speed * 3000))
    ahead.round()
    assert ahead.job(first).state == "proposed"
    waiting = ahead.job(second)
    assert (waiting.state, waiting.reason_code) == ("queued", "later")
    assert "planned, not promised" in waiting.reason


@pytest.mark.parametrize("change", [set_budget, set_floor])
def test_limits_of_nobody_are_refused(scene: Scene, change: object) -> None:
    with pytest.raises(NotFoundError, match="no tenant 'nobody'"):
        scene.write(lambda session: change(session, scene.market, "nobody", 1))  # type: ignore[operator]  # either
