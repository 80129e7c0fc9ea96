"""A job is accepted whole, with its hold and its event, or refused with the reason and nothing left behind."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import select

from broker import ledger
from broker.cancel import request_cancel
from broker.database.tables import Artifact, Event, Hold, Job, JobArtifact
from broker.errors import BrokerError, ConflictError, NotFoundError
from broker.freeze import FrozenError, set_frozen
from broker.quote import quote_job
from broker.submit import submit_job
from tests.broker.speaking import CREDIT, Scene, spec
from tests.simulation.founding import TENANT_ID, WORKDIR


def test_one_transaction_writes_the_job_its_hold_its_workdir_and_its_event(scene: Scene) -> None:
    before = scene.market.database.read(ledger.balances)
    rung = scene.bells.rounds
    job_id = scene.submit(2, budget=7 * CREDIT)
    after = scene.market.database.read(ledger.balances)
    assert after[f"tenant/{TENANT_ID}"] == before[f"tenant/{TENANT_ID}"] - 7 * CREDIT
    assert after[f"held/{TENANT_ID}"] == before.get(f"held/{TENANT_ID}", 0) + 7 * CREDIT
    assert scene.hold(job_id).amount_micros == 7 * CREDIT
    assert [(event.before, event.after) for event in scene.events("job")] == [("", "queued")]
    (workdir,) = scene.read(select(JobArtifact).where(JobArtifact.job_id == job_id))
    assert (workdir.kind, workdir.digest) == ("workdir", WORKDIR)
    assert scene.job(job_id).state == "queued"
    assert scene.bells.rounds == rung + 1
    assert scene.is_due()


@pytest.mark.parametrize(
    ("wanted", "code", "says"),
    [
        ({"budget": 10**13}, "ledger.insufficient", "lower the budget"),
        ({"deadline_ms": 1}, "job.deadline_past", "give a later one"),
        ({"gpus": 7, "sites_max": 3}, "job.never_possible", "[a-z]"),
        ({"gpus": 4}, "job.never_possible", "[a-z]"),
        ({"sites_allowed": ["nowhere"]}, "job.never_possible", "[a-z]"),
    ],
)
def test_a_job_that_cannot_be_is_refused_and_leaves_nothing(
    scene: Scene, wanted: dict[str, Any], code: str, says: str
) -> None:
    balances, rung = scene.market.database.read(ledger.balances), scene.bells.rounds
    with pytest.raises(BrokerError, match=says) as refusal:
        scene.submit(**wanted)
    assert refusal.value.code == code
    assert len(str(refusal.value)) > 20
    _assert_nothing_left(scene)
    assert scene.market.database.read(ledger.balances) == balances
    assert scene.bells.rounds == rung


def test_a_workdir_must_have_been_uploaded_whole(scene: Scene) -> None:
    half = "cd" * 32
    scene.write(lambda session: session.add(Artifact(digest=half, size_bytes=9, complete=False, created_ms=1)))
    for digest in (half, "ef" * 32):
        with pytest.raises(BrokerError, match="upload it") as refusal:
            submit_job(scene.market, TENANT_ID, spec().model_copy(update={"workdir_digest": digest}))
        assert refusal.value.code == "job.workdir_missing"
    _assert_nothing_left(scene)


def test_an_unknown_tenant_is_refused(scene: Scene) -> None:
    with pytest.raises(NotFoundError):
        submit_job(scene.market, "nobody", spec())
    _assert_nothing_left(scene)


def test_a_tenant_may_have_so_many_jobs_and_no_more(scene: Scene) -> None:
    most = scene.market.settings.model_copy(update={"jobs_queued_per_tenant_max": 2})
    object.__setattr__(scene.market, "settings", most)
    first = scene.submit()
    scene.submit()
    with pytest.raises(BrokerError, match="wait or cancel") as refusal:
        scene.submit()
    assert refusal.value.code == "job.queue_full"
    request_cancel(scene.market, TENANT_ID, first)
    scene.submit()


def test_what_is_to_happen_before_the_commit_happens_with_it_or_not_at_all(scene: Scene) -> None:
    def fail(_session: object, _job: Job) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        submit_job(scene.market, TENANT_ID, spec(), before_commit=fail)
    _assert_nothing_left(scene)


def test_submits_at_once_never_hold_more_than_the_tenant_has(scene: Scene) -> None:
    def submit(_number: int) -> str:
        try:
            return scene.submit(budget=4 * 10**11)
        except BrokerError as refusal:
            return refusal.code

    with ThreadPoolExecutor(4) as threads:
        answers = sorted(threads.map(submit, range(4)))
    assert answers[2:] == ["ledger.insufficient"] * 2  # ids sort before codes
    assert len(scene.read(select(Job))) == 2


def test_a_quote_shows_what_a_job_would_get_and_changes_nothing(scene: Scene) -> None:
    events = len(scene.read(select(Event)))
    rows = quote_job(scene.market, spec(2, sites_max=2, most=4))
    assert {tuple(part.gpus for part in row.configuration.parts) for row in rows} >= {(2,), (2, 2)}
    assert len(scene.read(select(Event))) == events
    _assert_nothing_left(scene)


def test_a_waiting_job_is_cancelled_at_once_and_only_by_its_own_tenant(scene: Scene) -> None:
    job_id = scene.submit()
    with pytest.raises(NotFoundError):
        request_cancel(scene.market, "rival", job_id)
    assert request_cancel(scene.market, TENANT_ID, job_id).state == "cancelled"
    with pytest.raises(ConflictError, match="already cancelled"):
        request_cancel(scene.market, TENANT_ID, job_id)
    scene.round()
    assert scene.placements(job_id) == 0


def _assert_nothing_left(scene: Scene) -> None:
    assert scene.read(select(Job)) == scene.read(select(Hold)) == scene.read(select(JobArtifact)) == []
    assert scene.events("job") == []


def test_the_transaction_that_writes_a_job_finds_the_market_open(scene: Scene) -> None:
    set_frozen(scene.market, frozen=True)
    with pytest.raises(FrozenError):
        scene.submit(1)
    assert scene.read(select(Job)) == []
    set_frozen(scene.market, frozen=False)
    assert scene.job(scene.submit(1)).state == "queued"
