"""What came of an attempt decides what becomes of its job: its own failure ends it, a lost site does not."""

from __future__ import annotations

import pytest
from sqlalchemy import select

from broker.database.tables import JobArtifact
from broker.database.uploads import SiteUpload
from broker.transitions import EndCause
from sites.protocol import ExitCause, LeasePhase
from tests.broker.speaking import LIVENESS_S, MARGIN_S, Scene, SpeakingSite, checkpoint

FIRST, SECOND, OTHER = "a1" * 32, "b2" * 32, "c3" * 32


def test_a_job_is_finished_when_every_site_of_its_gang_is_done(scene: Scene) -> None:
    job_id = scene.submit(4, sites_max=2)
    first, second = scene.start(job_id)
    first.exit(ExitCause.DONE)
    assert scene.job(job_id).state == "running"
    # Others may still fetch the last round from its gateway: its lease stays.
    assert first.order().phase is LeasePhase.ACTIVE
    second.exit(ExitCause.DONE)
    job = scene.job(job_id)
    assert (job.state, job.reason_code) == ("finished", "finished")
    assert job.samples_done == 10**9
    assert scene.taken_gpus(first.site_id) == scene.taken_gpus(second.site_id) == 0
    assert first.beat().leases == ()


@pytest.mark.parametrize("cause", [ExitCause.SCRIPT, ExitCause.SETUP, ExitCause.BUNDLE, ExitCause.LIMIT])
def test_a_tenants_own_failure_fails_the_job_and_ends_all_its_leases(scene: Scene, cause: ExitCause) -> None:
    job_id = scene.submit(4, sites_max=2)
    first, second = scene.start(job_id)
    first.exit(cause, "ZeroDivisionError in line 7")
    job = scene.job(job_id)
    assert (job.state, job.reason_code) == ("failed", cause.value)
    assert first.site_id in job.reason
    assert "ZeroDivisionError in line 7" in job.reason
    assert [lease.state for lease in scene.leases(job_id)] == ["ended", "ended"]
    assert scene.taken_gpus(first.site_id) == 0
    assert scene.taken_gpus(second.site_id) == 2
    assert second.beat().leases[0].phase is LeasePhase.ENDED
    scene.round()
    assert scene.placements(job_id) == 1


@pytest.mark.parametrize("cause", [ExitCause.SITE, ExitCause.EXCHANGE, ExitCause.EXPIRED])
def test_a_gang_that_loses_one_site_goes_on_with_the_others(scene: Scene, cause: ExitCause) -> None:
    job_id = scene.submit(6, sites_max=3)
    lost, *left = scene.start(job_id)
    lost.exit(cause)
    assert scene.job(job_id).state == "running"
    assert [lease.state for lease in scene.leases(job_id)] == ["ended", "active", "active"]
    assert [event.after for event in scene.events("gang")] == ["active", "reduced"]
    for site in left:
        site.beat()
        assert site.promise_wanted() == 2
        site.exit(ExitCause.DONE)
    assert scene.job(job_id).state == "finished"


def test_a_gang_lost_whole_waits_again_and_resumes_from_its_newest_checkpoint(scene: Scene) -> None:
    job_id = scene.submit(2, sites_allowed=["ada"])
    (ada,) = scene.start(job_id)
    scene.store(FIRST)
    scene.store(SECOND)
    ada.exit(ExitCause.SITE, checkpoint=checkpoint(FIRST, sealed=5, chain_hash=OTHER))
    job = scene.job(job_id)
    assert (job.state, job.reason_code, job.failures) == ("queued", "lost", 1)
    assert job.samples_done == 5_000
    scene.start(job_id)
    placement = scene.placement(job_id)
    assert (placement.epoch, placement.base_round, placement.base_hash) == (2, 5, OTHER)
    order = ada.order()
    assert order.epoch == 2
    assert order.attempt is not None
    assert order.attempt.checkpoint is not None
    assert (order.attempt.checkpoint.digest, order.attempt.checkpoint.round_number) == (FIRST, 5)
    assert (ada.view().base_round, ada.view().base_hash) == (5, OTHER)


def test_a_site_resumes_from_its_own_checkpoint_of_the_newest_round(scene: Scene) -> None:
    job_id = scene.submit(4, sites_max=2)
    first, second = scene.start(job_id)
    for digest in (FIRST, SECOND):
        scene.store(digest)
    first.exit(ExitCause.SITE, checkpoint=checkpoint(FIRST, sealed=5, chain_hash=OTHER))
    second.exit(ExitCause.SITE, checkpoint=checkpoint(SECOND, sealed=5, chain_hash=OTHER))
    scene.start(job_id)
    assert {site.site_id: _resumes_from(site) for site in (first, second)} == {
        first.site_id: FIRST,
        second.site_id: SECOND,
    }


def test_a_site_whose_own_checkpoint_is_older_takes_the_newest(scene: Scene) -> None:
    job_id = scene.submit(4, sites_max=2)
    first, second = scene.start(job_id)
    for digest in (FIRST, SECOND):
        scene.store(digest)
    first.exit(ExitCause.SITE, checkpoint=checkpoint(FIRST, sealed=4, chain_hash=OTHER))
    second.exit(ExitCause.SITE, checkpoint=checkpoint(SECOND, sealed=5, chain_hash=SECOND))
    scene.start(job_id)
    assert _resumes_from(first) == _resumes_from(second) == SECOND


