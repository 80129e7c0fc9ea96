from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.training.gloo_threads import ranks_of_a_site
from tests.training.memory_log import MemoryLog
from tests.training.small_job import SAMPLES, Site, model, run, seats, site
from training import checkpoint
from training.attempt import NewestCheckpoint
from training.errors import CheckpointError, ModelError
from training.parameters import Parameters
from training.session import Session


class StoppedError(Exception):
    """The attempt ends here."""


def stop_after(rounds: int) -> Callable[[Session], None]:
    def hook(session: Session) -> None:
        if session.rounds == rounds:
            raise StoppedError

    return hook


def newest(folder: Path, name: str) -> NewestCheckpoint:
    return NewestCheckpoint.model_validate_json((folder / name / "checkpoint/newest.json").read_text())


def file_of(folder: Path, name: str) -> str:
    return str(folder / name / "checkpoint" / newest(folder, name).file)


def stopped_run(folder: Path, codec: str, rounds: int) -> MemoryLog:
    """Two sites that both stop after `rounds` rounds, with a checkpoint after every second."""
    log = MemoryLog(seats("ams", "oslo"))
    sites = [site(log, folder, name, codec=codec) for name in ("ams", "oslo")]
    for each in sites:
        each.step_hook = stop_after(rounds)
    with pytest.raises(StoppedError):
        run(*sites)
    return log


@pytest.mark.parametrize("codec", ["fp32", "int8", "topk2"])
def test_a_resumed_run_ends_in_the_same_bits_as_one_never_interrupted(tmp_path: Path, codec: str) -> None:
    whole = MemoryLog(seats("ams", "oslo"))
    run(*(site(whole, tmp_path / "whole", name, codec=codec) for name in ("ams", "oslo")))
    last = max(whole.applied)

    cut = stopped_run(tmp_path / "cut", codec, rounds=5)
    assert newest(tmp_path / "cut", "ams").round_number == 4, "a round is lost and done again"
    resumed = MemoryLog(seats("ams", "oslo"), base_round=4, base_hash=newest(tmp_path / "cut", "ams").chain_hash)
    sites = [
        site(resumed, tmp_path / "cut", name, codec=codec, resume_from=file_of(tmp_path / "cut", name))
        for name in ("ams", "oslo")
    ]
    run(*sites)
    assert max(resumed.applied) == last
    assert resumed.applied[last] == whole.applied[last]
    assert resumed.applied[5] == cut.applied[5], "the round done again is the same round"
    summary = json.loads((tmp_path / "cut/ams/output/summary.json").read_text())
    assert summary["inner_steps"] == SAMPLES // 8


def test_a_checkpoint_is_named_only_when_it_is_whole(tmp_path: Path) -> None:
    log = MemoryLog(seats("ams"))
    run(site(log, tmp_path, "ams"))
    named = newest(tmp_path, "ams")
    content = Path(file_of(tmp_path, "ams")).read_bytes()
    assert named.digest == hashlib.sha256(content).hexdigest()
    assert named.size_bytes == len(content)
    assert named.samples_done == SAMPLES
    assert named.outer_hash == log.applied[named.round_number]["ams"]
    assert named.chain_hash == log.sealed[named.round_number].manifest_hash
    folder = tmp_path / "ams/checkpoint"
    assert len(list(folder.glob("round-*.safetensors"))) == checkpoint.CHECKPOINTS_KEPT
    assert not list(folder.glob(".*.part"))


def test_another_sites_checkpoint_serves_with_a_zero_carry(tmp_path: Path) -> None:
    stopped_run(tmp_path, "topk2", rounds=4)
    log = MemoryLog(seats("bern"), base_round=4, base_hash=newest(tmp_path, "ams").chain_hash)
    fresh = site(log, tmp_path, "bern", codec="topk2", resume_from=file_of(tmp_path, "ams"))
    norms: list[float] = []
    fresh.step_hook = lambda session: norms.append(session._synchronizer.share.carry_norm())
    run(fresh)
    assert norms[0] == 0
    assert sum(entry.weight for sealed in log.sealed.values() for entry in sealed.entries) == SAMPLES - 64
    assert min(log.sealed) == 5


