"""What `hansa lab run --record RUN` leaves behind: the run as it was asked for, its faults, how it ended, and its round log.

    RUN/
      run.json             RunRecord, completed at the run's end
      start/               the outer state before the first round (`training.run_start`)
      contributions/, site-1/, site-2/ …     the round log (`training.roundlog.record`)

`training.lab.replay` reads it. No torch here: the command line asks for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from training.attempt import LinkSpeed
from training.lab.errors import LabError
from training.roundlog.view import Hash
from training.spec import SITES_PER_JOB_MAX, SiteId, SyncPlan

START: Final = "start"
_RUN: Final = "run.json"
_FORMAT: Final = "hansa-run-1"
_RUN_BYTES_MAX: Final = 1 << 22
FAULTS_MAX: Final = 64


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SiteEnd(_Document):
    """Where a site's session stood when its script ended."""

    round_number: int = Field(ge=0)
    outer_hash: Hash


class Fault(_Document):
    """A site that was killed once `after_round` was applied, and the number of the view that went on without it."""

    site_id: SiteId
    after_round: int = Field(ge=0)
    view_number: int = Field(ge=1)


class RunRecord(_Document):
    """One laboratory run. `ends` is empty as long as it has not come to its end."""

    format: str = Field(default=_FORMAT, pattern=f"^{_FORMAT}$")
    job: str = Field(max_length=200)
    job_id: str = Field(max_length=64)
    seed: int = Field(ge=0)
    sites: tuple[SiteId, ...] = Field(min_length=1, max_length=SITES_PER_JOB_MAX)
    plan: SyncPlan
    samples: int = Field(ge=1)
    links: tuple[LinkSpeed, ...] = Field(default=(), max_length=SITES_PER_JOB_MAX**2)
    authority_key: Hash = Field(description="the Ed25519 public key that signs the run's views")
    contribution_bytes_max: int = Field(ge=1)
    record_bytes_max: int = Field(ge=0)
    faults: tuple[Fault, ...] = Field(default=(), max_length=FAULTS_MAX)
    ends: dict[SiteId, SiteEnd] = Field(default_factory=dict, max_length=SITES_PER_JOB_MAX)

    def write(self, folder: Path) -> None:
        """Replace the run's document."""
        part = folder / f".{_RUN}.part"
        part.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        part.replace(folder / _RUN)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return the run in a folder. Raises LabError where there is none."""
        path = folder / _RUN
        try:
            with path.open("rb") as file:
                return cls.model_validate_json(file.read(_RUN_BYTES_MAX))
        except FileNotFoundError:
            message = f"{folder} has no {_RUN}; name a folder that `hansa lab run --record` wrote"
            raise LabError(message) from None
        except ValidationError as error:
            problem = error.errors()[0]
            place = "/".join(map(str, problem["loc"]))
            raise LabError(f"{path} is no record of this version: {place or 'it'}: {problem['msg']}") from None


def new_record(folder: Path) -> Path:
    """Make the folder of a new record. Raises LabError where it holds something already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LabError(f"{folder} is not empty, and a record is of one run; name another folder, or remove this one")
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()
