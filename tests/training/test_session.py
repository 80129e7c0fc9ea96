from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.training.memory_log import MemoryLog
from tests.training.small_job import SAMPLES, Points, model, run, seats, site
from training.dealing import items
from training.exchange import SampleRange
from training.ranks import Ranks
from training.session import Session


@pytest.mark.parametrize("codec", ["fp32", "int8", "topk2"])
def test_two_sites_have_the_same_outer_hash_after_every_round(tmp_path: Path, codec: str) -> None:
    log = MemoryLog(seats("ams", "oslo"))
    first, second = site(log, tmp_path, "ams", codec=codec), site(log, tmp_path, "oslo", codec=codec)
    run(first, second)
    assert len(log.applied) == SAMPLES // 16
    assert all(set(by_site) == {"ams", "oslo"} for by_site in log.applied.values())
    assert log.hashes_agree()
    for mine, theirs in zip(first.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_every_sample_of_the_job_is_sealed_exactly_once(tmp_path: Path) -> None:
    log = MemoryLog(seats("ams", "bern", "oslo"))
    run(*(site(log, tmp_path, name, samples=101) for name in ("ams", "bern", "oslo")))
    numbers = [
        number
        for sealed in log.sealed.values()
        for entry in sealed.entries
        for each in entry.samples
        for number in range(each.start, each.stop)
    ]
    assert sorted(numbers) == list(range(101))


def test_a_member_without_samples_left_takes_part_with_weight_zero(tmp_path: Path) -> None:
    log = MemoryLog(seats("ams", "oslo"))
    run(site(log, tmp_path, "ams", samples=20), site(log, tmp_path, "oslo", samples=20))
    last = log.sealed[max(log.sealed)]
    assert [(entry.site_id, entry.weight) for entry in last.entries] == [("ams", 4), ("oslo", 0)]
    assert log.hashes_agree()


def test_every_step_plain_fp32_rounds_are_parameter_averaging(tmp_path: Path) -> None:
    """H = 1, rate 1, no momentum, equal weights, against an independent loop in the test."""
    log = MemoryLog(seats("ams", "oslo"))
    plan = {"period_steps": 1, "outer_learning_rate": 1.0, "outer_momentum": 0.0}
    first, second = site(log, tmp_path, "ams", **plan), site(log, tmp_path, "oslo", **plan)
    run(first, second)

    points = Points()
    modules = [model(), model()]
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.02) for each in modules]
    for start in range(0, SAMPLES, 8):
        outer = [each.detach().numpy().copy() for each in modules[0].parameters()]
        for place, (module, optimizer) in enumerate(zip(modules, optimizers, strict=True)):
            numbers = range(start + 4 * place, start + 4 * place + 4)
            batch = [points[index] for index in items(numbers, length=512, seed=5)]
            inputs, targets = (torch.stack(part) for part in zip(*batch, strict=True))
            torch.nn.functional.mse_loss(module(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
        for theta, one, two in zip(outer, *(each.parameters() for each in modules), strict=True):
            moved = [(theta - each.detach().numpy()).astype(np.float64) for each in (one, two)]
            averaged = theta - ((moved[0] + moved[1]) / 2).astype(np.float32)
            with torch.no_grad():
                one.copy_(torch.from_numpy(averaged))
                two.copy_(torch.from_numpy(averaged))
    for expected, found in zip(modules[0].parameters(), first.module.parameters(), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("codec", ["int8", "topk2"])
def test_alone_in_its_view_a_site_trains_as_without_rounds(tmp_path: Path, codec: str) -> None:
    log = MemoryLog(seats("ams"))
    lone = site(log, tmp_path, "ams", codec=codec)
    local = site(MemoryLog(seats("ams")), tmp_path / "local", "ams", strategy="local")
    run(lone)
    run(local)
    for mine, untouched in zip(lone.module.parameters(), local.module.parameters(), strict=True):
        torch.testing.assert_close(mine, untouched, rtol=1e-5, atol=1e-6)


def test_local_rounds_carry_no_values_and_do_not_touch_the_parameters(tmp_path: Path) -> None:
    log = MemoryLog(seats("ams"))
    local = site(log, tmp_path, "ams", strategy="local")
    run(local)
    posted = [payload for each in log.contributions.values() for payload in each["ams"].fragments.values()]
    assert {len(payload) for payload in posted} == {12}

    plain = model()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.02)
    assert Session(plain, optimizer, None, ranks=Ranks()).rounds == 0
    points = Points()
    for start in range(0, SAMPLES, 4):
        batch = [points[index] for index in items(range(start, start + 4), length=512, seed=5)]
        inputs, targets = (torch.stack(part) for part in zip(*batch, strict=True))
        torch.nn.functional.mse_loss(plain(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    for expected, found in zip(plain.parameters(), local.module.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_the_loss_falls_and_the_summary_says_what_was_done(tmp_path: Path) -> None:
    log = MemoryLog(seats("ams", "oslo"))
    plan = {"samples": 960, "outer_learning_rate": 0.4, "outer_momentum": 0.6}
    first, second = site(log, tmp_path, "ams", **plan), site(log, tmp_path, "oslo", **plan)
    run(first, second)
    assert first.losses is not None
    assert np.mean(first.losses[-10:]) < 0.3 * np.mean(first.losses[:10])
    summary = json.loads((tmp_path / "ams/output/summary.json").read_text())
    assert summary["complete"]
    assert summary["samples"] == 960
    assert summary["rounds"] == 60
    assert summary["inner_steps"] == 120
    assert summary["fp32_bytes_if_ddp"] == 120 * 83 * 4 * 2
    assert summary["outer_hash"] == log.applied[60]["oslo"]
    saved = load_file(tmp_path / "ams/output/model.safetensors")
    fresh = model()
    fresh.load_state_dict(saved)
    for mine, theirs in zip(fresh.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    rounds = [row for name, row in log.reports if name == "ams"]
    assert all(row["bytes_posted"] > 0 and row["step_s"] > 0 for row in rounds)


def test_alone_a_session_is_one_pass_over_the_data() -> None:
    module = model()
    session = Session(module, torch.optim.SGD(module.parameters(), lr=0.1), Points(length=50), ranks=Ranks())
    with session:
        sizes = [len(inputs) for inputs, _ in session.batches()]
    assert sizes == [16, 16, 16, 2]
    assert session.samples_done == 50
    assert session.rounds == 0


def test_samples_are_numbered_from_where_the_position_says(tmp_path: Path) -> None:
    log = MemoryLog(seats("ams"), done=(SampleRange(0, 80),))
    run(site(log, tmp_path, "ams"))
    assert log.sealed[1].entries[0].samples == (SampleRange(80, 88),)
