"""Choose strategy, codec and period of a job from its links and step times: what `sync: auto` is, with a reason for each.

A pure rule over the closed form (`training.throughput`). It goes from the least lossy way to keep sites together to the most
compressed one and takes the first that leaves `target_utilisation` of the time to computing and stays within `max_egress_gb`.
Measured step times enter as the parts' `flops_per_s`, measured links as they are. The laboratory runs what it chooses
(`hansa lab compare --strategies auto`), and so does the market, whose compiled loops run the same arithmetic
(`training.sync_rule`) for every configuration that they look at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from training import sync_rule
from training.spec import SyncPlan, Workload
from training.sync_rule import PERIOD_STEPS_MAX, PERIOD_STEPS_OPEN, WAYS, Way
from training.throughput import CODEC_RATIOS, Links, SitePart, predict, resolve_sync, slowest_step_s, stall_s


@dataclass(frozen=True, slots=True)
class ChosenSync:
    """A plan without `auto`, the hub, and a sentence for each candidate that was weighed, the last for the one taken."""

    plan: SyncPlan
    hub_site: str
    utilisation: float
    egress_gb: float
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Situation:
    """What the choice is made for."""

    workload: Workload
    asked: SyncPlan
    parts: Sequence[SitePart]
    links: Links
    hub: str

    @property
    def steps(self) -> int:
        """The inner steps of the whole job."""
        return max(1, self.workload.samples // (self.workload.batch_per_gpu * sum(part.gpus for part in self.parts)))


def choose_sync(
    workload: Workload, asked: SyncPlan, parts: Sequence[SitePart], links: Links, listening: frozenset[str]
) -> ChosenSync | None:
    """Return the plan that suits several sites; None for one site, and where no hub can join them.

    A codec or strategy that the tenant names is kept, and so is a period: beside `auto` any but the default one.
    """
    resolved = resolve_sync(workload, asked, parts, links, listening) if len(parts) > 1 else None
    if resolved is None or resolved.hub_site is None:
        return None
    situation = _Situation(workload, asked, parts, links, resolved.hub_site)
    reasons, best = list[str](), list[ChosenSync]()
    for way in _candidates(asked):
        chosen = _weighed(way, situation)
        misses = _misses(chosen, asked)
        reasons.append(f"{chosen.reasons[0]}: {' and '.join(misses) or 'enough'}")
        best.append(chosen)
        if not misses:
            return _with(chosen, reasons)
    cap, least = asked.max_egress_gb or math.inf, best[0]
    for other in best[1:]:
        over_gb = max(other.egress_gb, cap)
        if sync_rule.comes_closer(over_gb, other.utilisation, max(least.egress_gb, cap), least.utilisation):
            least = other
    reasons.append(
        f"{least.plan.strategy} with {least.plan.codec} comes closest; a faster link or larger batches would help"
    )
    return _with(least, reasons)


def _with(chosen: ChosenSync, reasons: Sequence[str]) -> ChosenSync:
    return ChosenSync(chosen.plan, chosen.hub_site, chosen.utilisation, chosen.egress_gb, tuple(reasons))


def completed(asked: SyncPlan, way: Way, *, period: float, overlap: float) -> SyncPlan:
    """Return the tenant's plan with what was chosen for it."""
    fields = asked.model_dump(exclude={"strategy", "codec", "period_steps"})
    fields |= {"strategy": way.strategy, "codec": way.codec, "period_steps": int(period)}
    if way.strategy == "sparse":
        # The decayed carry takes momentum's part (arXiv 2508.15706).
        fields |= {"outer_learning_rate": 1.0, "outer_momentum": 0.0}
    if way.strategy == "streaming":
        fields["overlap_steps"] = int(overlap)
    return SyncPlan.model_validate(fields)


def _candidates(asked: SyncPlan) -> Iterator[Way]:
    """Yield what may be chosen, from the least lossy on."""
    found = False
    for way in WAYS:
        if asked.strategy not in {"auto", way.strategy} or (asked.merge == "trimmed_mean" and way.codec == "topk2"):
            continue
        found = True
        yield way if asked.codec == "auto" else way._replace(codec=asked.codec)
    if not found:
        # A strategy that is chosen by what it bears, not by its bytes: only its codec and period are open.
        for codec in ("int8", "int4", "topk2") if asked.codec == "auto" else (asked.codec,):
            yield Way(asked.strategy, codec, PERIOD_STEPS_MAX["diloco"])


def _weighed(way: Way, situation: _Situation) -> ChosenSync:
    """Return a way with the shortest period that leaves enough time to computing, or with its longest one."""
    asked, workload, parts = situation.asked, situation.workload, situation.parts
    groups = asked.fragments if way.strategy == "streaming" else 1
    step_s, round_s = slowest_step_s(workload, parts), _round_s(way, situation, groups)
    overlap = sync_rule.overlap_steps(round_s, step_s) if way.strategy == "streaming" else 0.0
    waits_s = stall_s(round_s, overlap * step_s)
    period = _period(way, situation, float(groups), waits_s / step_s)
    if way.strategy == "streaming":
        overlap = sync_rule.overlap_within(overlap, period, float(groups))
        waits_s = stall_s(round_s, overlap * step_s)
    plan = completed(asked, way, period=period, overlap=overlap)
    computing = sync_rule.utilisation(period, float(groups), step_s, waits_s)
    parameters, ratio = float(workload.parameters), CODEC_RATIOS[way.codec]
    egress_gb = sync_rule.sent_gb(float(situation.steps), period, parameters, ratio)
    said = (
        f"{way.strategy} with {way.codec} every {int(period)} steps of {step_s * 1000:.3g} ms: a round takes "
        f"{round_s * 1000:.3g} ms, {computing:.1%} of the time computes, a site sends {egress_gb:.3g} GB"
    )
    return ChosenSync(plan, situation.hub, computing, egress_gb, (said,))


def _round_s(way: Way, situation: _Situation, groups: int) -> float:
    """Return the seconds of one round, which carries one group of fragments."""
    asked, workload, parts, links = situation.asked, situation.workload, situation.parts, situation.links
    travelling = workload.model_copy(update={"parameters": math.ceil(workload.parameters / groups)})
    once = asked.model_copy(update={"strategy": "diloco", "codec": way.codec, "period_steps": 1})
    return predict(travelling, once, parts, links, situation.hub).inter_site_s


def _period(way: Way, situation: _Situation, groups: float, stall_steps: float) -> float:
    """Return H, a multiple of the groups: as stated, else the shortest that the target and the cap leave room for."""
    asked = situation.asked
    if way.strategy == "every_step":
        return 1.0
    if (
        asked.period_steps != PERIOD_STEPS_OPEN
        if asked.strategy == "auto"
        else "period_steps" in asked.model_fields_set
    ):
        return sync_rule.stated_period_steps(float(asked.period_steps), groups)
    steps, longest = float(situation.steps), float(way.period_steps_max)
    return sync_rule.period_steps(stall_steps, groups, asked.target_utilisation, longest, steps)


def _misses(chosen: ChosenSync, asked: SyncPlan) -> list[str]:
    """Return what speaks against a candidate; nothing where it will do."""
    found = []
    if chosen.utilisation < asked.target_utilisation:
        found.append(f"below the target of {asked.target_utilisation:.1%}")
    if asked.max_egress_gb is not None and chosen.egress_gb > asked.max_egress_gb:
        found.append(f"above the cap of {asked.max_egress_gb:g} GB")
    return found
