from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sites.journal import AttemptRecord
from sites.leases import (
    Confirm,
    Disown,
    House,
    Refuse,
    Release,
    Renew,
    Standing,
    Start,
    Steer,
    Stop,
    Withdraw,
    decide,
)
from sites.policy import Policy
from sites.protocol import AttemptOrder, AttemptPhase, ExitCause, LeaseOrder, LeasePhase
from training.spec import JobSpec

SPEC = JobSpec.model_validate(
    {
        "name": "job",
        "run": "python train.py",
        "setup": "true",
        "workdir_digest": "0" * 64,
        "resources": {"accelerators": [{"gpu_type": "A100", "count_min": 1, "count_max": 8}]},
        "market": {
            "budget_micros": 1,
            "workload": {"samples": 1, "batch_per_gpu": 1, "parameters": 1, "flops_per_sample": 1},
        },
    }
)
ATTEMPT = AttemptOrder(spec=SPEC, sync=SPEC.market.sync, seed=1, weight_max=1, certificate_pem="pem")
HOUSE = House(gpu_ids={"A100": frozenset({"0", "1", "2", "3"})}, asks={"A100": 1000}, policy=Policy(), draining=False)
NOTHING = Standing(attempts={}, confirmed=frozenset(), vetoed=frozenset(), epochs={})


def order(lease_id: str = "lease_a", phase: str = "proposed", **changes: Any) -> LeaseOrder:
    document = {
        "lease_id": lease_id,
        "job_id": "job_a",
        "tenant_id": "tenant",
        "epoch": 1,
        "phase": phase,
        "gpu_type": "A100",
        "gpu_ids": ("0", "1"),
        "price_micros_per_gpu_hour": 1000,
        "term_ends_ms": 1,
        "liveness_s": 20.0,
        "spec": SPEC if phase == "proposed" else None,
        "attempt": ATTEMPT if phase == "active" else None,
    }
    return LeaseOrder.model_validate(document | changes)


def record(
    lease_id: str = "lease_a", epoch: int = 1, phase: AttemptPhase = AttemptPhase.RUNNING, **changes: Any
) -> AttemptRecord:
    values = {
        "lease_id": lease_id,
        "epoch": epoch,
        "job_id": "job_a",
        "tenant_id": "tenant",
        "gpu_type": "A100",
        "gpu_ids": ("0", "1"),
        "order": ATTEMPT,
        "phase": phase,
    }
    return AttemptRecord.model_validate(values | changes)


def standing(*records: AttemptRecord, **changes: Any) -> Standing:
    return replace(NOTHING, attempts={entry.key: entry for entry in records}, **changes)


def test_proposal_is_confirmed_once() -> None:
    proposal = order()
    assert decide([proposal], NOTHING, HOUSE) == [Confirm(proposal)]
    assert decide([proposal], replace(NOTHING, confirmed=frozenset({("lease_a", 1)})), HOUSE) == []


def test_confirmed_lease_starts_only_when_active() -> None:
    confirmed = replace(NOTHING, confirmed=frozenset({("lease_a", 1)}))
    assert decide([order(phase="proposed")], confirmed, HOUSE) == []
    active = order(phase="active")
    assert decide([active], confirmed, HOUSE) == [Start(active)]


@pytest.mark.parametrize(
    ("changes", "house", "code"),
    [
        ({"gpu_ids": ("0", "9")}, HOUSE, "gpu.unknown"),
        ({"gpu_ids": ()}, HOUSE, "gpu.unknown"),
        ({"gpu_type": "H100"}, HOUSE, "gpu.unknown"),
        ({"price_micros_per_gpu_hour": 999}, HOUSE, "price.below_ask"),
        ({}, replace(HOUSE, draining=True), "policy.draining"),
        ({}, replace(HOUSE, policy=Policy(tenants_refused=("tenant",))), "policy.tenant"),
        ({}, replace(HOUSE, policy=Policy(gpus_max_per_lease=1)), "policy.gpus_max"),
        ({}, replace(HOUSE, policy=Policy(setup_allowed=False)), "policy.setup"),
    ],
)
def test_policy_vetoes_with_a_code(changes: dict[str, Any], house: House, code: str) -> None:
    (action,) = decide([order(**changes)], NOTHING, house)
    assert isinstance(action, Refuse)
    assert action.objection.code == code


