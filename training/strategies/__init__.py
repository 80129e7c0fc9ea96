"""Strategies: what sites exchange, when, and how they merge it. Each is a policy on the one round log.

A strategy decides on values and touches neither network nor model: `training.outer_share` reads and writes the
model for it, `training.synchronizer` speaks to the log. Whatever of it is outer state must come out alike, to the
bit, at every site, so merges are elementwise numpy with one rounding each (`training.merge`).
"""

from __future__ import annotations

from training.attempt import LinkSpeed
from training.outer import outer_rule
from training.spec import SyncPlan
from training.strategies.delayed_nesterov import DelayedNesterov
from training.strategies.diloco import Diloco
from training.strategies.every_step import EveryStep
from training.strategies.neighbour import Neighbour
from training.strategies.policy import Strategy
from training.strategies.quorum import Quorum
from training.strategies.streaming import Streaming

__all__ = ["Strategy", "strategy_of"]


def strategy_of(plan: SyncPlan, site_id: str, links: tuple[LinkSpeed, ...] = ()) -> Strategy:
    """Return what a resolved `plan` means at `site_id`. `sparse` is diloco with its codec and a plain outer step."""
    rule = outer_rule(plan)
    match plan.strategy:
        case "every_step":
            return EveryStep(merge=plan.merge)
        case "streaming":
            return Streaming(
                rule, groups=plan.fragments, overlap_steps=plan.overlap_steps, mixing=plan.mixing, merge=plan.merge
            )
        case "quorum":
            return Quorum(rule)
        case "neighbour":
            return Neighbour(site_id, plan.topology, plan.codec, links)
        case "async":
            return DelayedNesterov(rule, delay=plan.nesterov_delay)
        case _:
            return Diloco(rule, merge=plan.merge)
