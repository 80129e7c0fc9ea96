"""A tenant's job file and workdir, made into what the wire carries. Works with `training.jobfile` and `sites.bundle`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broker.cli.errors import UsageError
from sites.bundle import digest_of, pack
from sites.errors import SiteError
from training.errors import SpecError
from training.jobfile import load_job_file


@dataclass(frozen=True, slots=True)
class JobDocument:
    """A job ready to be submitted: its spec as JSON values, and its packed workdir."""

    spec: dict[str, Any]
    packed: bytes


def read_job(path: Path) -> JobDocument:
    """Read `path`, pack the workdir that it names, and check all that can be checked here.

    Raises UsageError, with the line or the field, for what a broker would refuse anyway.
    """
    try:
        job = load_job_file(path)
        packed = pack((path.parent / job.workdir).resolve())
        spec = job.spec(digest_of(packed))
    except FileNotFoundError as error:
        raise UsageError(f"there is no file {error.filename}") from None
    except SpecError as error:
        raise UsageError(f"{path}: {error}", code=error.code) from None
    except SiteError as error:
        raise UsageError(str(error), code=error.code) from None
    return JobDocument(spec.model_dump(mode="json"), packed)
