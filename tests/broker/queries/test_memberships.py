"""Who was in a job's round log, why that changed, and how long the change took."""

from __future__ import annotations

from broker.queries.jobs import list_memberships, read_job
from sites.protocol import ExitCause
from tests.broker.speaking import Scene


def test_each_view_says_who_why_and_how_long_it_took_to_open(scene: Scene) -> None:
    job_id = scene.submit(6, sites_max=3)
    ada, bob, cid = scene.start(job_id)
    ada.exit(ExitCause.SITE)
    for site in (bob, cid):
        site.beat()
    opening = scene.market.database.read(lambda session: list_memberships(session, job_id))[0]
    assert (opening.number, opening.state, opening.opened_in_ms) == (2, "promising", None)
    scene.clock.advance_s(0.4)
    bob.promise(2)
    cid.promise(2)
    second, first = scene.market.database.read(lambda session: list_memberships(session, job_id))
    assert (first.number, first.sites, first.opened_in_ms) == (1, ("ada", "bob", "cid"), 0)
    assert (second.number, second.sites, second.opened_in_ms) == (2, ("bob", "cid"), 400)
    assert second.hub in second.sites
    assert second.cause
    tenant_id = scene.job(job_id).tenant_id
    shown = scene.market.database.read(lambda session: read_job(session, job_id, tenant_id))
    assert shown.memberships == (second, first)
