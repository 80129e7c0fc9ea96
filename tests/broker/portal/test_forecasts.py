"""When a job will start and finish is said, kept as it was said, and scored by what came."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from playwright.sync_api import expect
from sqlalchemy import delete, event, select
from sqlalchemy.orm import Session

from broker.cancel import request_cancel
from broker.database.forecasts import Forecast
from broker.database.tables import Job, Round
from broker.forecasts import keep_forecasts
from broker.queries.forecasts import calibrations, newest_forecasts
from tests.broker.portal.conftest import Visitor
from tests.broker.portal.scene import Scene, spec_of, submit

pytestmark = pytest.mark.xdist_group("portal")


@pytest.fixture
def stated(scene: Scene) -> Iterator[Scene]:
    assert keep_forecasts(scene.market) > 0
    yield scene
    scene.market.database.write("forget", lambda session: session.execute(delete(Forecast)))


def read(scene: Scene, name: str) -> dict[str, Forecast]:
    return scene.market.database.read(lambda session: newest_forecasts(session, scene.jobs[name]))


def test_every_job_is_told_once_and_a_second_pass_has_nothing_to_do(stated: Scene) -> None:
    running, waiting = read(stated, "spanning"), read(stated, "left-out")
    assert set(running) == {"finish"}
    assert running["finish"].family == "finish/running"
    assert set(waiting) == {"start", "finish"}
    assert waiting["start"].family == "start/queue"  # no site has four GPUs free
    assert waiting["start"].middle_ms < waiting["finish"].middle_ms
    assert keep_forecasts(stated.market) == 0


def test_a_job_that_finds_free_gpus_is_said_to_start_at_once(stated: Scene) -> None:
    workdir = stated.market.database.read(
        lambda session: session.scalar(select(Job.spec).where(Job.job_id == stated.jobs["bobs-own"]))
    )
    assert workdir is not None
    digest = workdir.partition('"workdir_digest":"')[2][:64]
    spec = spec_of("forecast", digest, gpus=1, sites_max=1, budget_micros=1_000_000)
    job_id = submit(stated, "bob", spec)
    keep_forecasts(stated.market)
    start = read(stated, "forecast")["start"]
    assert start.stated_ms <= start.low_ms < start.middle_ms < start.high_ms
    # What ends otherwise is scored too, and counts only where its interval was over by then.
    request_cancel(stated.market, "bob", job_id)
    keep_forecasts(stated.market)
    start = read(stated, "forecast")["start"]
    assert start.scored_ms is not None
    assert start.actual_ms is None
    assert not [row for row in stated.market.database.read(calibrations) if row.family == start.family]


def test_what_a_pass_looks_at_holds_up_nobodys_write(scene: Scene) -> None:
    statements: list[str] = []

    def executed(*said: object) -> None:
        statements.append(str(said[2]))

    event.listen(scene.market.database.engine, "before_cursor_execute", executed)
    try:
        assert keep_forecasts(scene.market) > 0
    finally:
        event.remove(scene.market.database.engine, "before_cursor_execute", executed)
        scene.market.database.write("forget", lambda session: session.execute(delete(Forecast)))
    held = statements[statements.index("BEGIN IMMEDIATE") :]
    assert any("INSERT INTO forecasts" in statement for statement in held)
    assert [statement for statement in held if "spec" in statement] == []


def test_what_came_is_scored_and_the_admin_sees_how_often_it_held(admin: Visitor, stated: Scene) -> None:
    def finish_early(session: Session) -> None:
        row = session.get_one(Forecast, (stated.jobs["spanning"], "finish", 1))
        row.scored_ms = row.actual_ms = row.low_ms - 1

    stated.market.database.write("score", finish_early)
    (row,) = stated.market.database.read(calibrations)
    assert (row.family, row.forecasts, row.covered, row.early, row.late) == ("finish/running", 1, 0.0, 1.0, 0.0)
    admin.visit("/admin/forecasts")
    expect(admin.page.get_by_role("row", name="finish/running 1")).to_contain_text("100 %")
    expect(admin.page.get_by_role("row", name="spanning")).to_contain_text("outside")


def test_a_job_page_says_when_it_should_be_done(tenant: Visitor, stated: Scene) -> None:
    tenant.visit(f"/jobs/{stated.jobs['spanning']}")
    expect(tenant.page.locator("#state")).to_contain_text("Should be done between")
    tenant.visit(f"/jobs/{stated.jobs['left-out']}")
    expect(tenant.page.locator("#state")).to_contain_text("Should start between")


@pytest.fixture
def second_round(scene: Scene) -> Iterator[None]:
    """A further round as the first was, but for a price: no round of the market's own, which would move its jobs."""

    def copy(session: Session) -> None:
        first = session.get_one(Round, 1)
        values = {column.key: getattr(first, column.key) for column in Round.__table__.columns}
        prices = json.loads(first.prices) | {"lubeck/cpu-slot": 2_000_000}
        session.add(Round(**values | {"round_number": 2, "prices": json.dumps(prices)}))

    scene.market.database.write("copy", copy)
    yield
    scene.market.database.write("forget", lambda session: session.execute(delete(Round).where(Round.round_number == 2)))


def test_an_admin_goes_through_the_rounds_with_the_keyboard(admin: Visitor, second_round: None) -> None:
    admin.visit("/admin/rounds")
    admin.page.get_by_role("link", name="Go through them").click()
    expect(admin.page.locator(".chart[data-drawn=yes] canvas")).to_have_count(3)
    newest = admin.page.locator("#at h2")
    expect(newest).to_contain_text("Round 2 ")
    expect(admin.page.locator("#at").get_by_role("row", name="lubeck/cpu-slot")).to_contain_text("2.00")
    with admin.page.expect_response(lambda answer: "/admin/replay?round=" in answer.url) as answered:
        admin.page.get_by_role("slider").press("Home")
    assert answered.value.status == 200
    expect(newest).to_contain_text("Round 1 ")
    expect(admin.page.locator("#at")).to_contain_text("bremen/cpu-slot")
    expect(admin.page.locator("#at")).to_contain_text("bound")