def test_a_job_that_is_lost_again_and_again_fails_at_last(scene: Scene) -> None:
    job_id = scene.submit(2, sites_allowed=["ada"])
    for attempt in (1, 2, 3):
        (ada,) = scene.start(job_id)
        ada.exit(ExitCause.SITE, "the disk is full")
        assert scene.job(job_id).failures == attempt
    job = scene.job(job_id)
    assert (job.state, job.reason_code) == ("failed", "attempts_exhausted")
    assert "the disk is full" in job.reason


def test_all_sites_silent_is_a_gang_lost_whole(scene: Scene) -> None:
    job_id = scene.submit(4, sites_max=2)
    scene.start(job_id)
    scene.pass_s(LIVENESS_S + MARGIN_S + 1)
    scene.reconcile()
    job = scene.job(job_id)
    assert (job.state, job.reason_code, job.failures) == ("queued", "lost", 1)
    assert {lease.end_cause for lease in scene.leases(job_id)} == {"expired"}


def test_files_are_registered_only_once_they_are_stored(scene: Scene) -> None:
    job_id = scene.submit(2, sites_allowed=["ada"])
    (ada,) = scene.start(job_id)
    order = ada.order()
    report = ada.reports[order.lease_id].model_copy(
        update={
            "checkpoint": checkpoint(FIRST, sealed=3, chain_hash=OTHER),
            "outputs": {"model.safetensors": SECOND},
        }
    )
    ada.reports[order.lease_id] = report
    ada.beat()
    assert _files(scene, job_id) == {}
    scene.store(FIRST)
    ada.beat()
    assert _files(scene, job_id) == {("checkpoint", "ada"): FIRST}
    scene.store(SECOND)
    ada.beat()
    ada.beat()
    assert _files(scene, job_id) == {("checkpoint", "ada"): FIRST, ("output", "model.safetensors"): SECOND}


def test_a_site_makes_nobodys_file_its_jobs_by_naming_the_digest(scene: Scene) -> None:
    job_id = scene.submit(2, sites_allowed=["ada"])
    (ada,) = scene.start(job_id)
    scene.store(FIRST, "bob")
    report = ada.reports[ada.order().lease_id]
    named = {"checkpoint": checkpoint(FIRST, sealed=3, chain_hash=OTHER), "outputs": {"stolen": FIRST}}
    ada.say(attempts=(report.model_copy(update=named),))
    assert _files(scene, job_id) == {}
    scene.write(lambda session: session.add(SiteUpload(site_id="ada", digest=FIRST, created_ms=1)))
    ada.say(attempts=(report.model_copy(update=named),))
    assert set(_files(scene, job_id)) == {("checkpoint", "ada"), ("output", "stolen")}


def test_an_older_checkpoint_never_takes_the_place_of_a_newer(scene: Scene) -> None:
    job_id = scene.submit(2, sites_allowed=["ada"])
    (ada,) = scene.start(job_id)
    scene.store(FIRST)
    scene.store(SECOND)
    for digest, sealed in ((SECOND, 6), (FIRST, 3)):
        report = ada.reports[ada.order().lease_id]
        ada.say(
            attempts=(report.model_copy(update={"checkpoint": checkpoint(digest, sealed=sealed, chain_hash=OTHER)}),)
        )
    assert _files(scene, job_id) == {("checkpoint", "ada"): SECOND}


def test_outputs_that_differ_between_sites_are_both_kept(scene: Scene) -> None:
    job_id = scene.submit(4, sites_max=2)
    first, second = scene.start(job_id)
    for digest in (FIRST, SECOND):
        scene.store(digest)
    first.exit(ExitCause.DONE, outputs={"log.txt": FIRST, "model": FIRST})
    second.exit(ExitCause.DONE, outputs={"log.txt": SECOND, "model": FIRST})
    assert _files(scene, job_id) == {
        ("output", "log.txt"): FIRST,
        ("output", f"{second.site_id}/log.txt"): SECOND,
        ("output", "model"): FIRST,
    }


def test_a_report_about_a_lease_that_is_not_active_has_no_state_to_tell(scene: Scene) -> None:
    job_id = scene.submit(2, sites_allowed=["ada"])
    scene.round()
    ada = scene.sites["ada"]
    (order,) = ada.proposed()
    ada.exit_of(order, ExitCause.DONE)
    assert scene.lease(job_id, "ada").phase == ""
    assert scene.job(job_id).state == "proposed"


def _resumes_from(site: SpeakingSite) -> str | None:
    attempt = site.order().attempt
    assert attempt is not None
    return None if attempt.checkpoint is None else attempt.checkpoint.digest


def _files(scene: Scene, job_id: str) -> dict[tuple[str, str], str]:
    rows = scene.read(select(JobArtifact).where(JobArtifact.job_id == job_id, JobArtifact.kind != "workdir"))
    return {(row.kind, row.name): row.digest for row in rows}


def test_every_cause_that_a_site_reports_is_a_cause_of_an_end() -> None:
    assert {cause.value for cause in ExitCause} <= {cause.value for cause in EndCause}
