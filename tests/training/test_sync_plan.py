from __future__ import annotations

import pytest
from pydantic import ValidationError

from training.ranks import group_timeout
from training.spec import SyncPlan


def plan(**settings: object) -> SyncPlan:
    return SyncPlan.model_validate(settings)


def test_every_timeout_follows_from_patience_in_order() -> None:
    for patience_s in (1.0, 60.0, 3600.0):
        grace_s = plan(patience_s=patience_s).grace_s
        assert grace_s < patience_s < group_timeout(patience_s).total_seconds()
    assert plan().grace_s == 1.0


@pytest.mark.parametrize(
    ("settings", "sites", "expected"),
    [
        ({"strategy": "diloco"}, 5, 5),
        ({"strategy": "quorum"}, 5, 3),
        ({"strategy": "quorum"}, 2, 2),
        ({"strategy": "quorum", "quorum_sites": 4}, 3, 3),
        ({"strategy": "quorum", "quorum_sites": 1}, 3, 1),
        ({"strategy": "async"}, 4, 1),
        ({"strategy": "neighbour"}, 4, 4),
    ],
)
def test_a_strategy_says_how_many_sites_seal_a_round(settings: dict[str, object], sites: int, expected: int) -> None:
    assert plan(**settings).quorum_of(sites) == expected


def test_what_the_market_does_not_weigh_stays_as_the_tenant_wrote_it() -> None:
    asked = plan(strategy="streaming", fragments=2, overlap_steps=3, mixing=0.5, max_egress_gb=4)
    sold = plan(strategy="streaming", codec="int8", period_steps=20)
    placed = asked.placed(sold)
    assert (placed.fragments, placed.overlap_steps, placed.mixing, placed.max_egress_gb) == (2, 3, 0.5, 4)
    assert placed.codec == "int8"
    assert placed.round_steps == 10


def test_what_the_market_chose_for_an_open_plan_is_taken_whole() -> None:
    asked = plan(outer_momentum=0.9, max_egress_gb=4, fragments=2)
    sold = plan(strategy="sparse", codec="topk2", period_steps=40, outer_momentum=0.0, outer_learning_rate=1.0)
    placed = asked.placed(sold)
    assert (placed.strategy, placed.codec, placed.period_steps) == ("sparse", "topk2", 40)
    assert (placed.outer_momentum, placed.outer_learning_rate) == (0.0, 1.0)
    assert (placed.max_egress_gb, placed.fragments) == (4, 2)
    streaming = asked.placed(plan(strategy="streaming", period_steps=20, fragments=2, overlap_steps=5))
    assert streaming.overlap_steps == 5


def test_every_step_has_no_period() -> None:
    assert plan(strategy="every_step").period_steps == 1
    with pytest.raises(ValidationError, match="leave period_steps out"):
        plan(strategy="every_step", period_steps=20)
