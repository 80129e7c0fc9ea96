"""Several strategies on one job: the same seed, the same samples, the same machine, one after the other.

Each run is a whole federation (`training.lab.federation`). What is compared is site-1's view of it: loss over samples, over the
bytes that its gateway's ranks posted and fetched, and over wall time. `training.lab.chart` draws it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import structlog

from training.jobfile import JobFile
from training.lab.errors import LabError
from training.lab.federation import RECORD_BYTES_MAX, Federation, read_rows, site_names
from training.lab.kills import Kill, progress_of
from training.lab.kills import check as check_kills
from training.lab.link import LinkSpec
from training.lab.wan import Wan
from training.spec import JobSpec, Strategy, SyncPlan
from training.sync_choice import ChosenSync, choose_sync
from training.throughput import AUTO_CODECS, Link, SitePart

STRATEGIES: Final[tuple[Strategy, ...]] = (
    "every_step",
    "diloco",
    "streaming",
    "sparse",
    "quorum",
    "neighbour",
    "async",
)
# Asked for by name only: what it runs is one of the above.
CHOSEN: Final[tuple[Strategy, ...]] = ("auto",)
# Of two processes on one machine, about.
_LOOPBACK: Final = Link(bandwidth_bits_per_s=10e9, delay_s=50e-6)
_NO_DIGEST: Final = "0" * 64
# A point of the loss on training batches is the mean of so many reports: single batches jump.
_SMOOTHED: Final = 5

log: Final = structlog.get_logger(__name__)

Progress = Callable[[Strategy, int], None]


@dataclass(frozen=True, slots=True)
class Point:
    """Where site-1 stood when it reported a loss."""

    samples: int
    payload_bytes: int
    seconds: float
    loss: float


@dataclass(frozen=True, slots=True)
class Network:
    """The emulated network of a run, and the bytes that site-1 put on its cable: headers and repetitions counted."""

    link: str
    congestion_control: str
    wire_bytes: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """One strategy's run. `held_out` says which loss the points are of: held out, or of training batches."""

    strategy: Strategy
    codec: str
    points: tuple[Point, ...]
    held_out: bool
    rounds: int
    payload_bytes: int
    ratio: float | None
    stall_s: float
    seconds: float
    network: Network | None = None
    # Why this plan, where `auto` was asked for: a sentence for each way that was weighed.
    reasons: tuple[str, ...] = ()

    @property
    def last_loss(self) -> float:
        """The last point's loss."""
        return self.points[-1].loss


def job_of(file: JobFile, samples: int | None) -> JobSpec:
    """Return the job of a file, with another number of samples where one is given. Raises SpecError."""
    spec = file.spec(_NO_DIGEST)
    if samples is None:
        return spec
    workload = spec.market.workload.model_copy(update={"samples": samples})
    return spec.model_copy(update={"market": spec.market.model_copy(update={"workload": workload})})


