from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.errors import SpecError
from training.jobfile import JOB_FILE_BYTES_MAX, load_job_file, read_job_file, with_profile
from training.spec import GpuRequest, JobSpec, ProfileTerms

EXAMPLE = Path(__file__).resolve().parents[2] / "training/examples/stdlib_lm/job.yaml"
DIGEST = "a" * 64
JOB = """\
name: my-job
workdir: .
resources:
  accelerators: "H100:2..8"
run: python train.py --width 64
envs: {SEED: 7}
market:
  budget: 12.5
  workload:
    samples: 19200
    batch_per_gpu: 16
    parameters: 136960
    flops_per_sample: 5.3e7
"""


def spec_of(text: str) -> JobSpec:
    return read_job_file(text).spec(DIGEST)


def faults(text: str) -> dict[str, int | None]:
    """Return the place and line of each fault in `text`."""
    with pytest.raises(SpecError) as raised:
        spec_of(text)
    return {where: raised.value.lines.get(where) for where, _ in raised.value.problems}


def test_the_shipped_example_is_a_job() -> None:
    job = load_job_file(EXAMPLE)
    spec = job.spec(DIGEST)
    assert job.workdir == "."
    assert spec.market.budget_micros == 2_000_000
    assert spec.market.sites_max == 2
    assert spec.resources.accelerators == (GpuRequest(gpu_type="cpu-slot", count_min=4, count_max=4),)
    assert spec.market.workload.flops_per_sample == 5.3e7
    assert (EXAMPLE.parent / spec.run.split()[1]).is_file()


def test_the_sharded_example_is_a_job_too_and_takes_three_lines_of_ours() -> None:
    file = EXAMPLE.parent.parent / "sharded_lm" / "job.yaml"
    spec = load_job_file(file).spec(DIGEST)
    lines = (file.parent / spec.run.split()[1]).read_text().split('"""', 2)[2].splitlines()
    ours = [
        line.strip() for line in lines if re.search(r"^import training|training\.join|session\.batches", line.strip())
    ]
    assert len(ours) == 3
    # What is reported besides is the author's wish, and the loop needs none of it.
    assert all("session." in line for line in lines if "session" in line and line.strip() not in ours)


@pytest.mark.parametrize(
    ("written", "requests"),
    [
        ('"cpu-slot:4"', [("cpu-slot", 4, 4)]),
        ('"cpu-slot:2..4"', [("cpu-slot", 2, 4)]),
        ("H100", [("H100", 1, 1)]),
        ("{A100: 4, H100: 2..8}", [("A100", 4, 4), ("H100", 2, 8)]),
        ('["A100:4", "H100:2..8"]', [("A100", 4, 4), ("H100", 2, 8)]),
    ],
)
def test_accelerators_can_be_written_in_skypilots_ways(written: str, requests: list[tuple[str, int, int]]) -> None:
    found = spec_of(JOB.replace('"H100:2..8"', written)).resources.accelerators
    assert [(each.gpu_type, each.count_min, each.count_max) for each in found] == requests


@pytest.mark.parametrize("written", ["H100:two", "H100:2...8", "[]", "{H100: {}}", "H100:-1", "4"])
def test_an_unreadable_gpu_request_names_its_line(written: str) -> None:
    assert faults(JOB.replace('"H100:2..8"', written)) == {"/resources/accelerators": 4}


@given(micros=st.integers(1, 10**15))
@settings(max_examples=200)
def test_credits_become_micro_credits_exactly(micros: int) -> None:
    written = f"{micros // 1_000_000}.{micros % 1_000_000:06d}"
    assert spec_of(JOB.replace("12.5", written)).market.budget_micros == micros


@pytest.mark.parametrize("written", ["0", "-3", "1.0000001", "yes", ".inf", "2e9", "[1]", "ten"])
def test_what_is_no_amount_of_credits_is_refused(written: str) -> None:
    assert faults(JOB.replace("12.5", written)) == {"/market/budget": 8}


def test_a_deadline_is_an_instant_with_its_zone() -> None:
    text = JOB + "  deadline: 2030-01-31T12:00:00Z\n"
    assert spec_of(text).market.deadline_ms == 1_896_091_200_000
    assert faults(text.replace("00Z", "00")) == {"/market/deadline": 14}


def test_every_fault_is_listed_at_once_each_with_its_line() -> None:
    text = JOB.replace("name: my-job", "nane: my-job").replace("budget: 12.5", "budget: -1") + "  sights_max: 2\n"
    assert faults(text) == {"/nane": 1, "/market/budget": 8, "/market/sights_max": 14}


