"""Choose strategy, codec and period of a job from its links and step times: what `sync: auto` could be, with a reason for each.

A pure rule over the closed form (`training.throughput`). It goes from the least lossy way to keep sites together to the most
compressed one and takes the first that leaves `target_utilisation` of the time to computing and stays within `max_egress_gb`.
Measured step times enter as the parts' `flops_per_s`, measured links as they are. The laboratory runs what it chooses
(`hansa lab compare --strategies auto`); the market still resolves `auto` by `throughput.resolve_sync`, whose prices its compiled
loops know.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from training.spec import Codec, Strategy, SyncPlan, Workload
from training.throughput import (
    BYTES_PER_PARAMETER,
    CODEC_RATIOS,
    Links,
    SitePart,
    predict,
    resolve_sync,
)

# A longer period costs loss: DiLoCo's and Streaming DiLoCo's figures hold to 100 steps (arXiv 2501.18512, Table 5), SparseLoCo's
# carry wants 15 to 50 (arXiv 2508.15706); DiLoCo's own 500 is the last resort.
PERIOD_STEPS_MAX: Final[dict[str, int]] = {"diloco": 100, "streaming": 100, "sparse": 50}
PERIOD_STEPS_LAST: Final = 500
# Below it a period's fixed costs (encoding, one merge on the host) begin to show.
PERIOD_STEPS_MIN: Final = 5
# Fewer rounds leave much of a sparse codec's carry unsent, and give momentum nothing to build on.
ROUNDS_MIN: Final = 10
# Up to five steps of overlap cost no measurable loss (arXiv 2501.18512, 3.3.2).
OVERLAP_STEPS_MAX: Final = 5
_BYTES_PER_GB: Final = 1e9


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


@dataclass(frozen=True, slots=True)
class _Candidate:
    strategy: Strategy
    codec: Codec
    period_steps_max: int


def choose_sync(
    workload: Workload, asked: SyncPlan, parts: Sequence[SitePart], links: Links, listening: frozenset[str]
) -> ChosenSync | None:
    """Return the plan that suits several sites; None for one site, and where no hub can join them.

    A codec or strategy that the tenant names is kept, and so is a period that the plan states; only what is left open is chosen.
    """
    resolved = resolve_sync(workload, asked, parts, links, listening) if len(parts) > 1 else None
    if resolved is None or resolved.hub_site is None:
        return None
    situation = _Situation(workload, asked, parts, links, resolved.hub_site)
    reasons, best = list[str](), list[ChosenSync]()
    for candidate in _candidates(asked):
        chosen = _weighed(candidate, situation)
        misses = _misses(chosen, asked)
        reasons.append(f"{chosen.reasons[0]}: {' and '.join(misses) or 'enough'}")
        best.append(chosen)
        if not misses:
            return _with(chosen, reasons)
    # None will do. The cap on egress is the tenant's money, so it goes before utilisation.
    cap = asked.max_egress_gb or math.inf
    least = min(best, key=lambda each: (max(each.egress_gb, cap), -each.utilisation))
    reasons.append(
        f"{least.plan.strategy} with {least.plan.codec} comes closest; a faster link or larger batches would help"
    )
    return _with(least, reasons)


def _with(chosen: ChosenSync, reasons: Sequence[str]) -> ChosenSync:
    return ChosenSync(chosen.plan, chosen.hub_site, chosen.utilisation, chosen.egress_gb, tuple(reasons))


def _candidates(asked: SyncPlan) -> Iterator[_Candidate]:
    """Yield what may be chosen, from the least lossy on."""
    ways: list[tuple[Strategy, Codec, int]] = [
        ("every_step", "fp32", 1),
        ("diloco", "int8", PERIOD_STEPS_MAX["diloco"]),
        ("streaming", "int4", PERIOD_STEPS_MAX["streaming"]),
        ("sparse", "topk2", PERIOD_STEPS_MAX["sparse"]),
        ("sparse", "topk2", PERIOD_STEPS_LAST),
    ]
    found = set[_Candidate]()
    for strategy, codec, longest in ways:
        if asked.strategy not in {"auto", strategy} or (asked.merge == "trimmed_mean" and codec == "topk2"):
            continue
        candidate = _Candidate(strategy, codec if asked.codec == "auto" else asked.codec, longest)
        if candidate not in found:
            found.add(candidate)
            yield candidate
    if not found:
        # A strategy that is chosen by what it bears, not by its bytes: only its codec and period are open.
        for codec in ("int8", "int4", "topk2") if asked.codec == "auto" else (asked.codec,):
            yield _Candidate(asked.strategy, codec, PERIOD_STEPS_MAX["diloco"])


def _weighed(candidate: _Candidate, situation: _Situation) -> ChosenSync:
    """Return a candidate with the shortest period that leaves enough time to computing, or with its longest one."""
    asked, workload = situation.asked, situation.workload
    fields = asked.model_dump(include=asked.model_fields_set - {"strategy", "codec", "period_steps"})
    fields |= {"strategy": candidate.strategy, "codec": candidate.codec}
    groups = asked.fragments if candidate.strategy == "streaming" else 1
    if candidate.strategy == "sparse":
        # The decayed carry takes momentum's part (arXiv 2508.15706).
        fields |= {"outer_learning_rate": 1.0, "outer_momentum": 0.0}
    round_s, step_s = _times(candidate, situation, groups)
    overlap_s = 0.0
    if candidate.strategy == "streaming":
        overlap = min(OVERLAP_STEPS_MAX, max(1, math.ceil(round_s / step_s)))
        overlap_s, fields["overlap_steps"] = overlap * step_s, overlap
    stall_s = max(0.0, round_s - overlap_s)
    period = _period(candidate, situation, groups, stall_s / step_s)
    if candidate.strategy != "every_step":
        fields["period_steps"] = period
    plan = SyncPlan.model_validate(fields)
    utilisation = period * step_s / (period * step_s + stall_s * groups)
    sent_bytes = situation.steps / period * workload.parameters * BYTES_PER_PARAMETER / CODEC_RATIOS[candidate.codec]
    egress_gb = sent_bytes / _BYTES_PER_GB
    said = (
        f"{candidate.strategy} with {candidate.codec} every {period} steps of {step_s * 1000:.3g} ms: a round takes "
        f"{round_s * 1000:.3g} ms, {utilisation:.1%} of the time computes, a site sends {egress_gb:.3g} GB"
    )
    return ChosenSync(plan, situation.hub, utilisation, egress_gb, (said,))


def _times(candidate: _Candidate, situation: _Situation, groups: int) -> tuple[float, float]:
    """Return the seconds of one round, which carries one group of fragments, and of one inner step without it."""
    asked, workload, parts, links = situation.asked, situation.workload, situation.parts, situation.links
    travelling = workload.model_copy(update={"parameters": math.ceil(workload.parameters / groups)})
    once = asked.model_copy(update={"strategy": "diloco", "codec": candidate.codec, "period_steps": 1})
    round_s = predict(travelling, once, parts, links, situation.hub).inter_site_s
    whole = predict(workload, once, parts, links, situation.hub)
    return round_s, whole.step_s - whole.inter_site_s


def _period(candidate: _Candidate, situation: _Situation, groups: int, stall_steps: float) -> int:
    """Return H, a multiple of the groups: as stated, else the shortest that the target and the cap leave room for."""
    asked = situation.asked
    if candidate.strategy == "every_step":
        return 1
    if "period_steps" in asked.model_fields_set:
        return max(groups, asked.period_steps // groups * groups)
    target = asked.target_utilisation
    wanted = stall_steps * groups * target / (1 - target)
    longest = min(candidate.period_steps_max, max(1, situation.steps // ROUNDS_MIN))
    shortest = max(PERIOD_STEPS_MIN, OVERLAP_STEPS_MAX * groups + groups if groups > 1 else 1)
    return math.ceil(max(1, min(longest, max(wanted, shortest))) / groups) * groups


def _misses(chosen: ChosenSync, asked: SyncPlan) -> list[str]:
    """Return what speaks against a candidate; nothing where it will do."""
    found = []
    if chosen.utilisation < asked.target_utilisation:
        found.append(f"below the target of {asked.target_utilisation:.1%}")
    if asked.max_egress_gb is not None and chosen.egress_gb > asked.max_egress_gb:
        found.append(f"above the cap of {asked.max_egress_gb:g} GB")
    return found
