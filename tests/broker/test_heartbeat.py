"""What a heartbeat does as a whole: who speaks is on record, and an item that cannot be taken costs no other."""

from __future__ import annotations

from pathlib import Path

from sites.protocol import OUTPUT_NAME_LENGTH_MAX, AttemptPhase, AttemptReport
from tests.broker.speaking import Scene
from tests.fixtures.databases import PostgresServer

DIGEST = "a1" * 32


def test_an_agent_that_started_anew_is_on_record_once(scene: Scene) -> None:
    ada = scene.sites["ada"]
    ada.beat()
    assert scene.events("agent") == []
    for boot in ("boot-2", "boot-2"):
        ada.sequence += 1
        ada.send(ada.heartbeat().model_copy(update={"boot": boot}), ada.sequence)
    assert [(event.site_id, event.after) for event in scene.events("agent")] == [("ada", "restarted")]


def test_an_item_that_the_database_refuses_costs_no_other_item_and_no_liveness(
    postgres_server: PostgresServer, postgres_schema: str, tmp_path: Path
) -> None:
    name = postgres_server.create_database(postgres_schema)
    scene = Scene(postgres_server.url(name), tmp_path / "home")
    first_id, second_id = scene.submit(1, sites_allowed=["ada"]), scene.submit(1, sites_allowed=["ada"])
    ada = scene.sites["ada"]
    scene.round()
    ada.confirm()
    ada.beat()
    first, second = scene.lease(first_id, "ada"), scene.lease(second_id, "ada")
    scene.store(DIGEST)
    running = {
        lease.lease_id: AttemptReport(lease_id=lease.lease_id, epoch=lease.epoch, phase=AttemptPhase.RUNNING)
        for lease in (first, second)
    }
    # As an agent that knows no bound would say it; SQLite has no bound on text, PostgreSQL has.
    ada.reports = {
        **running,
        first.lease_id: running[first.lease_id].model_copy(update={"outputs": {"x" * 300: DIGEST}}),
    }
    scene.clock.advance_s(1)
    answer = ada.beat()
    assert [(refusal.lease_id, refusal.code) for refusal in answer.refusals] == [(first.lease_id, "item.unstorable")]
    assert scene.lease(second_id, "ada").phase == "running"
    later = scene.lease(first_id, "ada").liveness_monotonic_ms
    assert later is not None
    assert first.liveness_monotonic_ms is not None
    assert later == first.liveness_monotonic_ms + 1000
    scene.close()
    postgres_server.drop_database(name)


def test_the_longest_output_name_fits_beside_the_longest_name_of_a_site(market_url: str, tmp_path: Path) -> None:
    sites = {"a" * 31: 1, "b" * 31: 1}
    scene = Scene(market_url, tmp_path / "home", sites)
    job_id = scene.submit(2, sites_max=2)
    first, second = scene.start(job_id)
    output = "x" * OUTPUT_NAME_LENGTH_MAX
    scene.store(DIGEST)
    scene.store("b2" * 32)
    for site, digest in ((first, DIGEST), (second, "b2" * 32)):
        lease_id = site.order().lease_id
        site.reports[lease_id] = site.reports[lease_id].model_copy(update={"outputs": {output: digest}})
        assert site.beat().refusals == ()
    scene.close()
