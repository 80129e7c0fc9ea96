"""Reading a job as a person writes it: what it becomes, and that each fault is told with its line."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import training
from training.errors import SpecError
from training.jobfile import JOB_FILE_BYTES_MAX, load_job_file, read_job_file

DIGEST = "0" * 64
GOOD = """\
name: tiny
workdir: code
resources:
  accelerators: [H100:8, "A100:2..16"]
run: python train.py --width 64
envs: {SEED: 7}
market:
  budget: 1.25
  bid: 0.000001
  deadline: 2030-01-31T12:00:00Z
  sites_max: 2
  workload:
    samples: 1000
    batch_per_gpu: 4
    parameters: 10
    flops_per_sample: 5.3e7
"""


def faults(text: str) -> str:
    with pytest.raises(SpecError) as caught:
        read_job_file(text).spec(DIGEST)
    return str(caught.value)


def test_job_becomes_what_the_wire_carries() -> None:
    job = read_job_file(GOOD)
    spec = job.spec(DIGEST)
    assert job.workdir == "code"
    assert [(each.gpu_type, each.count_min, each.count_max) for each in spec.resources.accelerators] == [
        ("H100", 8, 8),
        ("A100", 2, 16),
    ]
    assert spec.envs == {"SEED": "7"}
    assert spec.market.budget_micros == 1_250_000
    assert spec.market.bid_micros_per_million_samples == 1
    assert spec.market.deadline_ms == 1_896_091_200_000
    assert spec.market.workload.flops_per_sample == 5.3e7


def test_the_bundled_example_is_a_job() -> None:
    folder = Path(training.__file__).parent / "examples" / "stdlib_lm"
    assert load_job_file(folder / "job.yaml").spec(DIGEST).market.sites_max == 2


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("run:", "rnu:", "line 5, /rnu: unknown key 'rnu'"),
        ("  budget: 1.25", "  budget: 1.25\n  budgte: 1", "line 9, /market/budgte: unknown key"),
        ("name: tiny", "name: tiny\nname: other", "line 2, /name: stands twice"),
        ("budget: 1.25", "budget: -1", "line 8, /market/budget: -1 is not an amount"),
        ("budget: 1.25", "budget: 0.0000001", "more than six decimals"),
        ("budget: 1.25", "budget: .nan", "not an amount"),
        ("budget: 1.25", "budget: true", "not an amount"),
        ("budget: 1.25", "budget: 1e12", "more than a job may hold"),
        ("T12:00:00Z", "", "has no time zone"),
        ("2030-01-31T12:00:00Z", "soon", "line 10, /market/deadline: 'soon' is not a time"),
        ("H100:8", "H1000:8", "unknown GPU type 'H1000'"),
        ("H100:8", "H100:0", "greater than or equal to 1"),
        ("H100:8", "H100:-1", "is no GPU request"),
        ("samples: 1000", "samples: 0", "line 13, /market/workload/samples"),
        ("    samples: 1000\n", "", "/market/workload/samples: Field required"),
        ("run: python train.py --width 64", "run: python ../train.py", "outside the workdir"),
        ("{SEED: 7}", "{SEED: [1]}", "/envs/SEED: must be text"),
        ("{SEED: 7}", "{HANSA_X: 'a'}", "set by the site"),
        ("workdir: code", "workdir: [code]", "must be the path of a folder"),
        ("name: tiny", "name: &a tiny\nx: *a", "aliases"),
        ("name: tiny", "name: !!python/name:os.system x", "tag"),
        ("name: tiny", "name: [", "not YAML"),
    ],
)
def test_each_fault_is_told_where_it_stands(before: str, after: str, said: str) -> None:
    assert before in GOOD
    assert said in faults(GOOD.replace(before, after, 1))


def test_empty_large_deep_and_binary_files_are_refused() -> None:
    assert "empty" in faults("")
    assert "KiB" in faults("#" * (JOB_FILE_BYTES_MAX + 1))
    assert "nested" in faults("[" * 10_000)
    with pytest.raises(SpecError):
        read_job_file(b"\xff\xfe\x00\x01")


@given(st.text(max_size=200))
def test_no_text_breaks_the_reader(text: str) -> None:
    with contextlib.suppress(SpecError):
        read_job_file(text).spec(DIGEST)