def test_older_epoch_is_refused_at_every_door() -> None:
    (proposed,) = decide([order()], replace(NOTHING, epochs={"job_a": 2}), HOUSE)
    assert isinstance(proposed, Refuse)
    assert proposed.objection.code == "epoch.old"
    seen = replace(NOTHING, epochs={"job_a": 2}, confirmed=frozenset({("lease_b", 1)}))
    old = order("lease_b", phase="active")
    actions = decide([old], seen, HOUSE)
    assert [type(action) for action in actions] == [Disown]
    assert not any(isinstance(action, Start) for action in actions)


@pytest.mark.parametrize(
    "former",
    [
        record("lease_old", gpu_ids=("3",)),  # the same job, other GPUs
        record("lease_old", job_id="job_b", gpu_ids=("1", "2")),  # another job, one common GPU
        record("lease_old", phase=AttemptPhase.STOPPING, job_id="job_b"),
    ],
)
def test_nothing_starts_before_the_former_processes_are_dead(former: AttemptRecord) -> None:
    active = order(phase="active", epoch=2)
    confirmed = frozenset({("lease_a", 2)})
    waiting = decide([active], standing(former, confirmed=confirmed), HOUSE)
    assert not any(isinstance(action, Start) for action in waiting)
    dead = former.model_copy(update={"phase": AttemptPhase.EXITED})
    assert Start(active) in decide([active], standing(dead, confirmed=confirmed), HOUSE)


def test_gpu_of_another_type_with_the_same_name_is_another_gpu() -> None:
    other = record("lease_old", job_id="job_b", gpu_type="H100")
    active = order(phase="active")
    assert Start(active) in decide([active], standing(other, confirmed=frozenset({("lease_a", 1)})), HOUSE)


def test_active_lease_without_our_key_is_disowned() -> None:
    (action,) = decide([order(phase="active")], NOTHING, HOUSE)
    assert isinstance(action, Disown)
    assert action.cause is ExitCause.SITE


def test_ended_lease_that_never_ran_is_reported_dead() -> None:
    confirmed = replace(NOTHING, confirmed=frozenset({("lease_a", 1)}))
    disown, withdraw = decide([order(phase="ended")], confirmed, HOUSE)
    assert isinstance(disown, Disown)
    assert disown.cause is ExitCause.ORDERED
    assert withdraw == Withdraw(("lease_a", 1))


def test_running_attempt_is_renewed_and_steered() -> None:
    actions = decide([order(phase="active")], standing(record()), HOUSE)
    assert actions == [Renew(("lease_a", 1), 20.0), Steer(("lease_a", 1), None, None, "pem")]


@pytest.mark.parametrize(
    ("orders", "gone"),
    [([], True), ([order(phase="ended")], False), ([order("lease_b", phase="active", epoch=2)], True)],
)
def test_ended_missing_and_superseded_leases_are_stopped(orders: list[LeaseOrder], gone: bool) -> None:  # noqa: FBT001
    actions = decide(orders, standing(record()), HOUSE)
    assert actions[:2] == [Stop(("lease_a", 1), ExitCause.ORDERED), Release(("lease_a", 1), gone=gone)]


def test_answer_that_is_taken_twice_changes_nothing() -> None:
    orders = [order(phase="active"), order("lease_b", job_id="job_b", gpu_ids=("2",))]
    now = standing(record(), vetoed=frozenset({("lease_b", 1)}))
    first = decide(orders, now, HOUSE)
    assert first == decide([*orders, *orders], now, HOUSE)


def test_proposal_of_a_newer_epoch_leaves_the_running_one_alone() -> None:
    orders = [order(phase="active"), order("lease_b", epoch=2, gpu_ids=("2",))]
    actions = decide(orders, standing(record()), HOUSE)
    assert not any(isinstance(action, Stop) for action in actions)
    assert Confirm(orders[1]) in actions
    assert orders[1].phase is LeasePhase.PROPOSED
