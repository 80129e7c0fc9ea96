"""How fast a job would run: a prediction in closed form, without torch and without I/O.

An inner step of a job on several sites costs, in seconds,

    step = max over sites (compute + intra-site all-reduce) + inter-site sync / H

with H the inner steps between two sync rounds. A site of n GPUs all-reduces its fp32 gradients in
a ring, so each GPU moves 2 (n - 1) / n x 4 x parameters bytes. A sync round goes through a hub:
every other site sends its compressed contribution and receives those of all others. The slowest
site paces the job, since the merge waits for all.

The broker prices configurations with `predict`, and `resolve_sync` turns `auto` into a plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from training.catalogue import GPU_TYPES
from training.spec import SyncPlan, Workload

BYTES_PER_PARAMETER: Final = 4
# How many times smaller than fp32 a contribution is on the wire.
#   fp32   the parameters themselves
#   int8   one byte per parameter and one fp32 scale per block of 512: 4 / (1 + 4 / 512) = 3.97
#   topk2  1 in 64 values, sign and one of two magnitudes, all coded arithmetically (SparseLoCo, arXiv 2508.15706): 229 as
#          payload, 207 once headers, framing and acknowledgements are counted, measured on contributions of 105 MB of fp32
#          (`make bench-training ONLY=T1`, 2026-11-21)
#   bf16, int4, fp4, sign: 16, 4, 4 and 1 bits, with one fp32 scale per block of 256 (4 bits) or 1,024 (1 bit)
#   lowrank depends on the model's matrices; 30 is a transformer of width 256, wider ones gain more
CODEC_RATIOS: Final[dict[str, float]] = {
    "fp32": 1.0,
    "int8": 3.97,
    "topk2": 207.0,
    "bf16": 2.0,
    "int4": 7.75,
    "fp4": 7.75,
    "sign": 31.0,
    "lowrank": 30.0,
}
# From the least to the most lossy: `auto` takes the first whose sync is cheap enough. fp32 is
# left out: int8 with its carry trains as well at a quarter of the traffic.
AUTO_CODECS: Final = ("int8", "topk2")
# A codec is cheap enough where its sync takes at most this share of the H inner steps before it.
SYNC_SHARE_MAX: Final = 0.10
# What a well-filled link carries of its bandwidth after headers, acknowledgements and recovery.
LINK_EFFICIENCY: Final = 0.9
# One sync round asks, sends, is sealed and fetches: two round trips to the hub.
ROUND_TRIPS_PER_SYNC: Final = 2
# Each of the 2 (n - 1) messages of a ring waits once for its neighbour; of the order of what NCCL
# and Gloo show between two hosts of one datacenter.
RING_HOP_S: Final = 20e-6


@dataclass(frozen=True, slots=True)
class SitePart:
    """The GPUs of one site in a configuration.

    `flops_per_s` is what one GPU achieves, measured; None takes the catalogue's peak times its
    prior share. `intra_site_bits_per_s` is the ring's bandwidth; None takes the catalogue's.
    """

    site_id: str
    gpu_type: str
    gpus: int
    flops_per_s: float | None = None
    intra_site_bits_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Link:
    """A directed link between two sites; `delay_s` is one way."""

    bandwidth_bits_per_s: float
    delay_s: float
    loss: float = 0.0
    egress_price_micros_per_gb: int = 0


@dataclass(frozen=True, slots=True)
class LinkTraffic:
    """What the job sends over one directed link, averaged over time."""

    from_site: str
    to_site: str
    bytes_per_s: float
    egress_micros_per_hour: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """The speed of a configuration; times are of one inner step, `inter_site_s` its share of a sync."""

    samples_per_s: float
    compute_s: float
    intra_site_s: float
    inter_site_s: float
    step_s: float
    bytes_per_s_between_sites: float
    traffic: tuple[LinkTraffic, ...]


@dataclass(frozen=True, slots=True)
class ResolvedSync:
    """A sync plan without `auto`, the hub it goes through, and why, in a sentence."""

    plan: SyncPlan
    hub_site: str | None
    reason: str


Links = Mapping[tuple[str, str], Link]


def predict(
    workload: Workload,
    sync: SyncPlan,
    parts: Sequence[SitePart],
    links: Links,
    hub_site: str | None = None,
    *,
    overlapped: bool = False,
) -> Prediction:
    """Return the predicted speed of `parts` under a resolved `sync` plan.

    With `overlapped` a streaming plan's rounds, each of one group of fragments, take their time beside its `overlap_steps` inner
    steps, and only what is longer is waited for; else all plans wait for whole rounds. Several sites need `hub_site` to be one of them and links both ways between it and each other
    site; ValueError says which is missing.
    """
    step_alone_s, compute_s, intra_site_s = max(_step_alone_s(workload, part) for part in parts)
    inter_site_s = 0.0
    traffic_bytes: dict[tuple[str, str], float] = {}
    if len(parts) > 1:
        if hub_site is None or "auto" in (sync.strategy, sync.codec):
            message = "several sites need a hub and a resolved sync plan: call resolve_sync first"
            raise ValueError(message)
        groups, overlap_s = 1, 0.0
        if overlapped and sync.strategy == "streaming":
            groups, overlap_s = sync.fragments, sync.overlap_steps * step_alone_s
        sync_s, traffic_bytes = _sync_round(
            workload, sync, [part.site_id for part in parts], links, hub_site, groups=groups
        )
        inter_site_s = stall_s(sync_s, overlap_s) * groups / sync.period_steps
    step_s = step_alone_s + inter_site_s
    traffic = tuple(
        _traffic(pair, size_bytes / (step_s * sync.period_steps), links[pair])
        for pair, size_bytes in sorted(traffic_bytes.items())
    )
    return Prediction(
        samples_per_s=workload.batch_per_gpu * sum(part.gpus for part in parts) / step_s,
        compute_s=compute_s,
        intra_site_s=intra_site_s,
        inter_site_s=inter_site_s,
        step_s=step_s,
        bytes_per_s_between_sites=sum(row.bytes_per_s for row in traffic),
        traffic=traffic,
    )


def resolve_sync(
    workload: Workload, plan: SyncPlan, parts: Sequence[SitePart], links: Links, listening: frozenset[str]
) -> ResolvedSync | None:
    """Return the plan that `auto` stands for on these sites; None where no hub can join them.

    One site trains locally. Several use the plan's strategy, else diloco, through the listening site that makes the sync
    round shortest (ties: the first by name), with the least lossy codec whose sync takes at most
    a tenth of the inner steps before it, else the most compressed one.
    """
    if len(parts) == 1:
        if plan.strategy == "diloco":
            alone = "fp32" if plan.codec == "auto" else plan.codec
            reason = "the plan asks for diloco; on one site a contribution never crosses a link"
            return ResolvedSync(plan.model_copy(update={"codec": alone}), None, reason)
        resolved = plan.model_copy(update={"strategy": "local", "codec": "fp32"})
        return ResolvedSync(resolved, None, "one site needs no synchronisation between sites")
    if plan.strategy == "local":
        return None
    hubs = _hubs([part.site_id for part in parts], links, listening)
    if not hubs:
        return None
    steps_s = plan.period_steps * max(_step_alone_s(workload, part) for part in parts)[0]
    sites = [part.site_id for part in parts]
    codecs: tuple[str, ...] = AUTO_CODECS if plan.codec == "auto" else (plan.codec,)
    for codec in codecs:
        resolved = plan.model_copy(update={"strategy": plan.between_sites, "codec": codec})
        sync_s, hub = min((_sync_round(workload, resolved, sites, links, hub)[0], hub) for hub in hubs)
        share = sync_s / steps_s
        if share <= SYNC_SHARE_MAX:
            break
    return ResolvedSync(resolved, hub, _reason(plan, codec, share, hub))


def _reason(plan: SyncPlan, codec: str, share: float, hub: str) -> str:
    takes = f"a sync round through {hub} takes {share:.1%} of the {plan.period_steps} inner steps before it"
    if plan.codec != "auto":
        return f"{codec} as the plan asks: {takes}"
    if share <= SYNC_SHARE_MAX:
        return f"{codec} is the least lossy codec within {SYNC_SHARE_MAX:.0%}: {takes}"
    return f"{codec} is the most compressed codec, yet {takes}: a longer period or a faster link would help"


def _hubs(sites: Sequence[str], links: Links, listening: frozenset[str]) -> list[str]:
    return [
        hub
        for hub in sorted(sites)
        if hub in listening and all((hub, site) in links and (site, hub) in links for site in sites if site != hub)
    ]


def slowest_step_s(workload: Workload, parts: Sequence[SitePart]) -> float:
    """Return the seconds of an inner step that waits for no other site: the slowest part's."""
    return max(_step_alone_s(workload, part)[0] for part in parts)


