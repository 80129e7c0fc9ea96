"""The decision of a move: which sites of a running job stay, leave and join, and whose place each takes.

Pure. A round says what a job should have instead of what it has; `broker.moves` carries that out. A job's other
sites go on where they can: the one that changes leaves by a new view, and its successor joins the running log.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from broker.allocation.configuration import Configuration, Part


@dataclass(frozen=True, slots=True)
class Handover:
    """How a job comes from one configuration to another; `heirs` maps a joining site to the one that it follows.

    `in_place`: the other sites train on. Otherwise all sites stop after the same round and the job goes on from there.
    """

    in_place: bool
    leaving: tuple[str, ...]
    joining: tuple[Part, ...]
    heirs: dict[str, str]


def plan_handover(
    now: Configuration,
    then: Configuration,
    *,
    listening: Collection[str],
    former: Collection[str],
    may_stay: bool = True,
) -> Handover:
    """Return how a job that has `now` comes to have `then`; in place only where it `may_stay`.

    `listening` are its sites whose gateways accept connections, `former` all that ever were in its placement.
    """
    staying = [part for part in now.parts if part in then.parts]
    joining = tuple(part for part in then.parts if part not in staying)
    new, old = {part.site_id for part in joining}, {part.site_id for part in now.parts if part not in staying}
    heirs = dict(zip(sorted(new - set(now.site_ids)), sorted(old - set(then.site_ids)), strict=False))
    in_place = (
        bool(staying)
        and may_stay
        and _same_rounds(now, then)
        # Its certificate and its part in the log are of one epoch: a site comes back under a placement of its own.
        and new.isdisjoint(former)
        # Whoever joins fetches the log and its state from a site that stays.
        and (not joining or any(part.site_id in listening for part in staying))
    )
    if in_place:
        return Handover(in_place=True, leaving=tuple(sorted(old)), joining=joining, heirs=heirs)
    return Handover(in_place=False, leaving=now.site_ids, joining=then.parts, heirs=heirs)


def promised_gpus(now: Configuration, handover: Handover) -> dict[str, int]:
    """Return by pool how many GPUs must stay free for those that join, beside the ones that are given up for it."""
    given = {part.pool_id: part.gpus for part in now.parts if part.site_id in handover.leaving}
    wanted = {part.pool_id: part.gpus - given.get(part.pool_id, 0) for part in handover.joining}
    return {pool_id: gpus for pool_id, gpus in wanted.items() if gpus > 0}


def _same_rounds(now: Configuration, then: Configuration) -> bool:
    """Say whether both synchronise alike: a strategy and its period are fixed while a job's sites train.

    A codec may differ, since each payload names its own; `local` has no others to synchronise with.
    """
    return now.sync.strategy != "local" and (now.sync.strategy, now.sync.period_steps) == (
        then.sync.strategy,
        then.sync.period_steps,
    )