def plan_of(asked: SyncPlan, strategy: Strategy, sites: int) -> SyncPlan:
    """Return the job's plan under another strategy, with what that strategy needs in place of what it does not.

    Kept are the period, the patience and the outer step's numbers where the strategy has them.
    """
    fields: dict[str, Any] = {**asked.model_dump(exclude={"codec", "merge"}), "strategy": strategy}
    if strategy == asked.strategy:
        fields |= {"codec": asked.codec, "merge": asked.merge}
    if strategy == "every_step":
        fields.pop("period_steps")
    if strategy == "streaming":
        groups = max(1, min(asked.fragments, asked.period_steps))
        fields["fragments"] = groups
        fields["period_steps"] = asked.period_steps // groups * groups
        fields["overlap_steps"] = min(asked.overlap_steps, fields["period_steps"] // groups - 1)
    if strategy == "sparse":
        # The decayed carry takes momentum's part (arXiv 2508.15706).
        fields |= {"outer_learning_rate": 1.0, "outer_momentum": 0.0}
    if strategy == "async":
        # Twice the arrivals of a synchronous round: stale momentum diverges with fewer.
        fields["nesterov_delay"] = 2 * sites
    plan = SyncPlan.model_validate(fields)
    return plan.model_copy(update={"codec": AUTO_CODECS[0]}) if plan.codec == "auto" else plan


def auto_plan(spec: JobSpec, *, sites: int, ranks: int, link: LinkSpec | None) -> ChosenSync:
    """Return what the job's links and step times ask for, each choice with its reason, which is also logged.

    A step's time is the job file's `market.profile` where `hansa profile` has measured one, else the catalogue's. Without a `link`
    sites are as far apart as this machine's loopback. Raises LabError where there is one site, and so nothing to choose.
    """
    workload, names = spec.market.workload, site_names(sites)
    gpu_type = spec.resources.accelerators[0].gpu_type
    measured = [
        each.batch_per_gpu * workload.flops_per_sample / each.step_s
        for each in sorted(spec.market.profile, key=lambda each: abs(each.batch_per_gpu - workload.batch_per_gpu))
        if each.gpu_type == gpu_type
    ]
    parts = [SitePart(name, gpu_type, ranks, flops_per_s=measured[0] if measured else None) for name in names]
    apart = _LOOPBACK if link is None else Link(link.bandwidth_bits_per_s, link.delay_s, link.loss)
    links = {(one, other): apart for one in names for other in names if one != other}
    chosen = choose_sync(workload, spec.market.sync, parts, links, frozenset(names[:1]))
    if chosen is None:
        raise LabError("auto chooses how several sites keep together, and there is one; run two or more")
    for reason in chosen.reasons:
        log.info("sync_weighed", job=spec.name, step="measured" if measured else "catalogue", reason=reason)
    return chosen


def compare(
    spec: JobSpec,
    workdir: Path,
    strategies: Sequence[Strategy],
    *,
    sites: int,
    seed: int,
    progress: Progress,
    link: LinkSpec | None = None,
    ranks: int = 1,
    congestion_control: str | None = None,
    kills: Sequence[Kill] = (),
    record: Path | None = None,
    record_bytes_max: int = RECORD_BYTES_MAX,
) -> list[Outcome]:
    """Run the job under each strategy and return what came out, as the first site that was not killed saw it.

    One run's round log can be kept in the empty folder `record`, for `training.lab.replay`. A site has `ranks` ranks, and each run has a network of its own where `link` is given.
    There TCP's congestion control is the kernel's, or the one named. Raises LabError where a run fails, WanError where the
    network cannot be made.
    """
    assert record is None or len(strategies) == 1, "a record is of one run"
    check_kills(kills, site_names(sites))
    outcomes = []
    for strategy in strategies:
        chosen = auto_plan(spec, sites=sites, ranks=ranks, link=link) if strategy == "auto" else None
        plan = plan_of(spec.market.sync, strategy, sites) if chosen is None else chosen.plan
        with contextlib.ExitStack() as stack:
            wan = None if link is None else stack.enter_context(Wan(site_names(sites), link, seed=seed))
            if wan is not None and congestion_control is not None:
                wan.use_congestion_control(congestion_control)
            federation = stack.enter_context(
                Federation.of(
                    spec,
                    plan,
                    workdir,
                    sites=sites,
                    seed=seed,
                    wan=wan,
                    ranks=ranks,
                    record=record,
                    record_bytes_max=record_bytes_max,
                )
            )
            for done in progress_of(federation, kills):
                progress(strategy, done)
            federation.write_record(ended=True)
            witness = federation.living[0]
            rows = read_rows(witness.metrics)
            summary = json.loads((witness.folder / "output/summary.json").read_text())
            outcome = replace(outcome_of(strategy, rows, summary), reasons=() if chosen is None else chosen.reasons)
            if wan is not None:
                network = Network(str(link), wan.congestion_control(), wan.sent_bytes(witness.site_id))
                outcome = replace(outcome, network=network)
        outcomes.append(outcome)
    return outcomes


def outcome_of(strategy: Strategy, rows: Sequence[dict[str, Any]], summary: dict[str, Any]) -> Outcome:
    """Return a run's outcome from site-1's metrics rows and its summary. Raises LabError where no loss was reported."""
    held_out = any(row.get("held_out_loss") is not None for row in rows)
    name = "held_out_loss" if held_out else "loss"
    started_ms = int(rows[0]["time_ms"]) if rows else 0
    payload, points = 0, list[Point]()
    for row in rows:
        payload += int(row.get("bytes_posted") or 0) + int(row.get("bytes_fetched") or 0)
        if row.get(name) is not None:
            seconds = (int(row["time_ms"]) - started_ms) / 1000
            points.append(Point(int(row.get("samples_done") or 0), payload, seconds, float(row[name])))
    if not points:
        raise LabError("the script reported no loss; call session.report(loss=…) or session.report(held_out_loss=…)")
    return Outcome(
        strategy=strategy,
        codec=str(summary["codec"]),
        points=tuple(points if held_out else _smoothed(points)),
        held_out=held_out,
        rounds=int(summary["rounds"]),
        payload_bytes=int(summary["bytes_posted"]) + int(summary["bytes_fetched"]),
        ratio=summary["metrics"].get("ratio"),
        stall_s=float(summary["sync_s"]),
        seconds=(int(rows[-1]["time_ms"]) - started_ms) / 1000,
    )


def _smoothed(points: Sequence[Point]) -> list[Point]:
    smoothed = []
    for place, point in enumerate(points):
        window = points[max(0, place - _SMOOTHED + 1) : place + 1]
        mean = sum(each.loss for each in window) / len(window)
        smoothed.append(Point(point.samples, point.payload_bytes, point.seconds, mean))
    return smoothed


def as_json(outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes with all their points as JSON."""
    return json.dumps([asdict(each) for each in outcomes], indent=1)


def as_document(outcome: Outcome) -> dict[str, Any]:
    """Return one outcome with all its points, as JSON takes it."""
    return {**asdict(outcome), "last_loss": outcome.last_loss}


def thinned(points: Sequence[Point], count: int) -> list[Point]:
    """Return at most `count` of the points, evenly spread, the first and the last among them."""
    if len(points) <= count:
        return list(points)
    return [points[round(place * (len(points) - 1) / (count - 1))] for place in range(count)]