def _step_alone_s(workload: Workload, part: SitePart) -> tuple[float, float, float]:
    """Return one site's inner step and its two parts: compute, all-reduce."""
    gpu = GPU_TYPES[part.gpu_type]
    flops_per_s = part.flops_per_s or gpu.peak_flops_per_s * gpu.achieved_share
    bits_per_s = part.intra_site_bits_per_s or gpu.intra_site_bits_per_s
    computing_s = compute_s(float(workload.batch_per_gpu), workload.flops_per_sample, flops_per_s)
    reducing_s = all_reduce_s(float(workload.parameters), part.gpus, bits_per_s)
    return computing_s + reducing_s, computing_s, reducing_s


def _sync_round(
    workload: Workload, sync: SyncPlan, sites: Sequence[str], links: Links, hub: str, *, groups: int = 1
) -> tuple[float, dict[tuple[str, str], float]]:
    """Return the seconds of one sync round, of one of `groups`, and the bytes that each link carries in all of them."""
    contribution_bytes = contribution_size_bytes(float(-(-workload.parameters // groups)), CODEC_RATIOS[sync.codec])
    slowest_s = 0.0
    traffic_bytes: dict[tuple[str, str], float] = {}
    for site in sites:
        if site == hub:
            continue
        try:
            up, down = links[site, hub], links[hub, site]
        except KeyError:
            message = f"no link both ways between {site} and the hub {hub}: choose another hub or probe the link"
            raise ValueError(message) from None
        fetched_bytes = contribution_bytes * (len(sites) - 1)
        traffic_bytes[site, hub] = contribution_bytes * groups
        traffic_bytes[hub, site] = contribution_bytes * groups * (len(sites) - 1)
        transfer_s = link_transfer_s(contribution_bytes, up.bandwidth_bits_per_s, up.loss) + link_transfer_s(
            fetched_bytes, down.bandwidth_bits_per_s, down.loss
        )
        slowest_s = max(slowest_s, transfer_s + ROUND_TRIPS_PER_SYNC * (up.delay_s + down.delay_s))
    return slowest_s, traffic_bytes


# The closed form itself, in plain floats without objects, so that the market's compiled loops run
# these same lines and get the same bits.


def compute_s(batch_per_gpu: float, flops_per_sample: float, flops_per_s: float) -> float:
    """Return the seconds that one GPU computes for its share of an inner step."""
    return batch_per_gpu * flops_per_sample / flops_per_s


def all_reduce_s(parameters: float, gpus: int, bits_per_s: float) -> float:
    """Return the seconds of a ring all-reduce of fp32 gradients over the GPUs of one site."""
    ring_bytes = 2 * (gpus - 1) / gpus * BYTES_PER_PARAMETER * parameters
    return ring_bytes * 8 / bits_per_s + 2 * (gpus - 1) * RING_HOP_S


def contribution_size_bytes(parameters: float, codec_ratio: float) -> float:
    """Return the bytes of one site's contribution to a sync round."""
    return parameters * BYTES_PER_PARAMETER / codec_ratio


def link_transfer_s(size_bytes: float, bandwidth_bits_per_s: float, loss: float) -> float:
    """Return the seconds that a link takes to carry `size_bytes`, delay not counted."""
    return size_bytes * 8 / (bandwidth_bits_per_s * LINK_EFFICIENCY * (1 - loss))


def stall_s(round_s: float, overlap_s: float) -> float:
    """Return the seconds of a sync round that nothing is computed beside."""
    return max(0.0, round_s - overlap_s)


def _traffic(pair: tuple[str, str], bytes_per_s: float, link: Link) -> LinkTraffic:
    egress_micros_per_hour = bytes_per_s * 3600 / 1e9 * link.egress_price_micros_per_gb
    return LinkTraffic(pair[0], pair[1], bytes_per_s, egress_micros_per_hour)
