"""A site that is asked to leave stops at the end of a round, with a checkpoint that loses nothing."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from tests.training.gloo_threads import ranks_of_a_site
from tests.training.memory_log import MemoryLog
from tests.training.small_job import SAMPLES, Site, run, seats, site
from training.attempt import NewestCheckpoint
from training.checkpoint import read_state
from training.errors import EXIT_LEFT, Departure
from training.exchange import Entry, Leaving, MemberSeat, SealedRound, leaves_after


def newest(folder: Path, name: str) -> NewestCheckpoint:
    return NewestCheckpoint.model_validate_json((folder / name / "checkpoint/newest.json").read_text())


def file_of(folder: Path, name: str) -> str:
    return str(folder / name / "checkpoint" / newest(folder, name).file)


def run_until_left(*sites: Site) -> None:
    threads = [threading.Thread(target=each.run, daemon=True) for each in sites]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for each in sites:
        assert isinstance(each.error, Departure), each.error
        assert each.error.code == EXIT_LEFT


def sealed_samples(*logs: MemoryLog) -> list[int]:
    ranges = [each for log in logs for done in log.sealed.values() for entry in done.entries for each in entry.samples]
    return sorted(number for each in ranges for number in range(each.start, each.stop))


PLANS: list[dict[str, Any]] = [
    {"codec": "int8"},
    {"codec": "topk2"},
    {"codec": "fp32", "strategy": "every_step", "period_steps": 1},
    {"codec": "int4", "strategy": "streaming", "period_steps": 4, "fragments": 2, "overlap_steps": 1},
]


@pytest.mark.parametrize(
    "plan",
    [PLANS[0], *(pytest.param(plan, marks=pytest.mark.soak) for plan in PLANS[1:])],
    ids=lambda plan: plan.get("strategy", plan["codec"]),
)
def test_a_gang_that_leaves_goes_on_in_the_same_bits_as_one_that_stayed(tmp_path: Path, plan: dict[str, Any]) -> None:
    plan = {**plan, "checkpoint_rounds": 1000}
    whole = MemoryLog(seats("ams", "oslo"))
    run(*(site(whole, tmp_path / "whole", name, **plan) for name in ("ams", "oslo")))
    cut = MemoryLog(seats("ams", "oslo"), leaving=lambda number, _: "gang" if number == 3 else None)
    run_until_left(*(site(cut, tmp_path / "cut", name, **plan) for name in ("ams", "oslo")))
    assert {newest(tmp_path / "cut", name).round_number for name in ("ams", "oslo")} == {3}
    assert newest(tmp_path / "cut", "ams").outer_hash == whole.applied[3]["ams"]
    assert not (tmp_path / "cut/ams/output/model.safetensors").exists()
    resumed = MemoryLog(seats("ams", "oslo"), base_round=3, base_hash=newest(tmp_path / "cut", "ams").chain_hash)
    run(
        *(
            site(resumed, tmp_path / "cut", name, **plan, resume_from=file_of(tmp_path / "cut", name))
            for name in ("ams", "oslo")
        )
    )
    last = max(whole.applied)
    assert resumed.applied[last] == whole.applied[last]
    assert sealed_samples(cut, resumed) == list(range(SAMPLES))


def test_no_single_site_ends_the_work_of_others(tmp_path: Path) -> None:
    def liar(number: int, name: str) -> Leaving | None:
        return "gang" if name == "oslo" else None

    log = MemoryLog(seats("ams", "oslo"), leaving=liar)
    run(*(site(log, tmp_path, name) for name in ("ams", "oslo")))
    entries = [Entry(name, 1, (), (0,), "gang" if name != "oslo" else None) for name in ("ams", "bern", "oslo")]
    assert leaves_after(SealedRound(1, 1, "", tuple(entries), ()), "oslo")
    assert not leaves_after(SealedRound(1, 1, "", tuple(entries[1:]), ()), "oslo")


def test_an_heir_takes_its_predecessors_place_with_its_carry_while_the_other_site_goes_on(tmp_path: Path) -> None:
    def oslo_leaves(number: int, name: str) -> Leaving | None:
        return "site" if (number, name) == (3, "oslo") else None

    plan = {"codec": "topk2", "samples": 480}
    log = MemoryLog(seats("ams", "oslo"), leaving=oslo_leaves)
    stays, leaves = site(log, tmp_path, "ams", **plan), site(log, tmp_path, "oslo", **plan)
    thread = threading.Thread(target=stays.run, daemon=True)
    thread.start()
    run_until_left(leaves)
    assert leaves.session is not None
    share = leaves.session._synchronizer.share
    left = read_state(Path(file_of(tmp_path, "oslo")), share.fragments, share.layout)
    assert left.header.round_number == 3
    owed = sum(float((values**2).sum()) for values in left.outer["carry"].values()) ** 0.5
    assert owed > 0
    log.remove("oslo")
    log.add(MemberSeat("bern", 2, 1))
    heir = site(log, tmp_path, "bern", **plan, resume_from=file_of(tmp_path, "oslo"), heir_of="oslo")
    carried: list[float] = []
    heir.step_hook = lambda session: carried.append(session._synchronizer.share.carry_norm())
    run(heir)
    thread.join(60)
    assert stays.error is None
    assert carried[0] == pytest.approx(owed, rel=1e-6)
    assert heir.session is not None
    assert stays.session is not None
    assert heir.session.outer_hash == stays.session.outer_hash
    assert sealed_samples(log) == list(range(480))
    assert heir.session.step > 6, "its steps count on from its predecessor's"


@pytest.mark.soak
def test_all_ranks_of_a_site_leave_together_and_more_may_go_on(tmp_path: Path) -> None:
    log = MemoryLog(seats("ams", gpus=2), leaving=lambda number, _: "gang" if number == 2 else None)
    run_until_left(*(site(log, tmp_path, "ams", ranks, codec="int8") for ranks in ranks_of_a_site(2)))
    assert newest(tmp_path, "ams").round_number == 2
    resumed = MemoryLog(seats("ams", gpus=1), base_round=2, base_hash=newest(tmp_path, "ams").chain_hash)
    run(site(resumed, tmp_path, "ams", codec="int8", resume_from=file_of(tmp_path, "ams")))
    assert sealed_samples(log, resumed) == list(range(SAMPLES))


def test_a_job_whose_last_round_it_is_just_ends(tmp_path: Path) -> None:
    last = SAMPLES // 8
    log = MemoryLog(seats("ams"), leaving=lambda number, _: "gang" if number >= last else None)
    run(site(log, tmp_path, "ams"))
    assert (tmp_path / "ams/output/model.safetensors").exists()
