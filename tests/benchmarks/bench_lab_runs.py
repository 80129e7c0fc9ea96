"""Live runs across emulated links: predicted against measured steps, for links that the fit has not seen.

    python tests/benchmarks/bench_lab_runs.py [--sites 2,3] [--plot runs.png] [--json runs.json]

Every run is a federation of real ranks and gateways on this machine (`training.lab`), one site a process, joined by emulated
links; needs root. For each number of sites, twelve runs: three links by four strategies, in shuffled order, so that what
else runs here falls on all of them. Each link's four runs are then predicted by `training.steptimes.spans` from the eight on the other
links. The reference is the form without any fit: probed links, and the step alone as the fastest run showed it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import numpy as np

from training.jobfile import read_job_file
from training.lab.compare import plan_of
from training.lab.errors import LabError
from training.lab.federation import Federation, read_rows, site_names
from training.lab.kills import progress_of
from training.lab.link import LinkSpec
from training.lab.wan import Wan, WanError
from training.spec import JobSpec, Strategy, SyncPlan
from training.steptimes.intersite import Schedule, WideLink
from training.steptimes.spans import SpanModel, SpanRun, fit_spans
from training.throughput import CODEC_RATIOS, contribution_size_bytes

LINKS = ("1mbit,20ms", "4mbit,20ms", "16mbit,5ms")
STRATEGIES: tuple[Strategy, ...] = ("every_step", "diloco", "streaming", "quorum")
PARAMETERS = 20_160
PERIOD_STEPS = 12
RUN_S = 6.0
STEPS_MIN = 36
SCRIPT = """
import torch, training
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(96, 140), nn.Tanh(), nn.Linear(140, 47, bias=False))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
inputs = torch.randn(256, 40, 96, generator=torch.Generator().manual_seed(1))
with training.join(model, optimizer, data=list(inputs)) as session:
    for x in session.batches():
        (model(x) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
"""
JOB = f"""
name: small
workdir: .
run: python train.py
resources: {{accelerators: "cpu-slot:8"}}
market:
  budget: 1
  sites_max: 8
  workload: {{samples: 1000, batch_per_gpu: 16, parameters: {PARAMETERS}, flops_per_sample: 4.8e+6}}
  sync: {{period_steps: {PERIOD_STEPS}, patience_s: 60}}
"""


@dataclass(frozen=True)
class Case:
    """One run that is to be predicted."""

    sites: int
    link: str
    strategy: Strategy
    run: SpanRun


@dataclass(frozen=True)
class Row:
    """A case with what was predicted of it, unseen."""

    case: Case
    predicted_s: float
    half_width_log: float
    unfitted_s: float

    @property
    def error(self) -> float:
        """The absolute percentage error."""
        return 100 * abs(self.predicted_s / self.case.run.step_s - 1)

    @property
    def inside(self) -> bool:
        """Whether the interval holds what was measured."""
        return abs(math.log(self.case.run.step_s / self.predicted_s)) <= self.half_width_log


def schedule_of(plan: SyncPlan, sites: int) -> Schedule:
    """Return when sites agree under a plan, and what each sends."""
    size = contribution_size_bytes(float(PARAMETERS), CODEC_RATIOS[plan.codec])
    quorum = plan.quorum_of(sites) if plan.strategy == "quorum" else None
    if plan.strategy == "streaming":
        return Schedule(size / plan.fragments, plan.round_steps, plan.overlap_steps)
    return Schedule(size, plan.period_steps, 0, quorum)


def measure(spec: JobSpec, workdir: Path, sites: int, link: str, strategy: Strategy) -> Case:
    """Run one federation and return the step that its site-1 had, from its second round to its last."""
    plan = plan_of(spec.market.sync, strategy, sites)
    emulated = LinkSpec.parse(link)
    # A site's cable carries its own bandwidth; a round trip crosses the delay twice.
    links = tuple(WideLink(emulated.bandwidth_bits_per_s, 2 * emulated.delay_s) for _ in range(sites - 1))
    schedule = schedule_of(plan, sites)
    guess_s = SpanModel(0.02, 0.03, 1.0).step_s(schedule, links)
    steps = max(STEPS_MIN if plan.period_steps > 1 else STEPS_MIN // 3, round(RUN_S / guess_s))
    samples = steps * sites * spec.market.workload.batch_per_gpu
    workload = spec.market.workload.model_copy(update={"samples": samples})
    job = spec.model_copy(update={"market": spec.market.model_copy(update={"workload": workload})})
    with (
        Wan(site_names(sites), emulated, seed=1) as wan,
        Federation.of(job, plan, workdir, sites=sites, seed=1, wan=wan) as each,
    ):
        for _ in progress_of(each):
            pass
        rows = [row for row in read_rows(each.sites[0].metrics) if row.get("sites_merged") is not None]
    first, last = rows[1], rows[-1]
    step_s = (last["time_ms"] - first["time_ms"]) / 1000 / (last["step"] - first["step"])
    return Case(sites, link, strategy, SpanRun(schedule, links, step_s))


def predicted(cases: Sequence[Case]) -> list[Row]:
    """Return each case as predicted from the runs on other links, those of one number of sites together."""
    rows = []
    for sites in sorted({case.sites for case in cases}):
        own = [case for case in cases if case.sites == sites]
        for link in LINKS:
            seen = [case.run for case in own if case.link != link]
            fitted = fit_spans(seen)
            # Each site's own step as the fastest of those runs bounds it, and links as probed.
            unfitted = SpanModel(min(run.step_s for run in seen), 0.0, 1.0)
            for case in own:
                if case.link == link:
                    schedule, links = case.run.schedule, case.run.links
                    rows.append(
                        Row(
                            case,
                            fitted.step_s(schedule, links),
                            fitted.half_width_log(schedule, links),
                            unfitted.step_s(schedule, links),
                        )
                    )
    return rows


def show(rows: Sequence[Row]) -> None:
    """Print every case and the summary."""
    print(
        f"{'sites':>5} {'link':12} {'strategy':11} {'measured':>10} {'predicted':>10} {'90 % interval':>21} {'error':>8}"
    )
    for row in rows:
        low, high = row.predicted_s / math.exp(row.half_width_log), row.predicted_s * math.exp(row.half_width_log)
        print(
            f"{row.case.sites:>5} {row.case.link:12} {row.case.strategy:11} {1e3 * row.case.run.step_s:>7.1f} ms "
            f"{1e3 * row.predicted_s:>7.1f} ms {1e3 * low:>7.1f} to {1e3 * high:>7.1f} ms {row.error:>6.1f} %"
            f"{'' if row.inside else '  outside'}"
        )
    errors = [row.error for row in rows]
    reference = [100 * abs(row.unfitted_s / row.case.run.step_s - 1) for row in rows]
    print(
        f"{len(rows)} runs: median error {median(errors):.1f} %, mean {mean(errors):.1f} %, worst {max(errors):.1f} %; "
        f"inside their interval {100 * mean(row.inside for row in rows):.0f} %"
    )
    print(
        f"without the fit: median {median(reference):.1f} %, mean {mean(reference):.1f} %; ratio of medians {median(errors) / median(reference):.2f}"
    )


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw predicted against measured with intervals, a colour for each strategy."""
    from matplotlib.figure import Figure  # noqa: PLC0415  drawing is optional, and slow to load

    figure = Figure(figsize=(7.0, 5.6), layout="constrained")
    axes = figure.add_subplot()
    for strategy, colour in zip(STRATEGIES, ("#1f5f8b", "#c0392b", "#2e8b57", "#b8860b"), strict=True):
        own = [row for row in rows if row.case.strategy == strategy]
        measured = [1e3 * row.case.run.step_s for row in own]
        middle = [1e3 * row.predicted_s for row in own]
        factor = [math.exp(min(row.half_width_log, 3.0)) for row in own]
        bars = [
            [each - each / wide for each, wide in zip(middle, factor, strict=True)],
            [each * wide - each for each, wide in zip(middle, factor, strict=True)],
        ]
        axes.errorbar(measured, middle, yerr=bars, fmt="o", markersize=4, elinewidth=0.8, color=colour, label=strategy)
    ends = [0.8e3 * min(row.case.run.step_s for row in rows), 1.25e3 * max(row.case.run.step_s for row in rows)]
    axes.plot(ends, ends, color="#444444", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="measured inner step, ms", ylabel="predicted from other links, ms")
    axes.set_title(f"{len(rows)} live runs, median error {median(row.error for row in rows):.1f} %", fontsize=11)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110, format="png")


def main() -> None:
    """Run, predict, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sites", default="2")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    spec = read_job_file(JOB).spec("0" * 64)
    order = [
        (int(sites), link, strategy) for sites in asked.sites.split(",") for link in LINKS for strategy in STRATEGIES
    ]
    order = [order[place] for place in np.random.default_rng(1).permutation(len(order))]
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "train.py").write_text(SCRIPT)
        for number, (sites, link, strategy) in enumerate(order, start=1):
            try:
                case = measure(spec, Path(folder), sites, link, strategy)
            except (LabError, WanError) as error:
                print(f"live runs: {sites} sites, {link}, {strategy} did not run: {error}")
                return
            cases.append(case)
            print(
                f"[{number}/{len(order)}] {sites} sites, {link}, {strategy}: {1e3 * case.run.step_s:.1f} ms",
                file=sys.stderr,
            )
    rows = predicted(cases)
    show(rows)
    if asked.plot is not None:
        draw(rows, asked.plot)
    if asked.json is not None:
        asked.json.write_text(json.dumps([[c.sites, c.link, c.strategy, c.run.step_s] for c in cases], indent=1))


if __name__ == "__main__":
    main()
