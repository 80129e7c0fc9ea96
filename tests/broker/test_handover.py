"""Which sites of a running job stay, leave and join."""

from __future__ import annotations

import pytest

from broker.allocation.configuration import Configuration, Part
from broker.handover import plan_handover, promised_gpus
from training.spec import SyncPlan


def configuration(parts: dict[str, int], strategy: str = "diloco", period: int = 20) -> Configuration:
    return Configuration(
        parts=tuple(
            Part(pool_id=f"{site}/cpu-slot", site_id=site, gpu_type="cpu-slot", gpus=gpus)
            for site, gpus in sorted(parts.items())
        ),
        sync=SyncPlan.model_validate({"strategy": strategy, "codec": "int8", "period_steps": period}),
        hub_site=min(parts),
        samples_per_s=1.0,
        compute_s=1.0,
        intra_site_s=0.0,
        inter_site_s=0.0,
        step_s=1.0,
    )


NOW = configuration({"ada": 1, "bob": 1})


def test_where_one_site_changes_the_others_go_on_and_its_successor_is_its_heir() -> None:
    plan = plan_handover(NOW, configuration({"ada": 1, "cid": 1}), listening={"ada"}, former={"ada", "bob"})
    assert (plan.in_place, plan.leaving, plan.heirs) == (True, ("bob",), {"cid": "bob"})
    assert [part.site_id for part in plan.joining] == ["cid"]
    assert promised_gpus(NOW, plan) == {"cid/cpu-slot": 1}


def test_a_gang_grows_without_anyone_leaving_and_shrinks_without_anyone_joining() -> None:
    more = plan_handover(NOW, configuration({"ada": 1, "bob": 1, "cid": 2}), listening={"ada"}, former={"ada", "bob"})
    assert (more.in_place, more.leaving, more.heirs) == (True, (), {})
    fewer = plan_handover(configuration({"ada": 1, "bob": 1, "cid": 2}), NOW, listening=(), former={"ada", "bob"})
    assert (fewer.in_place, fewer.leaving, fewer.joining) == (True, ("cid",), ())


@pytest.mark.parametrize(
    ("then", "listening", "former"),
    [
        (configuration({"ada": 2, "bob": 2}), {"ada"}, set()),  # nobody stays as it is
        (configuration({"ada": 1, "cid": 1}, period=40), {"ada"}, set()),  # the period is fixed while they train
        (configuration({"ada": 1, "cid": 1}, strategy="streaming"), {"ada"}, set()),
        (configuration({"ada": 1, "cid": 1}), {"bob"}, set()),  # nobody who stays could be joined
        (configuration({"ada": 1, "cid": 1}), {"ada"}, {"cid"}),  # cid was in this placement before
        (configuration({"ada": 1, "bob": 2}), {"ada"}, {"ada", "bob"}),
    ],
)
def test_otherwise_all_stop_after_one_round(then: Configuration, listening: set[str], former: set[str]) -> None:
    plan = plan_handover(NOW, then, listening=listening, former=former)
    assert (plan.in_place, plan.leaving, plan.joining) == (False, ("ada", "bob"), then.parts)


def test_a_site_that_grows_needs_only_what_it_has_not_got() -> None:
    alone = configuration({"ada": 1}, strategy="local")
    plan = plan_handover(alone, configuration({"ada": 3}, strategy="local"), listening={"ada"}, former={"ada"})
    assert (plan.in_place, plan.heirs) == (False, {})
    assert promised_gpus(alone, plan) == {"ada/cpu-slot": 2}


def test_a_hold_too_small_for_two_terms_at_once_moves_its_job_whole() -> None:
    then = configuration({"ada": 1, "cid": 1})
    plan = plan_handover(NOW, then, listening={"ada"}, former={"ada", "bob"}, may_stay=False)
    assert (plan.in_place, plan.leaving) == (False, ("ada", "bob"))
