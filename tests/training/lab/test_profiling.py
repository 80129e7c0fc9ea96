"""What a profile says of a step, and the script's own run that it is measured by."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.jobfile import read_job_file
from training.lab.profiling import Profile, StepCost, cost_of, profile

SCRIPT = """
import time
import torch, training
from torch import nn

model = nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
with training.join(model, optimizer, data=[torch.ones(4)] * 64) as session:
    for x in session.batches():
        time.sleep(0.004 * len(x))
        model(x).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
"""
JOB = """
name: sleeper
workdir: .
run: python train.py
resources: {accelerators: "cpu-slot:1"}
market:
  budget: 1
  workload: {samples: 64, batch_per_gpu: 8, parameters: 5, flops_per_sample: 10}
"""


def test_two_batches_tell_a_steps_overhead_from_its_samples() -> None:
    found = Profile("T4", (StepCost(8, 0.05, 40), StepCost(16, 0.08, 40)), 12.0)
    assert found.sample_s == pytest.approx(0.03 / 8)
    assert found.overhead_s == pytest.approx(0.02)
    assert [(row.batch_per_gpu, row.step_s) for row in found.terms()] == [(8, 0.05), (16, 0.08)]


def test_warming_rounds_and_the_scripts_own_reports_do_not_count() -> None:
    slow, round_row, own = {"step_s": 9.0, "sites_merged": 1}, {"step_s": 0.5, "sites_merged": 1}, {"step_s": 7.0}
    assert cost_of([own, slow, slow, round_row, own, round_row, round_row], 4) == StepCost(4, 0.5, 12)
    assert cost_of([slow, slow, round_row, round_row], 4) is None


@pytest.mark.soak
def test_a_script_is_run_and_timed_on_its_own_steps(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    seen: list[float] = []
    found = profile(read_job_file(JOB).spec("0" * 64), tmp_path, "cpu-slot", seconds=6, progress=seen.append)
    assert found.used_s < 8
    assert seen == sorted(seen)
    assert found.sample_s == pytest.approx(0.004, rel=0.3)