def test_a_site_of_two_ranks_resumes_a_checkpoint_of_one(tmp_path: Path) -> None:
    stopped_run(tmp_path, "int8", rounds=4)
    log = MemoryLog(seats("ams", gpus=2), base_round=4, base_hash=newest(tmp_path, "ams").chain_hash)
    resume = {"codec": "int8", "resume_from": file_of(tmp_path, "ams")}
    sites = [site(log, tmp_path, "ams", ranks, **resume) for ranks in ranks_of_a_site(2)]
    run(*sites)
    assert sites[0].session is not None
    assert sites[0].session.samples_done == SAMPLES
    for mine, theirs in zip(sites[0].module.parameters(), sites[1].module.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def resumed(folder: Path, path: Path) -> Site:
    log = MemoryLog(seats("ams"), base_round=6)
    return site(log, folder, "ams", resume_from=str(path))


@pytest.mark.parametrize("fault", ["cut", "another model", "bits", "nan", "ahead"])
def test_an_unusable_checkpoint_is_refused_with_its_reason(tmp_path: Path, fault: str) -> None:
    run(site(MemoryLog(seats("ams")), tmp_path, "ams"))
    source = Path(file_of(tmp_path, "ams"))
    header = checkpoint.safe_open(source, framework="pt").metadata()
    tensors = load_file(source)
    path = tmp_path / "damaged.safetensors"
    reasons = {
        "cut": "cannot be read",
        "another model": "state of another model",
        "bits": "does not have the outer state",
        "nan": "lacks a sound theta",
        "ahead": "stands after round 12",
    }
    if fault == "bits":
        tensors["theta/1"][3] += 1e-6
    elif fault == "nan":
        tensors["theta/1"][3] = torch.nan
    elif fault == "another model":
        stated = json.loads(header["hansa"])
        header["hansa"] = json.dumps({**stated, "layout": "0" * 64})
    save_file(tensors, path, header)
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=reasons[fault]):
        run(resumed(tmp_path, path))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_an_optimizer_takes_the_same_next_step_after_the_round_trip(kind: type[torch.optim.Optimizer]) -> None:
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    first, second = model(), model()

    def step(module: torch.nn.Module, optimizer: torch.optim.Optimizer, scale: float) -> None:
        (module(torch.ones(2, 6) * scale).square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()

    before = kind(first.parameters(), lr=0.05, **options)
    for scale in (1.0, 2.0):
        step(first, before, scale)
    after = kind(second.parameters(), lr=0.5, **options)
    second.load_state_dict(first.state_dict())
    checkpoint.restore_optimizer(after, Parameters(second), *checkpoint.optimizer_state(before, Parameters(first)))
    step(first, before, 3.0)
    step(second, after, 3.0)
    for mine, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_optimizer_state_that_json_cannot_hold_is_refused() -> None:
    module = model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    optimizer.param_groups[0]["schedule"] = object()
    with pytest.raises(ModelError, match="cannot hold"):
        checkpoint.optimizer_state(optimizer, Parameters(module))


def test_random_states_come_back(tmp_path: Path) -> None:
    header = checkpoint.StateHeader(
        format="hansa-state-1",
        site_id="ams",
        round_number=0,
        chain_hash="0" * 64,
        outer_hash="0" * 64,
        layout="0" * 64,
        done=(),
        inner_steps=0,
        python_random=checkpoint.python_random_state(),
    )
    state = checkpoint.State(header, {}, torch_random=(torch.get_rng_state(),))
    checkpoint.write_state(tmp_path / "state.safetensors", state)
    drawn = (torch.rand(3).tolist(), [random.random() for _ in range(3)])  # noqa: S311 - no secret
    checkpoint.restore_random(checkpoint.read_state(tmp_path / "state.safetensors", (), "0" * 64), rank=0)
    assert (torch.rand(3).tolist(), [random.random() for _ in range(3)]) == drawn  # noqa: S311 - no secret
