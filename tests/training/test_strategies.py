"""Every strategy through real sessions: sites as threads, the round log in memory."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.gloo_threads import ranks_of_a_site
from tests.training.memory_log import MemoryLog
from tests.training.small_job import SAMPLES, Points, model, run, seats, site
from training.dealing import items
from training.errors import ModelError
from training.exchange import MemberSeat

PLANS: dict[str, dict[str, Any]] = {
    "every_step": {"strategy": "every_step", "period_steps": 1, "codec": "fp32"},
    "streaming": {"strategy": "streaming", "period_steps": 6, "fragments": 3, "overlap_steps": 1, "codec": "int4"},
    "sparse": {"strategy": "sparse", "codec": "topk2"},
    "quorum": {"strategy": "quorum", "codec": "int8"},
    "neighbour": {"strategy": "neighbour", "codec": "int8", "topology": "ring"},
    "async": {"strategy": "async", "codec": "int8"},
}
strategies = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
in_step = pytest.mark.parametrize(
    "plan", [each for name, each in PLANS.items() if name not in {"quorum", "async"}], ids=lambda plan: plan["strategy"]
)


def sealed_samples(log: MemoryLog) -> list[int]:
    """The samples of the entries that count: as every site, leave out an entry that claims what is done already."""
    done: set[int] = set()
    for number in sorted(log.sealed):
        for entry in log.sealed[number].entries:
            claimed = {sample for each in entry.samples for sample in range(each.start, each.stop)}
            if not claimed & done:
                done |= claimed
    return sorted(done)


def repeated_samples(log: MemoryLog) -> int:
    """How many samples stand in the log more often than once."""
    claims = [each for sealed in log.sealed.values() for entry in sealed.entries for each in entry.samples]
    return sum(each.stop - each.start for each in claims) - len(sealed_samples(log))


@strategies
def test_sites_agree_after_every_round_and_every_sample_is_sealed_once(tmp_path: Path, plan: dict[str, Any]) -> None:
    log = MemoryLog(seats("ams", "bern", "oslo"))
    sites = [site(log, tmp_path, name, samples=101, **plan) for name in ("ams", "bern", "oslo")]
    run(*sites)
    assert sealed_samples(log) == list(range(101))
    assert log.hashes_agree()
    # Sites that keep apart meet at the job's end: whoever is done takes some of the others' last samples.
    assert repeated_samples(log) <= (3 * 8 if plan["strategy"] in {"quorum", "async"} else 0)
    for each in sites:
        assert each.session is not None
        assert each.session.samples_done == 101


@strategies
def test_a_site_may_have_several_ranks(tmp_path: Path, plan: dict[str, Any]) -> None:
    log = MemoryLog([*seats("ams"), *seats("bern", gpus=2)])
    bern = [site(log, tmp_path, "bern", each, samples=96, **plan) for each in ranks_of_a_site(2)]
    run(site(log, tmp_path, "ams", samples=96, **plan), *bern)
    assert sealed_samples(log) == list(range(96))
    assert log.hashes_agree()
    for mine, theirs in zip(bern[0].module.parameters(), bern[1].module.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@strategies
def test_every_strategy_learns(tmp_path: Path, plan: dict[str, Any]) -> None:
    log = MemoryLog(seats("ams", "oslo"))
    plan = {**plan, "outer_learning_rate": 0.4, "outer_momentum": 0.6}
    first, second = (site(log, tmp_path, name, samples=960, **plan) for name in ("ams", "oslo"))
    run(first, second)
    assert first.losses is not None
    assert np.mean(first.losses[-10:]) < 0.6 * np.mean(first.losses[:10])


def test_every_step_equals_data_parallelism_in_one_process(tmp_path: Path) -> None:
    log = MemoryLog(seats("ams", "oslo"))
    first, second = (site(log, tmp_path, name, **PLANS["every_step"]) for name in ("ams", "oslo"))
    run(first, second)

    points, module = Points(), model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.02)
    for start in range(0, SAMPLES, 8):
        batch = [points[index] for index in items(range(start, start + 8), length=512, seed=5)]
        inputs, targets = (torch.stack(part) for part in zip(*batch, strict=True))
        torch.nn.functional.mse_loss(module(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    for mine, theirs, alone in zip(
        first.module.parameters(), second.module.parameters(), module.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs)
        assert torch.allclose(mine, alone, rtol=1e-6, atol=1e-6)


def test_every_step_needs_the_optimizers_step(tmp_path: Path) -> None:
    log = MemoryLog(seats("ams"))
    lone = site(log, tmp_path, "ams", **PLANS["every_step"])
    lone.step_hook = lambda session: session._synchronizer.stepped()  # type: ignore[union-attr]
    with pytest.raises(ModelError, match="did not call"):
        run(lone)


def test_streaming_sends_one_group_at_a_time_and_all_work_in_the_end(tmp_path: Path) -> None:
    """H = 6 in three turns; after the last sample the two other groups have a turn each."""
    plan = {**PLANS["streaming"], "codec": "fp32", "outer_learning_rate": 1.0, "outer_momentum": 0.0}
    log = MemoryLog(seats("ams", "oslo"))
    sites = [site(log, tmp_path, name, samples=96, **plan) for name in ("ams", "oslo")]
    run(*sites)
    assert len(log.sealed) == 96 // 16 + 2
    fragments = [len(sealed.entries[0].fragments) for sealed in log.sealed.values()]
    assert fragments[:3] == [1, 1, 1], "each of the three fragments has a turn in three rounds"
    assert [entry.weight for entry in log.sealed[8].entries] == [8, 8]
    assert log.sealed[8].entries[0].samples == ()


def test_streaming_trains_on_while_a_round_travels(tmp_path: Path) -> None:
    plan = {**PLANS["streaming"], "period_steps": 9, "overlap_steps": 2}
    log = MemoryLog(seats("ams", "oslo"))
    sites = [site(log, tmp_path, name, samples=240, **plan) for name in ("ams", "oslo")]
    steps_at: list[tuple[int, int]] = []
    sites[0].step_hook = lambda session: steps_at.append((session.step, session.rounds))
    run(*sites)
    posted_after = {number: 3 * number for number in range(1, 6)}
    for number, steps in posted_after.items():
        assert (steps + 1, number - 1) in steps_at, "a step into the next block the round is still on its way"
        assert (steps + 2, number) in steps_at, "two steps in it is applied"


@pytest.mark.parametrize("mixing", [0.0, 0.5])
def test_streaming_resumed_in_the_middle_of_a_block_ends_as_if_never_interrupted(tmp_path: Path, mixing: float) -> None:
    plan = {**PLANS["streaming"], "samples": 96, "checkpoint_rounds": 2, "mixing": mixing}
    whole = MemoryLog(seats("ams"))
    run(site(whole, tmp_path / "whole", "ams", **plan))

    log = MemoryLog(seats("ams"))
    victim = site(log, tmp_path / "cut", "ams", **plan)

    def die(session: Any) -> None:
        if session.step == 10:
            raise RuntimeError("killed")

    victim.step_hook = die
    with pytest.raises(RuntimeError, match="killed"):
        run(victim)
    checkpoint = tmp_path / "cut/ams/checkpoint/round-000004.safetensors"
    assert checkpoint.exists()
    base = log.sealed[4]
    fresh = MemoryLog(seats("ams"), base_round=4, base_hash=base.manifest_hash)
    fresh.sealed = {4: base}
    run(site(fresh, tmp_path / "cut", "ams", **plan, resume_from=str(checkpoint)))
    last = max(whole.applied)
    assert fresh.applied[last] == whole.applied[last]


@in_step
def test_a_site_joins_a_running_job_and_agrees(tmp_path: Path, plan: dict[str, Any]) -> None:
    log = MemoryLog(seats("ams"))
    first = site(log, tmp_path, "ams", samples=480, **plan)
    joined = threading.Event()

    def wait_for_the_joiner(session: Any) -> None:
        if session.rounds == 5 and not joined.is_set():
            joined.set()
            log.add(MemberSeat("oslo", 1, 1))

    first.step_hook = wait_for_the_joiner
    thread = threading.Thread(target=first.run, daemon=True)
    thread.start()
    assert joined.wait(30)
    joiner = site(log, tmp_path, "oslo", samples=480, **plan)
    run(joiner)
    thread.join(30)
    assert first.error is None
    assert sealed_samples(log) == list(range(480))
    # While one site has heard of the joiner and another has not, a block of streaming's may be claimed twice.
    assert repeated_samples(log) <= (8 if plan["strategy"] == "streaming" else 0)
    assert log.hashes_agree()
    late = [number for number, by_site in log.applied.items() if set(by_site) == {"ams", "oslo"}]
    assert len(late) > 5


@strategies
def test_the_survivor_of_a_dead_site_finishes_the_job(tmp_path: Path, plan: dict[str, Any]) -> None:
    log = MemoryLog(seats("ams", "oslo"))
    survivor, victim = (site(log, tmp_path, name, **plan) for name in ("ams", "oslo"))

    def die(session: Any) -> None:
        if session.rounds >= 2:
            raise RuntimeError("killed")

    victim.step_hook = die
    threads = [threading.Thread(target=each.run, daemon=True) for each in (survivor, victim)]
    for thread in threads:
        thread.start()
    threads[1].join(30)
    log.remove("oslo")
    threads[0].join(30)
    assert survivor.error is None
    assert sealed_samples(log) == list(range(SAMPLES))


@pytest.mark.parametrize("strategy", ["quorum", "async"])
def test_sites_of_unlike_speed_neither_wait_nor_repeat(tmp_path: Path, strategy: str) -> None:
    log = MemoryLog(seats("ams", "bern", "oslo"), quorum=1 if strategy == "async" else 2)
    sites = [site(log, tmp_path, name, samples=720, **PLANS[strategy]) for name in ("ams", "bern", "oslo")]
    gate = threading.Event()

    def stall_until_others_are_ahead(session: Any) -> None:
        if session.rounds >= 2 and not gate.is_set():
            ahead = session.rounds + 2
            log.wait_for(lambda: log.newest() >= ahead)
            gate.set()

    sites[2].step_hook = stall_until_others_are_ahead
    run(*sites)
    assert gate.is_set(), "the others went on without the slow site"
    assert sealed_samples(log) == list(range(720))
    assert log.hashes_agree()
    assert sites[2].session is not None
    assert sites[2].session.metrics.late_rounds > 0
    by_oslo = [entry for sealed in log.sealed.values() for entry in sealed.entries if entry.site_id == "oslo"]
    assert sum(each.weight for each in by_oslo) > 48, "what came late was merged late"


def test_metrics_say_what_the_rounds_cost_and_how_far_sites_moved_apart(tmp_path: Path) -> None:
    log = MemoryLog(seats("ams", "oslo"))
    first, second = (site(log, tmp_path, name, samples=480, codec="int8") for name in ("ams", "oslo"))
    run(first, second)
    assert first.session is not None
    metrics = first.session.metrics
    posted = sum(len(each) for posted in log.contributions.values() for each in posted["oslo"].fragments.values())
    assert metrics.rounds == 30
    assert metrics.bytes_by_link["oslo", "ams"] == posted
    assert metrics.ratio is not None
    assert 2 < 30 * 83 * 4 / metrics.bytes_posted == metrics.ratio < 4
    assert metrics.divergence is not None
    assert metrics.divergence > 0
    assert metrics.cosine is not None
    assert -1 <= metrics.cosine <= 1
    assert metrics.stall_s > 0
    rows = [row for name, row in log.reports if name == "ams" and "cosine" in row]
    assert len(rows) == 30
