"""`hansa lab compare` as a user has it: real processes, gateways on loopback, and the three files that it writes."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from training.jobfile import read_job_file
from training.lab import chart
from training.lab.compare import STRATEGIES, Outcome, Point, auto_plan, compare, job_of, outcome_of, plan_of
from training.lab.errors import LabError
from training.lab.link import LinkSpec
from training.spec import SyncPlan

SCRIPT = """
import torch, training
from torch import nn

torch.manual_seed(0)
model = nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
inputs = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
data = [(row, row.sum(dim=0, keepdim=True)) for row in inputs]
with training.join(model, optimizer, data=data) as session:
    for x, y in session.batches():
        loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        session.report(loss=loss.item())
"""
JOB = """
name: small
workdir: .
run: python train.py
resources: {accelerators: "cpu-slot:2"}
market:
  budget: 1
  workload: {samples: 64, batch_per_gpu: 4, parameters: 5, flops_per_sample: 10}
  sync: {period_steps: 2, patience_s: 30}
"""


def test_auto_follows_the_link_and_the_measured_step() -> None:
    job = JOB.replace("parameters: 5", "parameters: 2000000").replace("samples: 64", "samples: 64000")
    job = job.replace("period_steps: 2, ", "")
    profile = "  profile: [{gpu_type: cpu-slot, batch_per_gpu: 4, steps: 50, step_s: 0.05}]\n"
    spec = job_of(read_job_file(job + profile), None)
    near = auto_plan(spec, sites=2, ranks=1, link=LinkSpec.parse("100gbit"))
    far = auto_plan(spec, sites=2, ranks=1, link=LinkSpec.parse("20mbit,50ms"))
    assert (near.plan.strategy, far.plan.strategy) == ("every_step", "sparse")
    assert "of 50 ms" in far.reasons[-1]
    with pytest.raises(LabError, match="one"):
        auto_plan(spec, sites=1, ranks=1, link=None)


def test_two_strategies_of_one_job_are_run_and_drawn(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    seen: dict[str, list[int]] = {}
    outcomes = compare(
        job_of(read_job_file(JOB), None),
        tmp_path,
        ["every_step", "diloco"],
        sites=2,
        seed=3,
        progress=lambda strategy, done: seen.setdefault(strategy, []).append(done),
    )
    every_step, diloco = outcomes
    assert [each.rounds for each in outcomes] == [8, 4]
    assert seen["every_step"][-1] == seen["diloco"][-1] == 64
    assert every_step.ratio is not None
    assert every_step.payload_bytes == 2 * 8 * (12 + 4 * 5)
    assert diloco.payload_bytes < every_step.payload_bytes
    for each in outcomes:
        assert not each.held_out
        assert each.points[-1].loss < each.points[0].loss
        assert each.points[0].samples <= 8


def test_a_script_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("raise ValueError('no such corpus')")
    with pytest.raises(LabError, match="no such corpus"):
        compare(job_of(read_job_file(JOB), None), tmp_path, ["diloco"], sites=1, seed=0, progress=lambda *_: None)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_gets_a_sound_plan_out_of_any_job(strategy: str) -> None:
    asked = SyncPlan(period_steps=30, outer_learning_rate=0.5, outer_momentum=0.3, patience_s=20)
    plan = plan_of(asked, strategy, 3)  # type: ignore[arg-type]
    assert plan.strategy == strategy
    assert plan.codec != "auto"
    assert plan.patience_s == 20
    assert plan.round_steps >= 1
    if strategy == "streaming":
        assert plan.period_steps % plan.fragments == 0
        assert plan.overlap_steps < plan.round_steps


def outcomes() -> list[Outcome]:
    def outcome(strategy: str, rate: float) -> Outcome:
        points = tuple(Point(step * 100, step * 5000, step * 0.5, 3 * 0.9 ** (rate * step) + 1) for step in range(20))
        return Outcome(strategy, "int8", points, True, 19, 95_000, 4.0, 0.2, 9.5)  # type: ignore[arg-type]

    return [outcome("diloco", 1.0), outcome("sparse", 2.0)]


def decoded(png: bytes) -> np.ndarray:
    """The pixels of a PNG of true colour without interlacing, by the standard's own words."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    place, data, size = 8, b"", (0, 0)
    while place < len(png):
        (length,) = struct.unpack_from(">I", png, place)
        kind, content = png[place + 4 : place + 8], png[place + 8 : place + 8 + length]
        (crc,) = struct.unpack_from(">I", png, place + 8 + length)
        assert crc == zlib.crc32(kind + content)
        if kind == b"IHDR":
            size = struct.unpack_from(">II", content)
        data += content if kind == b"IDAT" else b""
        place += 12 + length
    rows = np.frombuffer(zlib.decompress(data), dtype=np.uint8).reshape(size[1], -1)
    assert not rows[:, 0].any(), "no filter"
    return rows[:, 1:].reshape(size[1], size[0], 3)


def test_the_picture_has_three_panels_with_a_line_for_each_strategy() -> None:
    pixels = decoded(chart.png(chart.shapes(outcomes(), "a title")))
    assert pixels.shape == (chart.HEIGHT, chart.WIDTH, 3)
    blue = (np.abs(pixels.astype(int) - [0x00, 0x72, 0xB2]) < 40).all(axis=2)
    for panel in range(3):
        left = panel * 430 + 62
        assert blue[46:356, left : left + 350].sum() > 200, "the second strategy's line"
    curve = [np.flatnonzero(column).mean() for column in blue[46:356, 62:412].T if column.any()]
    assert curve[0] < curve[len(curve) // 2] < curve[-1], "a falling loss falls in the picture"


def test_the_page_holds_the_picture_and_the_figures_and_loads_nothing() -> None:
    page = chart.page(outcomes(), "<job>", "about")
    assert "&lt;job&gt;" in page
    assert page.count("<polyline") > 6
    assert "95,000" in page
    assert "src=" not in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_axes_have_round_ticks_inside() -> None:
    assert chart.Axis(0, 23).ticks() == [0, 5, 10, 15, 20]
    assert chart.Axis(900, 2_000_000, log=True).ticks() == [1e3, 1e4, 1e5, 1e6]
    assert [chart.short(each) for each in (0, 950, 1500, 2e6, 3e9)] == ["0", "950", "1.5k", "2M", "3G"]


def test_held_out_losses_are_preferred_and_without_any_loss_the_remedy_is_named() -> None:
    summary = json.loads(
        '{"codec": "int8", "rounds": 1, "bytes_posted": 5, "bytes_fetched": 6, "sync_s": 0, "metrics": {}}'
    )
    rows = [
        {"time_ms": 1000, "samples_done": 0, "loss": 5.0},
        {"time_ms": 2000, "samples_done": 8, "bytes_posted": 5, "bytes_fetched": 6},
        {"time_ms": 3000, "samples_done": 8, "held_out_loss": 4.0},
    ]
    found = outcome_of("diloco", rows, summary)
    assert found.held_out
    assert found.points == (Point(8, 11, 2.0, 4.0),)
    with pytest.raises(LabError, match=r"session\.report"):
        outcome_of("diloco", rows[1:2], summary)
