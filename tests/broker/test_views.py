"""Who is in a round log is the broker's word alone, and no new word forgets what was sealed."""

from __future__ import annotations

import pytest
from sqlalchemy import select

from broker.database.tables import ViewPromise
from sites.protocol import ExitCause
from tests.broker.speaking import HUB_LOST_S, LIVENESS_S, MARGIN_S, Scene, SpeakingSite
from training.roundlog.view import GENESIS_HASH

NEAR, FAR = "11" * 32, "22" * 32


@pytest.fixture
def gang(scene: Scene) -> list[SpeakingSite]:
    """A job at all three sites, the hub first."""
    members = scene.start(scene.submit(6, sites_max=3))
    hub = members[0].view().hub
    return sorted(members, key=lambda site: (site.site_id != hub, site.site_id))


def test_the_first_view_names_the_whole_gang_and_starts_from_nothing(scene: Scene, gang: list[SpeakingSite]) -> None:
    views = {site.view().model_dump_json() for site in gang}
    assert len(views) == 1
    view = gang[0].view()
    assert [member.site_id for member in view.members] == ["ada", "bob", "cid"]
    assert {member.epoch for member in view.members} == {1}
    assert (view.number, view.base_round, view.base_hash, view.base_reporter) == (1, 0, GENESIS_HASH, None)
    assert view.hub == gang[0].site_id
    assert view.standby in {site.site_id for site in gang[1:]}
    assert view.quorum == 3
    assert all(member.weight_max > 0 for member in view.members)
    assert gang[0].promise_wanted() is None


def test_after_a_loss_all_survivors_promise_and_the_highest_report_is_the_base(
    scene: Scene, gang: list[SpeakingSite]
) -> None:
    hub, near, far = gang
    hub.exit(ExitCause.SITE)
    job_id = scene.leases(scene.job(near.order().job_id).job_id)[0].job_id
    assert [view.state for view in scene.views(job_id)] == ["issued", "promising"]
    for site in (near, far):
        site.beat()
        assert site.promise_wanted() == 2
        assert site.view().number == 1
    near.promise(2, sealed=7, chain_hash=NEAR)
    assert scene.views(job_id)[1].state == "promising"
    near.promise(2, sealed=7, chain_hash=NEAR)  # said again, nothing more
    far.promise(2, sealed=9, chain_hash=FAR)
    near.beat()
    view = near.view()
    assert (view.number, view.base_round, view.base_hash, view.base_reporter) == (2, 9, FAR, far.site_id)
    assert [member.site_id for member in view.members] == sorted([near.site_id, far.site_id])
    assert view.hub in {near.site_id, far.site_id}
    assert near.promise_wanted() is None
    assert scene.read(select(ViewPromise)) == []


def test_a_promise_stands_as_it_was_first_given(scene: Scene, gang: list[SpeakingSite]) -> None:
    hub, near, far = gang
    hub.exit(ExitCause.SITE)
    for site in (near, far):
        site.beat()
    near.promise(2, sealed=7, chain_hash=NEAR)
    near.promise(2, sealed=99, chain_hash=FAR)
    far.promise(2, sealed=6, chain_hash=FAR)
    assert far.view().base_round == 7


def test_a_member_lost_while_a_view_is_promised_makes_another_one(scene: Scene, gang: list[SpeakingSite]) -> None:
    hub, near, far = gang
    job_id = near.order().job_id
    hub.exit(ExitCause.SITE)
    for site in (near, far):
        site.beat()
    near.promise(2, sealed=7, chain_hash=NEAR)
    far.exit(ExitCause.SITE)
    assert [view.state for view in scene.views(job_id)] == ["issued", "abandoned", "promising"]
    near.beat()
    assert near.promise_wanted() == 3
    near.promise(3, sealed=7, chain_hash=NEAR)
    view = near.view()
    assert (view.number, view.base_round, view.hub, view.standby) == (3, 7, near.site_id, None)


def test_the_promise_of_an_old_view_counts_for_nothing(scene: Scene, gang: list[SpeakingSite]) -> None:
    hub, near, far = gang
    job_id = near.order().job_id
    hub.exit(ExitCause.SITE)
    far.exit(ExitCause.SITE)
    near.beat()
    assert near.promise_wanted() == 3
    near.promise(2, sealed=7, chain_hash=NEAR)
    near.promise(1, sealed=7, chain_hash=NEAR)
    near.promise(99, sealed=7, chain_hash=NEAR)
    assert [view.state for view in scene.views(job_id)] == ["issued", "abandoned", "promising"]
    assert near.view().number == 1


def test_a_silent_member_is_lost_when_its_liveness_is_over(scene: Scene, gang: list[SpeakingSite]) -> None:
    hub, near, far = gang
    scene.pass_s(LIVENESS_S + MARGIN_S + 1, hub.site_id, near.site_id)
    scene.reconcile()
    hub.beat()
    assert hub.promise_wanted() == 2
    near.beat()
    near.promise(2, sealed=3, chain_hash=NEAR)
    hub.promise(2, sealed=3, chain_hash=NEAR)
    assert hub.view().hub == hub.site_id  # the hub stays where it is while it can
    assert far.site_id not in {member.site_id for member in hub.view().members}