def test_faults_of_the_specification_name_the_line_that_was_written() -> None:
    text = JOB.replace("samples: 19200", "samples: 0").replace("run: python train.py", "run: ./train.sh")
    assert faults(text) == {"/run": 5, "/market/workload/samples": 10}
    assert faults(JOB.replace("name: my-job\n", "")) == {"/name": 1}


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nname: *b\n"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (BOMB, "aliases"),
        (JOB.replace("my-job", "!!python/object/apply:os.getcwd []"), "tag"),
        (JOB + "name: again\n", "stands twice"),
        ("[" * 100 + "]" * 100, "nested"),
        ("", "empty"),
        ("just words", "must have the keys"),
        ("a: [", "not YAML"),
        ("x" * (JOB_FILE_BYTES_MAX + 1), "larger than"),
    ],
)
def test_what_a_job_file_must_not_hold_is_refused(text: str, what: str) -> None:
    with pytest.raises(SpecError, match=what):
        read_job_file(text)


@given(content=st.binary(max_size=300))
@settings(max_examples=150)
def test_any_bytes_are_a_job_or_a_spec_error(content: bytes) -> None:
    with contextlib.suppress(SpecError):
        read_job_file(content).spec(DIGEST)


@pytest.mark.parametrize("strategy", ["every_step", "diloco", "streaming", "sparse", "quorum", "neighbour", "async"])
def test_a_strategy_can_be_written_as_one_word(strategy: str) -> None:
    spec = spec_of(JOB + f"  sync: {strategy}\n")
    assert spec.market.sync.strategy == strategy
    assert spec_of(JOB + f"  sync: {{strategy: {strategy}}}\n") == spec


def test_fragments_must_take_turns_evenly_and_not_overlap() -> None:
    block = "  sync: {{strategy: streaming, period_steps: 12, fragments: {}, overlap_steps: {}}}\n"
    assert spec_of(JOB + block.format(4, 2)).market.sync.round_steps == 3
    assert faults(JOB + block.format(5, 1)) == {"/market": 7}
    assert faults(JOB + block.format(4, 3)) == {"/market": 7}


def test_value_data_and_types_are_read_as_people_write_them() -> None:
    text = JOB.replace(
        "  workload:",
        "  bid: 2\n  bid_steps: [{above_samples_per_s: 5e2, bid: 0.5}]\n  mixed_types: true\n"
        "  data: {home_site: hamburg, residency: region, bytes_per_sample: 4e3}\n  workload:",
    )
    market = spec_of(text).market
    assert [(step.above_samples_per_s, step.bid_micros_per_million_samples) for step in market.bid_steps] == [
        (500.0, 500_000)
    ]
    assert market.mixed_types
    assert market.data is not None
    assert (market.data.home_site, market.data.residency, market.data.bytes_per_sample) == ("hamburg", "region", 4000.0)


@pytest.mark.parametrize(
    ("line", "where"),
    [
        ("bid_steps: [{above_samples_per_s: 500, bid: 0.5, more: 1}]", "/market/bid_steps/0/more"),
        ("bid_steps: [{above_samples_per_s: 500, bid: cheap}]", "/market/bid_steps/0/bid"),
        ("data: {home_site: hamburg, residency: county}", "/market/data/residency"),
        ("data: {residency: region}", "/market/data/home_site"),
    ],
)
def test_faults_in_value_and_data_name_their_place(line: str, where: str) -> None:
    assert where in faults(JOB.replace("  workload:", f"  {line}\n  workload:"))


def test_bids_for_further_speed_must_fall() -> None:
    rising = "bid: 1\n  bid_steps: [{above_samples_per_s: 10, bid: 0.5}, {above_samples_per_s: 20, bid: 0.7}]"
    with pytest.raises(SpecError, match="must fall below the bid"):
        spec_of(JOB.replace("  workload:", f"  {rising}\n  workload:"))


def test_a_profile_is_written_into_the_file_and_nothing_else_changes() -> None:
    text = EXAMPLE.read_text()
    slot = ProfileTerms(gpu_type="cpu-slot", batch_per_gpu=16, steps=60, step_s=0.02)
    card = ProfileTerms(gpu_type="T4", batch_per_gpu=16, steps=60, step_s=0.01)
    once = with_profile(text, [slot])
    assert read_job_file(once).spec(DIGEST).market.profile == (slot,)
    assert [line for line in once.splitlines() if line not in text.splitlines()] == [
        "  profile:",
        "    - {gpu_type: cpu-slot, batch_per_gpu: 16, steps: 60, step_s: 0.02}",
    ]
    faster = slot.model_copy(update={"step_s": 0.015})
    again = with_profile(with_profile(once, [card]), [faster])
    assert read_job_file(again).spec(DIGEST).market.profile == (card, faster)
    assert again.endswith(text[text.index("  budget") :])


def test_a_profile_cannot_be_put_into_a_market_block_on_one_line() -> None:
    with pytest.raises(SpecError, match="one key a line"):
        with_profile("name: a\nmarket: {budget: 2}\n", [])
