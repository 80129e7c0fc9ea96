"""A replay as the command line asks for it: in a process of its own, which alone loads torch.

The other end is `training.lab.replay`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError

from training.lab.errors import LabError, ReplayError
from training.roundlog.view import Hash

_LOG_TAIL: Final = 2000


class Replayed(BaseModel):
    """A run that was replayed to its end.

    `rounds_without_a_member` are those sealed without a site of their view, which had died or came late. `dropped` names
    rounds that a site held and that were sealed anew without it. Without `has_end` the record does not say how the run
    ended, and its last round was taken for the end.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    job: str
    strategy: str
    rounds: int
    contributions: int
    payload_bytes: int
    views: int
    rounds_without_a_member: int
    dropped: tuple[str, ...]
    faults: tuple[str, ...]
    samples_done: int
    outer_hash: Hash
    chain_hash: Hash
    reproduced: str
    has_end: bool


class _Refused(BaseModel):
    code: str
    message: str


def replay_apart(folder: Path) -> Replayed:
    """Replay the run in `folder` in a process of its own. Raises ReplayError or LabError as it says."""
    command = (sys.executable, "-m", "training.lab.replay", str(folder))
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        if ended.returncode == 0:
            return Replayed.model_validate_json(ended.stdout)
        refused = _Refused.model_validate_json(ended.stdout)
    except ValidationError:
        message = f"the replay ended with exit code {ended.returncode}: {ended.stderr.strip()[-_LOG_TAIL:]}"
        raise LabError(message) from None
    raise (ReplayError if refused.code == ReplayError.code else LabError)(refused.message)