def test_the_hub_moves_when_most_of_the_others_have_lost_it(scene: Scene, gang: list[SpeakingSite]) -> None:
    hub, near, far = gang
    job_id = hub.order().job_id
    near.run(hub_lost_s=HUB_LOST_S)
    scene.reconcile()
    assert len(scene.views(job_id)) == 1  # one of two is no majority
    far.run(hub_lost_s=HUB_LOST_S - 0.1)
    scene.reconcile()
    assert len(scene.views(job_id)) == 1  # not for long enough
    far.run(hub_lost_s=HUB_LOST_S)
    scene.reconcile()
    newest = scene.views(job_id)[-1]
    assert (newest.number, newest.state) == (2, "promising")
    assert newest.hub != hub.site_id
    scene.reconcile()
    assert len(scene.views(job_id)) == 2
    for site in gang:
        site.beat()
        site.promise(2)
    near.beat()
    view = near.view()
    assert view.hub == newest.hub
    assert hub.site_id in {member.site_id for member in view.members}


def test_complaints_about_a_former_hub_move_nothing(scene: Scene, gang: list[SpeakingSite]) -> None:
    hub, near, far = gang
    for site in (near, far):
        site.run(hub_lost_s=100, view=7)
    scene.reconcile()
    assert len(scene.views(hub.order().job_id)) == 1


def test_the_view_goes_on_without_a_hub_that_vanished_and_its_lease_runs_on(
    scene: Scene, gang: list[SpeakingSite]
) -> None:
    hub, near, far = gang
    job_id = near.order().job_id
    standby = near.view().standby
    scene.pass_s(1.0, near.site_id, far.site_id)
    near.run(sealed=4, chain_hash=NEAR, hub_lost_s=1.0)
    assert hub.site_id in scene.bells.sites  # one that lives would answer
    assert len(scene.views(job_id)) == 1
    far.run(sealed=4, chain_hash=NEAR, hub_lost_s=1.0)
    near.beat()
    near.promise(2, sealed=4, chain_hash=NEAR)
    far.promise(2, sealed=4, chain_hash=NEAR)
    view = far.view()
    assert (view.number, view.hub, view.base_round) == (2, standby, 4)
    assert hub.site_id not in {member.site_id for member in view.members}
    # Membership moved; the lease and its GPUs did not.
    lease = next(lease for lease in scene.leases(job_id) if lease.site_id == hub.site_id)
    assert lease.state == "active"
    scene.pass_s(LIVENESS_S + MARGIN_S, near.site_id, far.site_id)
    scene.reconcile()
    lease = next(lease for lease in scene.leases(job_id) if lease.site_id == hub.site_id)
    assert (lease.state, lease.end_cause) == ("ended", "expired")
    assert [view.state for view in scene.views(job_id)] == ["issued", "issued"]


def test_a_site_that_was_left_out_joins_again_and_its_own_rounds_do_not_count(
    scene: Scene, gang: list[SpeakingSite]
) -> None:
    hub, near, far = gang
    job_id = near.order().job_id
    scene.pass_s(1.0, near.site_id, far.site_id)
    for site in (near, far):
        site.run(sealed=4, chain_hash=NEAR, hub_lost_s=1.0)
    for site in (near, far):
        site.beat()
        site.promise(2, sealed=4, chain_hash=NEAR)
    # It has sealed round 5 before it was cut off, and nobody else knows that.
    hub.run(sealed=5, chain_hash=FAR, view=1)
    assert scene.views(job_id)[-1].cause == f"{hub.site_id} is back"
    for site in (near, far):
        site.run(sealed=5, chain_hash=NEAR, view=2)
        site.promise(3, sealed=5, chain_hash=NEAR)
    hub.promise(3, sealed=9, chain_hash=FAR)
    view = hub.view()
    assert (view.number, view.base_round, view.base_hash, view.joining) == (3, 5, NEAR, (hub.site_id,))
    assert view.hub == near.view().hub != hub.site_id


def test_a_job_whose_last_members_are_lost_resumes_from_its_checkpoint(scene: Scene, gang: list[SpeakingSite]) -> None:
    hub, near, far = gang
    job_id = near.order().job_id
    scene.pass_s(1.0, near.site_id, far.site_id)
    for site in (near, far):
        site.run(sealed=4, chain_hash=NEAR, hub_lost_s=1.0)
    for site in (near, far):
        site.beat()
        site.promise(2, sealed=4, chain_hash=NEAR)
    near.exit(ExitCause.SITE)
    far.exit(ExitCause.SITE)
    # The former hub still has its lease, but knows nothing of what was sealed without it.
    assert scene.job(job_id).state == "queued"
    assert {lease.state for lease in scene.leases(job_id)} == {"ended"}
    assert hub.site_id in scene.bells.sites
