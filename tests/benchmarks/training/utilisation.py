"""T4: the share of time in which the sites compute, on a link that a contribution fills for a fifth of it.

100 Mbit/s, 50 ms one way, 0.1 % of packets lost, cubic (or reno, which loss slows as much, where the kernel withholds it). The model and the text are real; a step's pace is set, so that one
contribution of all parameters takes at link rate the stated share of the H steps before it, and the processor is free
meanwhile for what runs beside a GPU: gateways, encoding, merging. Useful is the wall time less what the session reports as stall
(encoding, posting, waiting, merging), from the end of the first block to the end of the last: a job has thousands of blocks, and
one wait for what is still in flight at its end. Where a busy machine
makes steps slower than their pace, the transfer's share of them falls, and below a fifth the figure says nothing about the target.
Plain DDP runs on the same link at the same pace; its all-reduce may hide behind the whole step.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.benchmarks.market.figures import Figure, verdict
from tests.benchmarks.training.jobs import (
    WORKDIR,
    Size,
    await_end,
    job,
    plain_ddp,
    rounds,
    summary,
    use_congestion_control,
)
from training.codecs import CODECS
from training.lab.federation import Federation, site_names
from training.lab.link import LinkSpec
from training.lab.wan import Wan
from training.spec import Codec

LINK: Final = LinkSpec.parse("100mbit,50ms,0.1%")
CONTROL: Final = "cubic"
# A transfer's share of the H steps' time, at link rate; T4 asks for at least a fifth.
TRANSFER_SHARE: Final = 0.21
_SHARE_MIN: Final = 0.2
USEFUL_TARGET: Final = 0.95
SITES: Final = 2
SIZE: Final = Size(width=256, layers=5, context=8)


@dataclass(frozen=True, slots=True)
class Case:
    """One point of the curve: a strategy, its codec and H."""

    strategy: str
    codec: Codec
    period_steps: int
    fragments: int = 1
    overlap_steps: int = 0

    @property
    def name(self) -> str:
        """What the chart's legend says."""
        overlapped = f", {self.fragments} groups in flight for {self.overlap_steps} steps" if self.overlap_steps else ""
        return f"{self.strategy} {self.codec}{overlapped}"


@dataclass(frozen=True, slots=True)
class Use:
    """The share of useful time, and of what."""

    case: Case
    pace_s: float
    step_s: float
    useful: float
    late_steps: int
    steps: int
    control: str


def contribution_bytes(codec: Codec) -> int:
    """Return the most bytes of a contribution of all parameters."""
    return CODECS[codec].size_bytes_max(SIZE.parameters)


def step_s(case: Case) -> float:
    """Return the pace at which a transfer at link rate takes TRANSFER_SHARE of H steps."""
    transfer_s = contribution_bytes(case.codec) * 8 / LINK.bandwidth_bits_per_s
    return transfer_s / TRANSFER_SHARE / case.period_steps


def use(case: Case, *, blocks: int, connections: int = 16, pace_s: float | None = None) -> Use:
    """Run a job of so many blocks of H steps and return the share of useful time."""
    pace = pace_s or step_s(case)
    plan = {"strategy": case.strategy, "codec": case.codec, "period_steps": case.period_steps, "patience_s": 300}
    if case.strategy == "streaming":
        plan |= {"fragments": case.fragments, "overlap_steps": case.overlap_steps}
    samples = SITES * blocks * case.period_steps * SIZE.batch
    with tempfile.TemporaryDirectory() as folder, Wan(site_names(SITES), LINK, seed=1) as wan:
        control = use_congestion_control(wan, CONTROL)
        figures = str(Path(folder, "{site}.json"))
        spec = job(SIZE, plan, samples=samples, sites=SITES, STEP_S=pace, PLAIN_SGD=1.0, FIGURES=figures)
        running = Federation.of(spec, spec.market.sync, WORKDIR, sites=SITES, seed=1, wan=wan, connections=connections)
        with running:
            await_end(running)
            told = [json.loads(Path(figures.format(site=site)).read_text()) for site in site_names(SITES)]
            useful = statistics.mean(_useful(rounds(running, site), blocks) for site in range(SITES))
            assert summary(running)["complete"]
    steps = sum(each["steps"] for each in told)
    computed_s = sum(each["computed_s"] for each in told)
    return Use(
        case=case,
        pace_s=pace,
        step_s=computed_s / steps,
        useful=useful,
        late_steps=sum(each["late_steps"] for each in told),
        steps=steps,
        control=control,
    )


def _useful(rows: list[dict[str, Any]], blocks: int) -> float:
    """Return a site's share of useful time between the first row and the last one at which a block ended."""
    last = max(row["step"] for row in rows)
    ended = [row for row in rows if row["step"] < last]
    # At the last step comes first the row of its block, then those of what was still in flight.
    ended.append(next(row for row in rows if row["step"] == last))
    assert len(ended) >= min(3, blocks - 1), "blocks enough to speak of a usual one"
    first, final = ended[0], ended[-1]
    return float(1 - (final["stall_s"] - first["stall_s"]) * 1000 / (final["time_ms"] - first["time_ms"]))


def plain(pace_s: float, steps: int) -> float:
    """Return plain DDP's share of useful time at the same pace."""
    run = plain_ddp(SIZE, LINK, sites=SITES, steps=steps, congestion_control=CONTROL, STEP_S=pace_s, PLAIN_SGD=1.0)
    return steps * pace_s / sum(run.step_s)


def measured(*, cases: Sequence[Case], blocks: int, chart: Path | None) -> Iterator[Figure]:
    """Measure T4 at each case, the last being the one that stands against the target, and draw the curve."""
    uses = []
    for case in cases:
        found = use(case, blocks=blocks)
        uses.append(found)
        is_target = case == cases[-1]
        beside = f"plain DDP {plain(found.pace_s, 2):.1%}" if is_target else ""
        block_s = case.period_steps * found.step_s
        share = contribution_bytes(case.codec) * 8 / LINK.bandwidth_bits_per_s / block_s
        yield Figure(
            "T4",
            f"useful compute, {case.name}, H={case.period_steps}, {contribution_bytes(case.codec) / 1e6:.1f} MB "
            f"each {block_s:.1f} s ({share:.0%} of it at link rate), {LINK}, {found.control}; {found.late_steps} of "
            f"{found.steps} steps slower than their pace (load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores)",
            f">= {USEFUL_TARGET:.0%}" if is_target else "shown",
            f"{found.useful:.1%}",
            beside,
            "",
            verdict(reached=found.useful >= USEFUL_TARGET and share >= _SHARE_MIN) if is_target else "shown",
            {"step_s": found.step_s, "pace_s": found.pace_s, "transfer_share": share},
        )
    if chart is not None and len(uses) > 1:
        draw(uses, chart)


def draw(uses: Sequence[Use], path: Path) -> None:
    """Draw the share of useful time over H, a line for each strategy and codec."""
    import matplotlib as mpl  # noqa: PLC0415 - a part of a second that quick runs are spared

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(8, 5))
    names = list(dict.fromkeys(f"{each.case.strategy} {each.case.codec}" for each in uses))
    for name in names:
        points = sorted(
            (each.case.period_steps, each.useful) for each in uses if f"{each.case.strategy} {each.case.codec}" == name
        )
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.axhline(USEFUL_TARGET, color="grey", linestyle=":")
    axes.set_xlabel("H, inner steps between two exchanges of the same parameters")
    axes.set_ylabel("share of time that computes")
    axes.set_title(f"{SITES} sites, {LINK}, {uses[0].control}")
    axes.set_ylim(0, 1.02)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
