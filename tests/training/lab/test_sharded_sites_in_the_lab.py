"""Two sites whose ranks shard the model, through real gateways: the shipped example as `hansa lab` runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import training
from training.jobfile import load_job_file
from training.lab.compare import job_of, plan_of
from training.lab.federation import Federation, read_rows
from training.lab.kills import progress_of

EXAMPLE = Path(training.__file__).parent / "examples" / "sharded_lm"


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_sites_that_shard_in_two_axes_train_the_example_to_one_outer_state(tmp_path: Path) -> None:
    spec = job_of(load_job_file(EXAMPLE / "job.yaml"), 1280)
    plan = plan_of(spec.market.sync, "diloco", 2)
    with Federation.of(spec, plan, EXAMPLE, sites=2, seed=1, ranks=4) as federation:
        assert list(progress_of(federation))[-1] == 1280
        summaries = [json.loads((site.folder / "output/summary.json").read_text()) for site in federation.sites]
        rows = read_rows(federation.sites[0].metrics)
    one, other = summaries
    assert one["outer_hash"] == other["outer_hash"]
    assert one["rounds"] == other["rounds"] == 2
    losses = [row["held_out_loss"] for row in rows if row.get("held_out_loss") is not None]
    assert losses[-1] < losses[0] - 2
