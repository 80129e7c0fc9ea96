"""Ranks that start anew go on from what the former ones left, if it is whole."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from sites.attempt_folder import AttemptFolder, resume_where_left
from training.attempt import AttemptContext, NewestCheckpoint
from training.roundlog.view import GENESIS_HASH
from training.spec import SyncPlan, Workload

CONTENT = b"a state"


@pytest.fixture
def folder(tmp_path: Path) -> AttemptFolder:
    """An attempt that began from a checkpoint of the market's."""
    folder = AttemptFolder(tmp_path)
    (tmp_path / "checkpoint").mkdir()
    context = AttemptContext(
        job_id="job",
        site_id="lyon",
        epoch=1,
        gpus=1,
        seed=7,
        workload=Workload(samples=100, batch_per_gpu=4, parameters=83, flops_per_sample=1e6),
        sync=SyncPlan(strategy="diloco", codec="fp32", period_steps=5),
        ranks_socket=str(tmp_path / "ranks.sock"),
        checkpoint_dir=str(tmp_path / "checkpoint"),
        output_dir=str(tmp_path / "output"),
        resume_from=str(tmp_path / "resume.safetensors"),
    )
    folder.context.write_text(context.model_dump_json())
    return folder


def leave_checkpoint(folder: AttemptFolder, content: bytes) -> Path:
    path = folder.root / "checkpoint" / "round-000015.safetensors"
    path.write_bytes(content)
    newest = NewestCheckpoint(
        round_number=15,
        chain_hash=GENESIS_HASH,
        outer_hash=GENESIS_HASH,
        file=path.name,
        digest=hashlib.sha256(CONTENT).hexdigest(),
        size_bytes=len(CONTENT),
        samples_done=60,
    )
    (folder.root / "checkpoint" / "newest.json").write_text(newest.model_dump_json())
    return path


def resumed_from(folder: AttemptFolder) -> str | None:
    return AttemptContext.model_validate_json(folder.context.read_bytes()).resume_from


def test_ranks_resume_from_the_newest_checkpoint_of_the_former_ones(folder: AttemptFolder) -> None:
    path = leave_checkpoint(folder, CONTENT)
    resume_where_left(folder)
    assert resumed_from(folder) == str(path)


@pytest.mark.parametrize("left", ["nothing", "cut short", "a link", "not a document"])
def test_ranks_start_where_the_attempt_did_if_no_whole_checkpoint_is_left(folder: AttemptFolder, left: str) -> None:
    begun_from = resumed_from(folder)
    if left == "cut short":
        leave_checkpoint(folder, CONTENT[:-1])
    elif left == "a link":
        path = leave_checkpoint(folder, CONTENT)
        path.rename(folder.root / "elsewhere")
        path.symlink_to(folder.root / "elsewhere")
    elif left == "not a document":
        leave_checkpoint(folder, CONTENT)
        (folder.root / "checkpoint" / "newest.json").write_text("{")
    resume_where_left(folder)
    assert resumed_from(folder) == begun_from
