"""A site's statement as the broker tells it: its own money, its customers', and what rounds found sharing to be worth."""

from __future__ import annotations

import json

from sqlalchemy import update
from sqlalchemy.orm import Session

from broker.database.certificates import RoundCertificate
from broker.database.tables import Tenant
from broker.earnings import site_statement
from sites.protocol import SiteStatement
from tests.broker.speaking import Scene
from tests.simulation.founding import TENANT_ID


def told(scene: Scene, site_id: str) -> SiteStatement:
    return scene.market.database.read(lambda session: site_statement(session, scene.market, site_id, days=1))


def test_a_site_is_told_what_it_earned_and_what_its_customers_spent(scene: Scene) -> None:
    job_id = scene.submit(2)
    (site,) = scene.start(job_id)
    order = site.order()
    scene.pass_s(20, "ada", "bob", "cid")
    site.meter(order, 40_000)
    site.beat()
    other = next(name for name in scene.sites if name != site.site_id)
    found = told(scene, site.site_id)
    assert (found.leases, found.gpu_milliseconds) == (1, 40_000)
    assert found.payout_micros > 0
    assert found.balance_micros == found.payout_micros + found.link_revenue_micros - found.refunded_micros
    assert (told(scene, other).payout_micros, told(scene, other).spent_by_customers_micros) == (0, 0)

    scene.write(
        lambda session: session.execute(update(Tenant).where(Tenant.tenant_id == TENANT_ID).values(home_site=other))
    )
    assert told(scene, other).spent_by_customers_micros >= found.payout_micros


def test_worth_is_that_of_rounds_with_known_economics_each_until_the_next(scene: Scene) -> None:
    scene.submit(2)
    scene.round()
    assert told(scene, "ada").rounds_known == 0
    scene.pass_s(36, "ada", "bob", "cid")

    def found_out(session: Session) -> None:
        row = {"site_id": "ada", "federated_micros_per_hour": 7_000_000, "alone_micros_per_hour": 5_000_000}
        session.execute(update(RoundCertificate).values(economics="done", sites=json.dumps([row])))

    scene.write(found_out)
    statement = told(scene, "ada")
    assert (statement.rounds_known, statement.covered_ms) == (1, 36_000)
    assert (statement.worth_federated_micros, statement.worth_alone_micros) == (70_000, 50_000)
    assert told(scene, "bob").rounds_known == 0
