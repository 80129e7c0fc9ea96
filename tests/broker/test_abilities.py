"""What a site cannot do for a job makes it no place for it, and the job says so while it waits."""

from __future__ import annotations

from broker.tenant_secrets import set_secret
from sites.protocol import Skill
from tests.broker.speaking import Scene
from tests.simulation.founding import TENANT_ID


def test_a_job_with_secrets_goes_only_where_they_can_be_kept(scene: Scene) -> None:
    scene.market.database.write(
        "secret", lambda session: set_secret(session, scene.market, TENANT_ID, "KEY", "value", actor=None)
    )
    bob = scene.sites["bob"]
    bob.skills = (Skill.GANG, Skill.SECRETS, "of a later version")
    bob.beat()
    job_id = scene.submit(2, secrets=["KEY"])
    scene.round()
    assert [lease.site_id for lease in scene.leases(job_id)] == ["bob"]
    (order,) = bob.proposed()
    assert order.spec is not None
    assert order.spec.secrets == ("KEY",)
    # The site loses its sandbox: it declines, and the job waits and says why.
    bob.skills = (Skill.GANG,)
    bob.veto()
    scene.round()
    job = scene.job(job_id)
    assert job.state == "queued"
    assert "no private place for its secrets at ada, bob, cid" in job.reason
